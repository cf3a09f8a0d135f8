"""Trained weights on disk: safetensors with LlamaGen's parameter names, and a config.json that says what they are."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from st_ar.config import ModelConfig, from_dict, to_dict
from st_ar.errors import UserError
from st_ar.files import read_json, write_json, written_aside
from st_ar.model.transformer import Transformer, rope_table

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
    source: Path
    """The file that was read."""
    ema: bool
    """Whether these are the averaged weights."""


def save_export(folder: Path, model: Transformer, ema: Transformer, info: dict[str, Any]) -> None:
    """Write export/: live and averaged weights in float32, and config.json. Each file is replaced whole."""
    for name, weights in ((LIVE, model), (EMA, ema)):
        tensors = {key: value.detach().cpu().contiguous() for key, value in weights.state_dict().items()}
        with written_aside(folder / name) as aside:
            save_file(tensors, aside, metadata={"format": "pt"})
    write_json(folder / "config.json", {"format_version": FORMAT_VERSION, "model": to_dict(model.config), **info})


def exported_step(folder: Path) -> int | None:
    """The step of the weights in export/, None if there are none."""
    file = folder / "config.json"
    return read_json(file, "an export folder").get("step") if file.exists() else None


def find_weights(path: Path, ema: bool) -> Path:
    """The file that a run, an export folder or a .safetensors path stands for."""
    name = EMA if ema else LIVE
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
    if path.suffix != ".safetensors":
        raise UserError(f"{path} is not a .safetensors file; give a run, an export folder or a .safetensors file")
    if not ema or path.name == EMA:
        return path
    if path.name != LIVE or not path.with_name(EMA).exists():
        raise UserError(f"{path} has no averaged weights beside it: name their file, or leave out ema")
    return path.with_name(EMA)


def open_model(path: Path | str, *, ema: bool = False) -> tuple[Transformer, ModelInfo]:
    """A trained model in evaluation mode, float32 on the CPU, and what its files say of it.

    Args:
        path: a run, an export folder, or a .safetensors file with its config.json beside it.
        ema: the averaged instead of the live weights.

    Raises:
        UserError: nothing there, not a model, damaged, or weights that do not fit config.json.
    """
    file = find_weights(Path(path), ema)
    saved = read_json(file.parent / "config.json", "an export folder")
    if saved.get("format_version") != FORMAT_VERSION or "model" not in saved:
        raise UserError(
            f"{file.parent}/config.json has format {saved.get('format_version')}; this st-ar reads {FORMAT_VERSION}"
        )
    config = from_dict(ModelConfig, saved["model"], f"{file.parent}/config.json")
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {key: opened.get_tensor(key).float() for key in opened.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{file} is damaged or incomplete ({error}); copy it again, or export it again from its run"
        ) from error
    with torch.device("meta"):
        model = Transformer(config)
    expected = {key: value.shape for key, value in model.state_dict().items()}
    found = {key: value.shape for key, value in tensors.items()}
    if expected != found:
        wrong = sorted(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key))[0]
        raise UserError(
            f"{file} does not fit its config.json: {wrong} is {list(found.get(wrong, []))} there and "
            f"{list(expected.get(wrong, []))} by the config"
        )
    model.load_state_dict(tensors, assign=True)
    model.rope = rope_table(config.grid, config.head_dim, config.rope_base)  # is in no file
    info = ModelInfo(
        config=config,
        step=saved.get("step", 0),
        class_names=saved.get("class_names", []),
        tokenizer=saved.get("tokenizer", ""),
        source=file,
        ema=file.name == EMA,
    )
    return model.eval(), info


def load_model(path: Path | str, *, ema: bool = False) -> Transformer:
    """A trained model in evaluation mode; see `open_model`, which also tells what the files say of it."""
    return open_model(path, ema=ema)[0]
