"""Between this project's folders and the files of LlamaGen's."""

from pathlib import Path
from typing import Literal

from st_ar.errors import UserError
from st_ar.files import require_absent
from st_ar.model.weights import open_model, save_llamagen, save_weights
from st_ar.tokenizer import CONFIG as TOKENIZER_CONFIG
from st_ar.tokenizer import load_tokenizer
from st_ar.tokenizer.vq import VQTokenizer
from st_ar.torch_files import read_tensors


def convert(
    source: Path, target: Path, *, to: Literal["llamagen", "st-ar"], ema: bool = False, grid: int | None = None
) -> str:
    """Convert a model or a VQ tokenizer; returns what was written, in words.

    Args:
        source: anything that `load_model` or `load_tokenizer` takes.
        target: a new .pt file for LlamaGen, a new folder for st-ar.
        ema: a run's averaged instead of its live weights.
        grid: tokens a side of a model for st-ar, if not the source's (`open_model`).

    Raises:
        UserError: a source that is neither, a target that exists or has the wrong form, or an option that is not for it.
    """
    require_absent(target, "a converted model", flag="target")
    if (to == "llamagen") != (target.suffix == ".pt"):
        raise UserError(
            f"{target}: give a name that ends in .pt with --to llamagen, and a folder's name with --to st-ar"
        )
    if _is_tokenizer(source):
        if ema or grid is not None:
            raise UserError(f"{source} is a tokenizer: leave out --ema and --grid, which are for models")
        tokenizer = load_tokenizer(source)
        if not isinstance(tokenizer, VQTokenizer):
            raise UserError(f"{source} is a {tokenizer.kind} tokenizer: LlamaGen has VQ-GANs only")
        if to == "llamagen":
            save_llamagen(target, tokenizer.tensors)
        else:
            tokenizer.save(target)
        return f"{target}: VQ tokenizer, {tokenizer.vocab_size} codes of {tokenizer.patch} x {tokenizer.patch} pixels"
    if grid is not None and to == "llamagen":
        raise UserError("LlamaGen's files keep no grid: --grid is for --to st-ar")
    model, info = open_model(source, ema=ema, grid=grid)
    if to == "llamagen":
        save_llamagen(target, model.state_dict())
    else:
        known = {"step": info.step, "class_names": info.class_names, "tokenizer": info.tokenizer, "preset": ""}
        known |= {"encoder": info.encoder} if info.encoder else {}
        known |= {} if info.class_dropout is None else {"class_dropout": info.class_dropout}
        save_weights(target, {"model.safetensors": model.state_dict()}, model.config, known)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return f"{target}: {parameters / 1e6:.1f}M parameters, {info.config.n_layers} layers, {info.config.condition_name}"


def _is_tokenizer(source: Path) -> bool:
    if source.is_dir():
        return (source / TOKENIZER_CONFIG).exists()
    return source.is_file() and "quantize.embedding.weight" in read_tensors(source)
