"""Trained weights on disk: safetensors with LlamaGen's parameter names and a config.json, or LlamaGen's own files."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from st_ar.config import ModelConfig
from st_ar.data.store import TokenStore
from st_ar.errors import UserError, cause, damaged, require
from st_ar.files import (
    atomic_write,
    is_forbidden,
    printable,
    read_json,
    read_safetensors,
    read_tensors,
    save_tensors,
    sha256,
    write_json,
)
from st_ar.model.transformer import Transformer
from st_ar.settings import differences, from_dict, matches_type, to_dict

FORMAT_VERSION = 1
LIVE, EMA = "model.safetensors", "ema.safetensors"
CARD: dict[str, Any] = {
    "step": int,
    "class_names": list[str],
    "empty_classes": list[int],
    "tokenizer": str,
    "encoder": str,
    "class_dropout": float | None,
    "preset": str,
    "ema": bool,
}
"""Optional entries of config.json and their types."""


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """The description of a file of weights."""

    config: ModelConfig
    step: int = 0
    """Optimizer steps trained."""
    class_names: list[str] = field(default_factory=list)
    empty_classes: list[int] = field(default_factory=list)
    """Classes without training images."""
    tokenizer: str = ""
    """Fingerprint of the tokenizer that made the model's tokens."""
    encoder: str = ""
    """Text encoder of a text model; empty if it is not known."""
    class_dropout: float | None = None
    """Share of training images without their condition; None if the files do not say."""
    source: Path
    """The file that was read."""
    ema: bool
    """Whether these are the EMA weights."""


def save_weights(
    folder: Path, weights: Mapping[str, Mapping[str, Tensor]], config: ModelConfig, info: dict[str, Any]
) -> None:
    """Write weights of one architecture, by file name, and the config.json that describes them."""
    settings = to_dict(config)
    for name, tensors in weights.items():
        save_tensors(folder / name, tensors, file=name, model=settings)
    write_json(folder / "config.json", {"format_version": FORMAT_VERSION, "model": settings, **info})


def exported_step(folder: Path) -> int | None:
    """Return the step of an export folder's weights, None without weights or step."""
    try:
        return read_card(folder / "config.json").get("step")
    except UserError:
        return None


def find_weights(path: Path, ema: bool) -> Path:
    """Find the file of weights of a run, an export folder, a hub: name or a file."""
    name = EMA if ema else LIVE
    path = path.expanduser()
    if str(path).startswith("hub:"):
        path = download(str(path).removeprefix("hub:"))
    if path.is_dir():
        for folder in (path, path / "export"):
            if (folder / "config.json").exists() and (folder / name).exists():
                return folder / name
            if (folder / "config.json").exists() and (folder / (LIVE if ema else EMA)).exists():
                option = "leave out --ema" if ema else "give --ema"
                raise UserError(f"{folder / name} is missing: copy it beside {LIVE if ema else EMA}, or {option}")
        if (path / "config.json").exists() and "model" in read_json(path / "config.json", "a run"):
            raise UserError(f"{path / name} is missing: config.json is there without weights; copy the folder again")
        if (path / "config.json").exists():
            raise UserError(f"{path} has no weights yet: they are written at the first checkpoint (--checkpoint-every)")
        raise UserError(
            f"{path} is not a model: it has neither {name} with config.json nor export/; give a run or an export folder"
        )
    if not path.exists():
        raise UserError(f"{path} does not exist; give a run, an export folder, a .safetensors or LlamaGen .pt file")
    if path.suffix not in (".safetensors", ".pt", ".pth", ".bin"):
        raise UserError(f"{path} is not a .safetensors or .pt file; give a run, an export folder or a file of weights")
    if not ema or path.name == EMA or path.suffix != ".safetensors":
        return path
    if path.name != LIVE or not path.with_name(EMA).exists():
        raise UserError(f"{path} has no EMA weights beside it: give their file, or leave out --ema")
    return path.with_name(EMA)


