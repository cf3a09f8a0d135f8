"""What the commands have found, read from the files that they left."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from st_ar.comparison import Spread
from st_ar.errors import UserError
from st_ar.evaluation.attention import STATISTICS
from st_ar.evaluation.attention_report import COLUMNS
from st_ar.files import read_json
from st_ar.settings import fits
from st_ar.training.log import read_log
from st_ar.training.run import seconds_per_step, trained_config

TOKENS, TIME = "tokens read (M)", "training (min)"
"""The two budgets."""

ATTENTION = "attention at half depth"
"""What the names of its numbers begin with."""

Weights = Literal["live", "ema"]


@dataclass(frozen=True, kw_only=True)
class Files:
    """Where a row's numbers come from: one of each for each seed."""

    share: float = 1.0
    """How much of its runs a row stands for."""
    runs: list[Path] = field(default_factory=list)
    evaluations: dict[Weights, list[Path]] = field(default_factory=dict)
    probes: dict[Weights, list[Path]] = field(default_factory=dict)
    likelihoods: dict[Weights, list[Path]] = field(default_factory=dict)
    attentions: dict[Weights, list[Path]] = field(default_factory=dict)


def measurements(files: Files, metrics: Sequence[str]) -> dict[str, Spread]:
    """A row's numbers: what `evaluate` calls them, probe accuracy at the last step in per cent, validation loss, what the layer at
    half depth looks at, both budgets.

    metrics: those of the paper's table; of an evaluation, the distance and those among them.
    """
    found: dict[str, list[float]] = {}

    def add(name: str, weights: Weights, value: float) -> None:
        found.setdefault(name + (", EMA" if weights == "ema" else ""), []).append(value)

    for weights, paths in files.evaluations.items():
        for path in paths:
            numbers = read_json(path, "an evaluation").get("metrics")
            if not fits(numbers, dict[str, float]):
                raise UserError(f"{path} has no metrics that are numbers: remove it, and the evaluation is made again")
            for name, value in numbers.items():
                if name.startswith("F") or name.split(" ")[0].lower() in metrics:  # FID, FD-..
                    add(name, weights, value)
    for weights, paths in files.probes.items():
        for path in paths:
            add("probe, last step (%)", weights, 100 * probe_curve(path)[1][-1])
    for weights, paths in files.likelihoods.items():
        for path in paths:
            add("validation loss", weights, likelihood(path))
    for weights, paths in files.attentions.items():
        for path in paths:
            for name, value in attention(path).items():
                add(f"{ATTENTION}: {name}", weights, value)
    for run in files.runs:
        tokens, seconds = budgets(run)
        found.setdefault(TOKENS, []).append(files.share * tokens / 1e6)
        found.setdefault(TIME, []).append(files.share * seconds / 60)
    return {name: Spread(tuple(values)) for name, values in found.items()}


def probe_curve(path: Path) -> tuple[list[float], list[float]]:
    """Tokens read, and the share of right guesses after each."""
    result = _first_result(path, "a probe")
    steps, shares = result.get("steps"), result.get("top1")
    if not fits(steps, list[float]) or not fits(shares, list[float]) or not 0 < len(steps) == len(shares):
        raise UserError(f"{path} has no shares of right guesses by step: remove it, and the probe is made again")
    return list(map(float, steps)), list(map(float, shares))


def likelihood(path: Path) -> float:
    """The validation loss."""
    loss = _first_result(path, "a likelihood").get("loss")
    if not fits(loss, float):
        raise UserError(f"{path} has no loss: remove it, and it is measured again")
    return float(loss)


def attention(folder: Path) -> dict[str, float]:
    """What the layer at half depth looks at, averaged over heads and images, as the columns of `st-ar attention` name it."""
    path = folder / "statistics.json"
    models = read_json(path, "what `st-ar attention` has written").get("models")
    layers = next(iter(models.values())).get("layers") if fits(models, dict[str, dict[str, Any]]) and models else None
    if fits(layers, dict[str, dict[str, Any]]):
        found: Any = layers.get(str(max(1, len(layers) // 2)), {}).get("over_heads", {})
        means: Any = found.get("mean") if isinstance(found, dict) else None
        if fits(means, dict[str, float]) and set(STATISTICS) <= set(means):
            return {column: float(means[name]) for column, name in zip(COLUMNS, STATISTICS, strict=True)}
    raise UserError(f"{path} has no statistics of a layer: remove {folder}, and they are made again")


def _first_result(path: Path, what: str) -> dict[str, Any]:
    results = read_json(path, what).get("results")
    return results[0] if fits(results, list[dict[str, Any]]) and results else {}


def budgets(run: Path) -> tuple[float, float]:
    """Tokens that a run has read, and the seconds that it took for them, by the median of its pace."""
    config, seconds = trained_config(run), seconds_per_step(run)
    steps = read_log(run / "log.jsonl")[-1]["step"]
    return steps * config.batch_size * config.views * config.model.sequence_length, steps * seconds
