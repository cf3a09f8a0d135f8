"""Probes of several models beside one another: which weights they are of, and their table, JSON and figure."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from st_ar.data.store import TokenStore
from st_ar.errors import UserError
from st_ar.evaluation.feature_cache import FeatureCache
from st_ar.evaluation.hidden import Reading
from st_ar.evaluation.probe import ProbeMethod, ProbeResult, choose_reading, same_names
from st_ar.evaluation.shallow import NAMES
from st_ar.figures import COLOURS, Drawing, line_chart
from st_ar.files import sha256
from st_ar.hardware import describe
from st_ar.model.transformer import Transformer
from st_ar.model.weights import ModelInfo, open_model

FORMAT_VERSION = 1
Layers = Sequence[int] | Literal["all"]


@dataclass(frozen=True, kw_only=True)
class Subject:
    """Weights to be probed."""

    name: str
    info: ModelInfo
    sha256: str
    """Of the file of weights."""

    def layers(self, chosen: Layers) -> Sequence[int] | None:
        """The layers asked for; None for none, which stands for half the depth."""
        if isinstance(chosen, str):
            return range(1, self.info.config.n_layers + 1)
        return chosen or None

    def choose_reading(
        self,
        train_store: TokenStore,
        test_store: TokenStore,
        layers: Layers,
        steps: Sequence[int],
        train_crops: Sequence[int] | None,
        dtype: torch.dtype,
    ) -> Reading:
        """What is read of it.

        Raises:
            UserError: as `choose_reading`; stores of another tokenizer or with other names of classes than the model's; or a model
                that has never been trained without its condition, whose null condition means nothing.
        """
        reading, _ = choose_reading(
            self.info.config,
            train_store,
            test_store,
            layers=self.layers(layers),
            steps=steps or None,
            train_crops=train_crops,
            dtype=dtype,
        )
        for store in (train_store, test_store):
            store.check_model(self.info.config, self.info.tokenizer)
            names = self.info.class_names
            if self.info.config.condition == "class" and names and not same_names(names, store.meta.class_names):
                raise UserError(
                    f"{store.folder} names its classes otherwise than {self.info.source}: give the store that the model was made for"
                )
        if self.info.class_dropout == 0:
            raise UserError(
                f"{self.info.source} was trained with --class-dropout 0 and knows no null class, which probes give it so that no "
                "label leaks: train with --class-dropout above 0"
            )
        return reading


def find_subjects(
    models: Sequence[Path], names: Sequence[str], weights: Literal["live", "ema", "both"]
) -> list[Subject]:
    """The weights of some models, read once to be sure that they can be.

    Raises:
        UserError: none, one twice, not one name each, or as `open_model`.
    """
    if not models:
        raise UserError("give at least one --model")
    if names and len(names) != len(models):
        raise UserError(f"{len(names)} --names for {len(models)} models: give one each, or none")
    last = [path.resolve().name for path in models]
    called = names or [short if last.count(short) == 1 else str(path) for short, path in zip(last, models, strict=True)]
    found: list[Subject] = []
    for path, name in zip(models, called, strict=True):
        for ema in {"live": [False], "ema": [True], "both": [False, True]}[weights]:
            info = open_model(path, ema=ema)[1]
            label = f"{name} (EMA)" if info.ema else name
            if any(label == subject.name for subject in found):
                raise UserError(f"two models are called {label}: give different --names, and each model once")
            found.append(Subject(name=label, info=info, sha256=sha256(info.source)))
    return found


def open_subject(subject: Subject) -> Transformer:
    """The network, float32 on the CPU.

    Raises:
        UserError: its file is another by now, as a run's is after a checkpoint.
    """
    model, _ = open_model(subject.info.source)
    if sha256(subject.info.source) != subject.sha256:
        raise UserError(
            f"{subject.info.source} has changed since this call began: its run goes on; probe a copy, or wait for its end"
        )
    return model


@dataclass(frozen=True, kw_only=True)
class Probed:
    """One layer of some weights, probed."""

    subject: Subject
    result: ProbeResult


def accuracy_table(probed: Sequence[Probed]) -> tuple[list[str], list[list[str]]]:
    """Header and rows for print_table: accuracies in %, a row for each layer of each weights, a column for each step."""
    mean = probed[0].result.mean_top1 is not None
    header = ["accuracy (%) at step", "layer", "", *map(str, probed[0].result.steps), *(["mean"] if mean else [])]
    rows: list[list[str]] = []
    for each in probed:
        result = each.result
        for label, shares, of_mean in (
            ("top-1", result.top1, result.mean_top1),
            ("top-5", result.top5, result.mean_top5),
        ):
            if shares is not None:
                all_shares = [*shares, *([] if of_mean is None else [of_mean])]
                rows.append([each.subject.name, str(result.layer), label, *(f"{100 * s:.1f}" for s in all_shares)])
    return header, rows


def describe_cache(cache: FeatureCache) -> str:
    """What came from the cache and what went there."""
    total = cache.reused + cache.written
    if cache.reused == total:
        return f"all features read from {cache.folder}"
    reused = f"{cache.reused} of {total} feature files read from it, " if cache.reused else ""
    return f"{reused}{cache.written} feature {'file' if cache.written == 1 else 'files'} kept in {cache.folder}"


def accuracy_figure(probed: Sequence[Probed], method: ProbeMethod) -> Drawing:
    """Top-1 accuracies in %: over the tokens read, a line for each layer of each weights, or, where they are more than there
    are colours, over the layers after the last step, a line for each weights.
    """
    sweep = len(probed) > len(COLOURS)
    several = len({each.result.layer for each in probed}) > 1
    series: dict[str, tuple[list[float], list[float]]] = {}
    for each in probed:
        result = each.result
        label = f"{each.subject.name}, layer {result.layer}" if several and not sweep else each.subject.name
        xs, ys = series.setdefault(label, ([], []))
        xs += [result.layer] if sweep else result.steps
        ys += [100 * share for share in (result.top1[-1:] if sweep else result.top1)]
    steps, name = probed[0].result.steps, NAMES[method.name]
    return line_chart(
        series,
        name=f"accuracy of a {name}, by {'layer' if sweep else 'step'}",
        x="layer" if sweep else "tokens read",
        y=f"accuracy (%)\n{name}" + (f"\nafter {steps[-1]} tokens" if sweep else ""),
        x_ticks=sorted({x for xs, _ in series.values() for x in xs}) if sweep else steps,
    )


def describe_probes(
    probed: Sequence[Probed],
    train_store: TokenStore,
    test_store: TokenStore,
    train_crops: Sequence[int] | None,
    method: ProbeMethod,
    dtype: torch.dtype,
    stored: str,
) -> dict[str, Any]:
    """All results, and all that identifies them, as plain JSON values (docs/formats.md)."""
    own = asdict(method.config) if method.name == "mae" else {"penalty": method.penalty}
    crops = range(len(train_store.meta.crops)) if train_crops is None else train_crops
    return {
        "format_version": FORMAT_VERSION,
        "method": NAMES[method.name],
        "settings": {
            **own,
            "mean_over_steps": method.mean_over_steps,
            "train_crops": list(crops),
            "dtype": str(dtype).removeprefix("torch."),
            "cache_dtype": stored,
        },
        "classes": len(train_store.meta.class_names),
        "train": train_store.describe(),
        "test": test_store.describe(),
        "results": [
            {
                "model": each.subject.name,
                "weights": {
                    "file": str(each.subject.info.source),
                    "sha256": each.subject.sha256,
                    "ema": each.subject.info.ema,
                    "step": each.subject.info.step,
                },
                **{key: value for key, value in asdict(each.result).items() if key != "method"},
            }
            for each in probed
        ],
        "environment": describe(),
    }