def open_model(path: Path | str, *, ema: bool = False, grid: int | None = None) -> tuple[Transformer, ModelInfo]:
    """Load a trained model as `load_model` does, and its description."""
    file = find_weights(Path(path), ema)
    card = file.parent / "config.json"
    has_card = file.suffix == ".safetensors" and card.exists()
    saved = read_card(card) if has_card else {}
    tensors, metadata = read_safetensors(file) if file.suffix == ".safetensors" else (read_tensors(file, ema=ema), {})
    tensors.pop("freqs_cis", None)  # older LlamaGen files have it; it is computed here
    config = from_dict(ModelConfig, saved["model"], str(card)) if has_card else infer_config(tensors, file)
    _check_metadata(metadata, config if has_card else None, file)
    if grid is not None:
        config = replace(config, grid=grid)
    with torch.device("meta"):
        model = Transformer(config)
    expected = {key: value.shape for key, value in model.state_dict().items()}
    found = {key: value.shape for key, value in tensors.items()}
    if expected != found:
        wrong = sorted(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key))[0]
        raise UserError(
            f"{file} does not fit its {'config.json' if has_card else 'architecture'}: {wrong} is "
            f"{list(found.get(wrong, []))} there and {list(expected.get(wrong, []))} by the config"
        )
    model.load_state_dict({key: value.float() for key, value in tensors.items()}, assign=True)
    model.rope = model.rotary()  # files do not hold it
    known = {name: saved[name] for name in CARD if name in saved and name not in ("preset", "ema")}
    info = ModelInfo(
        config=config, source=file, ema=file.name == EMA or (ema and not has_card) or saved.get("ema", False), **known
    )
    return model.eval(), info


def _check_metadata(metadata: dict[str, Any], config: ModelConfig | None, file: Path) -> None:
    """Refuse live and EMA weights under each other's names, and a config.json with settings that the weights were not saved with."""
    name = metadata.get("file")
    if name in (LIVE, EMA) and file.name in (LIVE, EMA) and name != file.name:
        raise UserError(f"{file} was written as {name}: rename it to {name}, or export it again from its run")
    if config is None or "model" not in metadata:
        return
    written = from_dict(ModelConfig, metadata["model"], str(file))
    if wrong := differences(to_dict(written), to_dict(config)):
        listed = "; ".join(f"{key} is {now} there, {old} in the weights" for key, (old, now) in wrong.items())
        raise UserError(
            f"{file.parent / 'config.json'} does not describe {file.name}: {listed}; copy both again, or export them again"
        )


def read_card(card: Path) -> dict[str, Any]:
    """Read the config.json of an export folder."""
    saved = read_json(card, "an export folder")
    if saved.get("format_version") != FORMAT_VERSION or "model" not in saved:
        raise UserError(f"{card} has format {saved.get('format_version')}; this st-ar reads {FORMAT_VERSION}")
    for name, kind in CARD.items():
        if name in saved and not matches_type(saved[name], kind):
            raise damaged(card, f"{name} is {saved[name]!r}", "copy it again, or export it again from its run")
    return saved


HEADS = {(768, 12): 12, (1024, 24): 16, (1280, 36): 20, (1536, 48): 24, (3200, 24): 32}
"""LlamaGen's models: (dim, layers) -> heads, the only setting that the shapes of the weights do not show."""


def infer_config(tensors: dict[str, Tensor], file: Path) -> ModelConfig:
    """Infer the architecture of a LlamaGen file, class- or text-conditional, from the shapes of its weights; grid 16."""
    condition: dict[str, Any]
    try:
        if "cls_embedding.uncond_embedding" in tensors:
            rows, width = tensors["cls_embedding.uncond_embedding"].shape
            condition = {"condition": "text", "text_tokens": rows, "text_dim": width}
        else:
            condition = {"num_classes": len(tensors["cls_embedding.embedding_table.weight"]) - 1}
        vocab_size, dim = tensors["tok_embeddings.weight"].shape
    except (KeyError, ValueError) as error:
        raise UserError(f"{file} is not a LlamaGen transformer: {error} is missing or has another shape") from error
    layers = sum(name.endswith(".attention.wqkv.weight") for name in tensors)
    if (dim, layers) not in HEADS:
        known = ", ".join(f"{d} x {n}" for d, n in HEADS)
        raise UserError(
            f"{file} has width {dim} and {layers} layers: without a config.json beside it only LlamaGen's own sizes are known ({known})"
        )
    return ModelConfig(dim=dim, n_layers=layers, n_heads=HEADS[dim, layers], vocab_size=vocab_size, **condition)


