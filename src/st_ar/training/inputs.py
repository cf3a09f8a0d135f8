"""The inputs of training: token store, captions, validation store and initial weights."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from st_ar.config import ModelConfig, TrainConfig
from st_ar.data.store import TokenBatches, TokenStore, note_same_images
from st_ar.data.text import open_text
from st_ar.distributed import Ranks
from st_ar.errors import UserError
from st_ar.evaluation.likelihood import validation_loss
from st_ar.files import read_json, sha256
from st_ar.model.transformer import Transformer
from st_ar.model.weights import check_store, open_model
from st_ar.settings import differences, flag_name, to_dict

WEIGHTLESS = ("token_dropout", "residual_dropout", "ffn_dropout", "drop_path")
"""Model settings that weights do not depend on."""
LOSS = "validation_loss"


@dataclass(frozen=True, kw_only=True)
class DataPaths:
    """The paths of a run's inputs (see `train`)."""

    tokens: Path
    text: Path | None = None
    validation: Path | None = None
    init: Path | None = None
    init_ema: bool = False


class Inputs:
    """The inputs of a run, opened and checked against its settings. `best` is the folder of the best weights so far."""

    def __init__(self, paths: DataPaths, config: TrainConfig, best: Path, ranks: Ranks) -> None:
        self.config = config
        self.store = store = TokenStore(paths.tokens)
        store.check_model(config.model)
        self.initial = Initial(paths.init, ema=paths.init_ema, config=config.model, store=store)
        self.captions = open_text(paths.text, config.model, self.initial.encoder)
        if self.captions is not None:
            self.captions.check_tokens(store)
        if config.selfguided.contrast and config.batch_size > len(store):
            raise UserError(
                f"--batch-size {config.batch_size} is more than the {len(store)} images of {paths.tokens}: images would be "
                f"negatives of themselves; give at most {len(store)}"
            )
        self.validation = Validation(paths.validation, store, config, best)
        text, length = self.captions, config.model.text_tokens
        conditions = None if text is None else partial(text.features, text_tokens=length)
        self.batches = TokenBatches(
            store,
            batch_size=config.batch_size,
            views=config.views,
            seed=config.seed,
            conditions=conditions,
            ranks=ranks,
        )

    def describe(self) -> dict[str, Any]:
        """Verify the checksums of all stores and return the inputs' entries of config.json."""
        inputs = {"tokens": self.store, "text": self.captions, "validation": self.validation.store}
        stores = {name: store for name, store in inputs.items() if store is not None}
        for store in stores.values():
            store.verify()
        return {name: store.describe() for name, store in stores.items()} | self.initial.describe()

    def describe_export(self, preset: str) -> dict[str, Any]:
        """Return the inputs' entries of an export's config.json."""
        encoder = {} if self.captions is None else {"encoder": self.captions.encoder}
        meta = self.store.meta
        about = {"preset": preset, "class_names": meta.class_names, "tokenizer": meta.tokenizer}
        empty = {"empty_classes": self.store.empty_classes} if self.store.empty_classes else {}
        return {**about, **empty, "class_dropout": self.config.class_dropout, **encoder}


class Initial:
    """A model to start from, with the architecture, tokenizer and classes of the run, or none."""

    def __init__(self, path: Path | None, *, ema: bool, config: ModelConfig, store: TokenStore) -> None:
        self.model, self.info, self.encoder = None, None, ""
        if path is None:
            if ema:
                raise UserError("--init-ema selects weights of --init: give --init too, or leave it out")
            return
        self.model, self.info = open_model(path, ema=ema, grid=config.grid)
        self.encoder = self.info.encoder
        changes = differences(to_dict(self.info.config), to_dict(config)).items()
        listed = [
            f"--model.{flag_name(name)} is {old} there, {new} here"
            for name, (old, new) in changes
            if name not in WEIGHTLESS
        ]
        if listed:
            raise UserError(
                f"{self.info.source} is another model: {'; '.join(listed)}; give its settings, or its preset"
            )
        check_store(self.info, store)

    def describe(self) -> dict[str, Any]:
        """Return the weights' entry of config.json, none for random weights."""
        if self.info is None:
            return {}
        return {"init": {"sha256": sha256(self.info.source), "ema": self.info.ema, "step": self.info.step}}

    def load_into(self, model: Transformer) -> None:
        """Copy the weights into the model to train; without a model to start from it keeps its random weights."""
        if self.model is not None:
            model.load_state_dict(self.model.state_dict())
            self.model = None


class Validation:
    """The validation loss of the EMA weights, and the best value so far. Measures nothing if `tokens` is None."""

    def __init__(self, tokens: Path | None, training: TokenStore, config: TrainConfig, best: Path) -> None:
        self.config, self.store, self.best = config, None, math.inf
        if tokens is None:
            return
        config.model.require_classes("--validation")
        self.store = TokenStore(tokens)
        self.store.check_model(config.model, training.meta.tokenizer)
        note_same_images(training, self.store)
        self.store.check_classes(training.meta.class_names, training.folder)
        if (best / "config.json").exists():
            self.best = float(read_json(best / "config.json", "an export folder").get(LOSS, math.inf))

    def measure(self, ema: Transformer, batch_size: int, dtype: torch.dtype = torch.float32) -> dict[str, float]:
        """Return the log entry of the EMA weights' loss. Sharded weights are gathered in `dtype`."""
        if self.store is None:
            return {}
        images, device = self.config.validation_images, ema.output.weight.device
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return {LOSS: validation_loss(ema, self.store, images=images, batch_size=batch_size)}

    def update_best(self, record: Mapping[str, Any]) -> bool:
        """Return whether a record is the best so far, and keep its loss if it is."""
        better = self.store is not None and record.get(LOSS, math.inf) < self.best
        if better:
            self.best = record[LOSS]
        return better
