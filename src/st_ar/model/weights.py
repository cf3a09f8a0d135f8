"""Trained weights on disk: safetensors with LlamaGen's parameter names and a config.json that says what they are, or
LlamaGen's own files.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from st_ar.config import ModelConfig
from st_ar.errors import UserError
from st_ar.files import read_json, sha256, write_json, written_aside
from st_ar.model.transformer import Transformer
from st_ar.settings import from_dict, to_dict
from st_ar.torch_files import read_tensors

FORMAT_VERSION = 1
LIVE, EMA = "model.safetensors", "ema.safetensors"


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """What a file of weights says of itself."""

    config: ModelConfig
    step: int
    """Optimizer steps trained."""
    class_names: list[str]
    tokenizer: str
    """Fingerprint of the tokenizer whose codes the model speaks."""
    encoder: str
    """Of a text model: the encoder whose features it was trained on, as far as it is known."""
    class_dropout: float | None
    """Share of the images that it was trained on without their condition; None if the files do not say."""
    source: Path
    """The file that was read."""
    ema: bool
    """Whether these are the averaged weights."""


def save_export(folder: Path, model: Transformer, ema: Transformer, info: dict[str, Any]) -> None:
    """Write export/: live and averaged weights in float32, and config.json. Each file is replaced whole."""
    save_weights(folder, {LIVE: model.state_dict(), EMA: ema.state_dict()}, model.config, info)


def save_weights(
    folder: Path, weights: Mapping[str, Mapping[str, Tensor]], config: ModelConfig, info: dict[str, Any]
) -> None:
    """Write weights of one architecture, by file name, and the config.json that describes them, with their checksums."""
    for name, tensors in weights.items():
        with written_aside(folder / name) as aside:
            save_file(
                {key: value.detach().cpu().contiguous() for key, value in tensors.items()},
                aside,
                metadata={"format": "pt"},
            )
    sums = {"sha256": {name: sha256(folder / name) for name in weights}}
    write_json(folder / "config.json", {"format_version": FORMAT_VERSION, "model": to_dict(config), **info, **sums})


def exported_step(folder: Path) -> int | None:
    """The step of the weights in export/, None if there are none."""
    file = folder / "config.json"
    return read_json(file, "an export folder").get("step") if file.exists() else None


def find_weights(path: Path, ema: bool) -> Path:
    """The file that a run, an export folder or a .safetensors path stands for."""
    name = EMA if ema else LIVE
    if str(path).startswith("hub:"):
        from st_ar.hub import download

        path = download(str(path).removeprefix("hub:"))
    if path.is_dir():
        for folder in (path, path / "export"):
            if (folder / "config.json").exists() and (folder / name).exists():
                return folder / name
        if (path / "config.json").exists():
            raise UserError(f"{path} has no weights yet: they are written at the first checkpoint (--checkpoint-every)")
        raise UserError(
            f"{path} is no model: it holds neither {name} with config.json nor export/; give a run or an export folder"
        )
    if not path.exists():
        raise UserError(f"{path} does not exist; give a run, an export folder or a .safetensors file")
    if path.suffix not in (".safetensors", ".pt", ".pth", ".bin"):
        raise UserError(f"{path} is not a .safetensors or .pt file; give a run, an export folder or a file of weights")
    if not ema or path.name == EMA:
        return path
    if path.name != LIVE or not path.with_name(EMA).exists():
        raise UserError(f"{path} has no averaged weights beside it: name their file, or leave out ema")
    return path.with_name(EMA)


def open_model(path: Path | str, *, ema: bool = False, grid: int | None = None) -> tuple[Transformer, ModelInfo]:
    """A trained model in evaluation mode, float32 on the CPU, and what its files say of it.

    Args:
        path: a run, an export folder, a .safetensors file, a .pt file of LlamaGen's, or hub:OWNER/NAME.
        ema: the averaged instead of the live weights.
        grid: tokens per side to run at, if not the ones trained for: positions are computed, so weights of 256 px
            (grid 16) run at 384 px (grid 24). LlamaGen's files do not say theirs; 16 is taken.

    Raises:
        UserError: nothing there, not a model, damaged, or weights that do not fit their config.
    """
    file = find_weights(Path(path), ema)
    card = file.parent / "config.json"
    own = file.suffix == ".safetensors" and card.exists()
    saved = _read_card(card) if own else {}
    tensors = read_tensors(file)
    tensors.pop("freqs_cis", None)  # in LlamaGen's older files; computed here
    config = from_dict(ModelConfig, saved["model"], str(card)) if own else infer_config(tensors, file)
    if grid is not None:
        config = replace(config, grid=grid)
    with torch.device("meta"):
        model = Transformer(config)
    expected = {key: value.shape for key, value in model.state_dict().items()}
    found = {key: value.shape for key, value in tensors.items()}
    if expected != found:
        wrong = sorted(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key))[0]
        raise UserError(
            f"{file} does not fit its {'config.json' if own else 'architecture'}: {wrong} is "
            f"{list(found.get(wrong, []))} there and {list(expected.get(wrong, []))} by the config"
        )
    if own and saved.get("sha256", {}).get(file.name) not in (None, sha256(file)):
        raise UserError(
            f"{file} is not the one that config.json beside it describes, so it is damaged, or just being written: try again, "
            "or resume the run, which writes it anew; if you have replaced it, take sha256 out of config.json"
        )
    model.load_state_dict({key: value.float() for key, value in tensors.items()}, assign=True)
    model.rope = model.rotary()  # is in no file
    info = ModelInfo(
        config=config,
        step=saved.get("step", 0),
        class_names=saved.get("class_names", []),
        tokenizer=saved.get("tokenizer", ""),
        encoder=saved.get("encoder", ""),
        class_dropout=saved.get("class_dropout"),
        source=file,
        ema=file.name == EMA,
    )
    return model.eval(), info


def _read_card(card: Path) -> dict[str, Any]:
    saved = read_json(card, "an export folder")
    if saved.get("format_version") != FORMAT_VERSION or "model" not in saved:
        raise UserError(f"{card} has format {saved.get('format_version')}; this st-ar reads {FORMAT_VERSION}")
    return saved


HEADS = {(768, 12): 12, (1024, 24): 16, (1280, 36): 20, (1536, 48): 24, (3200, 24): 32}
"""LlamaGen's models: (dim, layers) -> heads, the one number that no weight's shape tells."""


def infer_config(tensors: dict[str, Tensor], file: Path) -> ModelConfig:
    """The architecture of a file of LlamaGen's, class- or text-conditional, from the weights' shapes; grid 16."""
    condition: dict[str, Any]
    try:
        if "cls_embedding.uncond_embedding" in tensors:
            rows, width = tensors["cls_embedding.uncond_embedding"].shape
            condition = {"condition": "text", "text_tokens": rows, "text_dim": width}
        else:
            condition = {"num_classes": len(tensors["cls_embedding.embedding_table.weight"]) - 1}
        vocab_size, dim = tensors["tok_embeddings.weight"].shape
    except (KeyError, ValueError) as error:
        raise UserError(f"{file} is no transformer of LlamaGen's: {error} is missing or has another shape") from error
    layers = sum(name.endswith(".attention.wqkv.weight") for name in tensors)
    if (dim, layers) not in HEADS:
        known = ", ".join(f"{d} x {n}" for d, n in HEADS)
        raise UserError(
            f"{file} has width {dim} and {layers} layers: without a config.json beside it only LlamaGen's own sizes are known ({known})"
        )
    return ModelConfig(dim=dim, n_layers=layers, n_heads=HEADS[dim, layers], vocab_size=vocab_size, **condition)


def load_model(path: Path | str, *, ema: bool = False, grid: int | None = None) -> Transformer:
    """A trained model in evaluation mode; see `open_model`, which also tells what the files say of it."""
    return open_model(path, ema=ema, grid=grid)[0]


def save_llamagen(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a .pt file that LlamaGen's own scripts load: the weights under "model", with its parameter names."""
    with written_aside(path) as aside:
        torch.save({"model": {name: tensor.detach().contiguous() for name, tensor in tensors.items()}}, aside)
