"""The weights that a run begins with, if they are not random: a model's."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from st_ar.config import ModelConfig, TrainConfig
from st_ar.data.store import TokenStore
from st_ar.errors import UserError
from st_ar.evaluation.likelihood import validation_loss
from st_ar.files import read_json, sha256
from st_ar.model.transformer import Transformer
from st_ar.model.weights import check_store, open_model
from st_ar.settings import differences, to_dict

MAY_DIFFER = ("token_dropout", "residual_dropout", "ffn_dropout", "drop_path")
"""Settings of a model that its weights do not depend on; nor on the grid, since positions are computed."""


class Initial:
    """A model to begin from, or none.

    Args:
        path: a run, an export folder, a .safetensors file, a .pt file of LlamaGen's, or hub:OWNER/NAME; None for random weights.
        ema: its averaged instead of its live weights.
        config: the model that is trained.
        trained_on: the store that it is trained on.

    Raises:
        UserError: no model, one of another architecture, of another tokenizer, or with other classes.
    """

    def __init__(self, path: Path | None, *, ema: bool, config: ModelConfig, trained_on: TokenStore) -> None:
        self.model, self.info = None, None
        if path is None:
            if ema:
                raise UserError(
                    "--init-ema says which weights of --init to begin with: give --init too, or leave it out"
                )
            return
        self.model, self.info = open_model(path, ema=ema, grid=config.grid)
        changed = {
            name: values
            for name, values in differences(to_dict(self.info.config), to_dict(config)).items()
            if name not in MAY_DIFFER
        }
        if changed:
            listed = "; ".join(
                f"--model.{name.replace('_', '-')} is {old} there, {new} here" for name, (old, new) in changed.items()
            )
            raise UserError(
                f"{self.info.source} is not of the model to be trained: {listed}; give its settings, or its preset"
            )
        check_store(self.info, trained_on)

    @property
    def encoder(self) -> str:
        """Of a text model: the encoder of the captions that it knows, as far as that is known."""
        return "" if self.info is None else self.info.encoder

    def describe(self) -> dict[str, Any]:
        """What a run records of the weights; nothing of random ones."""
        if self.info is None:
            return {}
        return {"init": {"sha256": sha256(self.info.source), "ema": self.info.ema, "step": self.info.step}}

    def give(self, model: Transformer) -> None:
        """Give them to the model that is trained, which keeps its random ones if there are none."""
        if self.model is not None:
            model.load_state_dict(self.model.state_dict())
            self.model = None


LOSS = "validation_loss"


class Validation:
    """Measures the averaged weights on a store, or on none.

    Args:
        tokens: the validation store; without it nothing is measured.
        trained_on: the store that the model is trained on, whose tokenizer the other must have.
        best: folder of the best weights so far, where there may be some.

    Raises:
        UserError: a store that does not suit the model, or a text model: a token store has no captions.
    """

    def __init__(self, tokens: Path | None, trained_on: TokenStore, config: TrainConfig, best: Path) -> None:
        self.config, self.store, self.best = config, None, math.inf
        if tokens is None:
            return
        config.model.require_classes("--validation")
        self.store = TokenStore(tokens)
        self.store.check_model(config.model, trained_on.meta.tokenizer)
        self.store.check_classes(trained_on.meta.class_names, trained_on.folder)
        if (best / "config.json").exists():
            self.best = float(read_json(best / "config.json", "an export folder").get(LOSS, math.inf))

    def describe(self) -> dict[str, Any]:
        """What a run records of the store; nothing without one."""
        return {} if self.store is None else {"validation": self.store.describe()}

    def measure(self, averaged: Transformer, batch_size: int, dtype: torch.dtype = torch.float32) -> dict[str, float]:
        """What to record of the averaged weights as they are now; of shards that are gathered in `dtype`, in that type."""
        if self.store is None:
            return {}
        images, device = self.config.validation_images, averaged.output.weight.device
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return {LOSS: validation_loss(averaged, self.store, images=images, batch_size=batch_size)}

    def improves(self, record: Mapping[str, Any]) -> bool:
        """Whether what was measured is the best so far, which it is from then on."""
        better = self.store is not None and record.get(LOSS, math.inf) < self.best
        if better:
            self.best = record[LOSS]
        return better
