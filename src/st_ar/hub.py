"""Models on the Hugging Face hub: upload of an export folder with a model card, and download."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from st_ar.config import ModelConfig
from st_ar.errors import UserError, cause, damaged, require
from st_ar.files import read_json
from st_ar.model.weights import FILES, download, find_weights, open_model, read_card
from st_ar.settings import from_dict


def from_pretrained(name: str, *, ema: bool = False, revision: str | None = None, grid: int | None = None) -> Any:
    """Return a Transformer from the hub in evaluation mode. `ema` and `grid` are as for `load_model`.

    Args:
        name: owner/model on the hub.
        revision: branch, tag or commit.
    """
    return open_model(download(name, revision), ema=ema, grid=grid)[0]


def push_to_hub(
    run: Path | str,
    name: str,
    *,
    metrics: Mapping[str, float] | None = None,
    licence: str = "apache-2.0",
    private: bool = False,
) -> str:
    """Upload the weights of a run or an export with a generated model card; return the model's URL.

    Args:
        run: a run or an export folder.
        name: owner/model on the hub, created if necessary.
        metrics: name -> value, for the card.
        licence: the hub's identifier of the weights' licence.
        private: make a new model private.

    Raises:
        UserError: `run` has no weights, or the hub refuses or cannot be reached.
    """
    hub = require("huggingface_hub")
    folder = find_weights(Path(run), ema=False).parent
    card = model_card(folder, name, metrics=metrics or {}, licence=licence)
    try:
        api = hub.HfApi()
        address = api.create_repo(name, private=private, exist_ok=True)
        operations = [hub.CommitOperationAdd("README.md", card.encode())]
        operations += [hub.CommitOperationAdd(f, str(folder / f)) for f in FILES if (folder / f).exists()]
        api.create_commit(name, operations=operations, commit_message="Upload st-ar model")
    except Exception as error:  # huggingface_hub raises many types
        raise UserError(
            f"hub:{name} cannot be written ({cause(error)}): check the name and the network, and log in with `hf auth login`"
        ) from error
    return str(address)


def model_card(folder: Path, name: str, *, metrics: Mapping[str, float], licence: str) -> str:
    """Return the model card of an export folder: architecture, data, metrics, training settings of its run, licence."""
    export = read_card(folder / "config.json")
    run = folder.parent / "config.json"
    training = read_json(run, "a run") if run.exists() else {}
    model = from_dict(ModelConfig, export["model"], str(folder / "config.json"))
    config, tokens = (training.get(part, {}) for part in ("config", "tokens"))
    if not isinstance(config, dict) or not isinstance(tokens, dict):
        raise damaged(run, "config or tokens is not an object", "copy it again, or move the export away from it")
    preset = export.get("preset") or "none"
    shape = f"{model.n_layers} layers, {model.n_heads} heads, width {model.dim}"
    captions = [f"- captions: {export.get('encoder') or 'encoder not recorded'}"] if model.condition == "text" else []
    lines = [
        "---",
        f"license: {licence}",
        "library_name: st-ar",
        "tags: [autoregressive, image-generation, llamagen, st-ar]",
        "---",
        "",
        f"# LlamaGen-style transformer, preset {preset}",
        "",
        f"{shape}; {model.vocab_size} codes, {model.grid} x {model.grid} tokens, {model.condition_name}; "
        f"{export.get('step', 0):,} optimizer steps. `model.safetensors` has the live weights, `ema.safetensors` the EMA weights, "
        "both with LlamaGen's parameter names.",
        "",
        "    import st_ar",
        f'    model = st_ar.load_model("hub:{name}")',
        "",
        "## Data",
        "",
        f"- images: {tokens.get('source', 'not recorded')} ({tokens.get('images', 'unknown number of')} images)",
        f"- tokenizer: {export.get('tokenizer') or 'not recorded'}",
        *captions,
        "",
        "## Metrics",
        "",
        *([f"- {key}: {value:.6g}" for key, value in metrics.items()] or ["None were given."]),
        "",
        "## Recipe",
        "",
        "```json",
        json.dumps({key: config[key] for key in sorted(config) if key != "model"} or "not recorded", indent=2),
        "```",
        "",
    ]
    return "\n".join(lines)
