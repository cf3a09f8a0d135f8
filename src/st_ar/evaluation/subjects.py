"""The weights that a measurement is of: one model or several, live, averaged, or both."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from st_ar.data.store import TokenStore
from st_ar.errors import UserError
from st_ar.files import sha256
from st_ar.model.transformer import Transformer
from st_ar.model.weights import EMA, LIVE, ModelInfo, open_model


@dataclass(frozen=True, kw_only=True)
class Subject:
    """Weights to be measured."""

    name: str
    info: ModelInfo
    sha256: str
    """Of the file of weights."""

    def open(self) -> Transformer:
        """The network, float32 on the CPU.

        Raises:
            UserError: its file is another by now, as a run's is after a checkpoint.
        """
        model, _ = open_model(self.info.source)
        if sha256(self.info.source) != self.sha256:
            raise UserError(
                f"{self.info.source} has changed since this call began: its run goes on; take a copy, or wait for its end"
            )
        return model

    def describe(self) -> dict[str, Any]:
        """Which weights, as plain JSON values."""
        info = self.info
        return {"file": str(info.source), "sha256": self.sha256, "ema": info.ema, "step": info.step}


def check_store(info: ModelInfo, store: TokenStore) -> None:
    """UserError if the store is of another tokenizer than the model's, or names its classes otherwise."""
    store.check_model(info.config, info.tokenizer)
    if info.config.condition == "class" and info.class_names:
        store.check_classes(info.class_names, info.source)


def call_models(models: Sequence[Path], names: Sequence[str]) -> Sequence[str]:
    """What some models are called: the names given, or the last parts of their paths (of a run's files the run's), in full where those
    are alike.

    Raises:
        UserError: no models, or not one name each.
    """
    if not models:
        raise UserError("give at least one --model")
    if names and len(names) != len(models):
        raise UserError(f"{len(names)} --names for {len(models)} models: give one each, or none")
    short = [(_place(path).resolve().name, path.name == EMA) for path in models]
    return names or [each[0] if short.count(each) == 1 else str(path) for each, path in zip(short, models, strict=True)]


def _place(path: Path) -> Path:
    """The folder of a run's or an export's weights; other files stand for themselves."""
    place = path.parent if path.name in (LIVE, EMA) else path
    return place.parent if place.name == "export" else place


def find_subjects(
    models: Sequence[Path], names: Sequence[str], weights: Literal["live", "ema", "both"], *, ema: bool = False
) -> list[Subject]:
    """The weights of some models, read once to be sure that they can be; averaged ones say so in their names, if those were not given.

    Args:
        ema: a short way to say that `weights` is "ema".

    Raises:
        UserError: none, one twice, not one name each, `ema` beside other weights, or as `open_model`.
    """
    if ema and weights == "both":
        raise UserError("--ema is short for --weights ema: leave it out for both")
    wanted = {"live": [False], "ema": [True], "both": [False, True]}["ema" if ema else weights]
    called = call_models(models, names)
    found: list[Subject] = []
    for path, name in zip(models, called, strict=True):
        for averaged in wanted:
            info = open_model(path, ema=averaged)[1]
            label = name if not info.ema or (names and weights != "both") else f"{name} (EMA)"
            if any(label == subject.name for subject in found):
                raise UserError(f"two models are called {label}: give different --names, and each model once")
            found.append(Subject(name=label, info=info, sha256=sha256(info.source)))
    return found
