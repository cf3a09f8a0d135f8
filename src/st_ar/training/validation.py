"""The loss on images that are not trained on, measured at checkpoints, and which weights were the best by it."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from st_ar.config import TrainConfig
from st_ar.data.store import TokenStore
from st_ar.evaluation.likelihood import validation_loss
from st_ar.files import read_json
from st_ar.model.transformer import Transformer

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