def load_model(path: Path | str, *, ema: bool = False, grid: int | None = None) -> Transformer:
    """Load a trained model in evaluation mode, float32 on the CPU.

    Args:
        path: a run, an export folder, a .safetensors file, a LlamaGen .pt file, or hub:OWNER/NAME.
        ema: load the EMA weights instead of the live ones.
        grid: tokens per side to run at, instead of those trained for. Positions are computed, so weights of 256 px (grid 16)
            run at 384 px (grid 24). LlamaGen's files do not say their grid; the default is 16.

    Raises:
        UserError: the path is missing, damaged or not a model, or the weights do not fit their config.json.
    """
    return open_model(path, ema=ema, grid=grid)[0]


def save_llamagen(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a .pt file that LlamaGen's scripts load."""
    with atomic_write(path) as aside:
        torch.save({"model": {name: tensor.detach().contiguous() for name, tensor in tensors.items()}}, aside)


@dataclass(frozen=True, kw_only=True)
class EvalModel:
    """Weights to measure."""

    name: str
    info: ModelInfo
    sha256: str
    """Checksum of the file of weights."""

    def open(self) -> Transformer:
        """Load the network, float32 on the CPU. Its file may not have changed, as a run's does at a checkpoint."""
        model, _ = open_model(self.info.source)
        if sha256(self.info.source) != self.sha256:
            raise UserError(
                f"{self.info.source} has changed since this call began: its run is still training; copy it, or wait for its end"
            )
        return model

    def describe(self) -> dict[str, Any]:
        """Return which weights these are, as JSON values."""
        info = self.info
        return {"file": printable(str(info.source)), "sha256": self.sha256, "ema": info.ema, "step": info.step}


def check_store(info: ModelInfo, store: TokenStore) -> None:
    """Refuse a store of another tokenizer or with other class names than the model's."""
    store.check_model(info.config, info.tokenizer)
    if info.config.condition == "class" and info.class_names:
        store.check_classes(info.class_names, info.source)


def name_models(models: Sequence[Path], names: Sequence[str]) -> Sequence[str]:
    """Return the names of models: those given, or the names of their run folders; full paths where these are equal."""
    if not models:
        raise UserError("give at least one --model")
    if names and len(names) != len(models):
        raise UserError(f"{len(names)} --names for {len(models)} models: give one each, or none")
    short = [(_run_folder(path).resolve().name, path.name == EMA) for path in models]
    default = (each[0] if short.count(each) == 1 else str(path) for each, path in zip(short, models, strict=True))
    return list(map(printable, names or default))


def _run_folder(path: Path) -> Path:
    """Return the run or export folder of weights. Other paths are returned as they are."""
    folder = path.parent if path.name in (LIVE, EMA) else path
    return folder.parent if folder.name == "export" else folder


def open_eval_models(
    models: Sequence[Path], names: Sequence[str], weights: Literal["live", "ema", "both"], *, ema: bool = False
) -> list[EvalModel]:
    """Check that the weights of models can be loaded and name them. Names of EMA weights end with (EMA) unless given.

    `ema` is short for `weights` "ema".
    """
    if ema and weights == "both":
        raise UserError("--ema is short for --weights ema: leave it out for both")
    choices = {"live": [False], "ema": [True], "both": [False, True]}["ema" if ema else weights]
    found: list[EvalModel] = []
    for path, name in zip(models, name_models(models, names), strict=True):
        for choice in choices:
            info = open_model(path, ema=choice)[1]
            label = name if not info.ema or (names and weights != "both") else f"{name} (EMA)"
            if any(label == model.name for model in found):
                raise UserError(f"two models are called {label}: give different --names, and each model once")
            found.append(EvalModel(name=label, info=info, sha256=sha256(info.source)))
    return found


FILES = ("config.json", LIVE, EMA)


def download(name: str, revision: str | None = None) -> Path:
    """Download a model from the hub into huggingface_hub's cache, unless it is there; returns its folder."""
    hub = require("huggingface_hub")
    try:
        return Path(hub.snapshot_download(name, revision=revision, allow_patterns=list(FILES)))
    except Exception as error:  # its own errors and those of its HTTP library
        if is_forbidden(error):
            raise UserError(
                f"hub:{name} cannot be stored ({error}): set HF_HOME to a folder that you can write to"
            ) from error
        raise UserError(
            f"hub:{name} cannot be had ({cause(error)}): check the name and the network, log in with `hf auth login` if it is "
            "private, or give a folder that was downloaded elsewhere"
        ) from error
