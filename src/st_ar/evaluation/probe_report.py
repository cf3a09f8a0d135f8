"""Probes of several models beside one another: what is read of each, and their table, JSON and figure."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from st_ar.data.store import TokenStore
from st_ar.errors import UserError
from st_ar.evaluation.feature_cache import FeatureCache
from st_ar.evaluation.hidden import Reading
from st_ar.evaluation.probe import ProbeMethod, ProbeResult, choose_reading
from st_ar.evaluation.shallow import NAMES
from st_ar.evaluation.subjects import Subject, check_store
from st_ar.figures import COLOURS, Drawing, line_chart
from st_ar.hardware import describe

FORMAT_VERSION = 1


def choose_subjects_reading(
    subject: Subject,
    train_store: TokenStore,
    test_store: TokenStore,
    layers: Sequence[int] | Literal["all"],
    steps: Sequence[int],
    train_crops: Sequence[int] | None,
    dtype: torch.dtype,
) -> Reading:
    """What is read of a model; no layers or steps stand for those that `choose_reading` takes by default.

    Raises:
        UserError: as `choose_reading` and `check_store`; or a model that has never been trained without its condition,
            whose null condition means nothing.
    """
    chosen = range(1, subject.info.config.n_layers + 1) if isinstance(layers, str) else layers
    reading, _ = choose_reading(
        subject.info.config,
        train_store,
        test_store,
        layers=chosen or None,
        steps=steps or None,
        train_crops=train_crops,
        dtype=dtype,
    )
    for store in (train_store, test_store):
        check_store(subject.info, store)
    if subject.info.class_dropout == 0:
        raise UserError(
            f"{subject.info.source} was trained with --class-dropout 0 and knows no null class, which probes give it so that no "
            "label leaks: train with --class-dropout above 0"
        )
    return reading


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
    """Top-1 accuracies in %: over the tokens read, a line for each layer of each weights, or, where several layers make
    more of them than there are colours, over the layers after the last step, a line for each weights.
    """
    several = len({each.result.layer for each in probed}) > 1
    sweep = several and len(probed) > len(COLOURS)
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
            "test_crop": test_store.meta.crops[test_store.center],
            "dtype": str(dtype).removeprefix("torch."),
            "cache_dtype": stored,
        },
        "classes": len(train_store.meta.class_names),
        "train": train_store.describe(),
        "test": test_store.describe(),
        "results": [
            {
                "model": each.subject.name,
                "weights": each.subject.describe(),
                **{key: value for key, value in asdict(each.result).items() if key != "method"},
            }
            for each in probed
        ],
        "environment": describe(),
    }
