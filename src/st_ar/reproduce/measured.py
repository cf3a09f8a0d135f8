"""What the commands have found, read from the files that they left."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from st_ar.comparison import Spread
from st_ar.files import read_json
from st_ar.training.log import read_log

TOKENS, TIME = "tokens read (M)", "training (min)"
"""The two budgets."""


@dataclass(frozen=True, kw_only=True)
class Files:
    """Where a row's numbers come from: one of each for each seed."""

    runs: list[Path] = field(default_factory=list)
    evaluations: list[Path] = field(default_factory=list)
    probes: list[Path] = field(default_factory=list)
    likelihoods: list[Path] = field(default_factory=list)


def measurements(files: Files, metrics: Sequence[str]) -> dict[str, Spread]:
    """A row's numbers: what `evaluate` calls them, probe accuracy at the last step in per cent, validation loss, both budgets.

    metrics: those of the paper's table; of an evaluation, the distance and those among them.
    """
    found: dict[str, list[float]] = {}
    for path in files.evaluations:
        for name, value in read_json(path, "an evaluation")["metrics"].items():
            if name.startswith("F") or name.split(" ")[0].lower() in metrics:  # FID, FD-..
                found.setdefault(name, []).append(value)
    for path in files.probes:
        found.setdefault("probe, last step (%)", []).append(100 * probe_curve(path)[1][-1])
    for path in files.likelihoods:
        found.setdefault("validation loss", []).append(read_json(path, "a likelihood")["results"][0]["loss"])
    for run in files.runs:
        tokens, seconds = budgets(run)
        found.setdefault(TOKENS, []).append(tokens / 1e6)
        found.setdefault(TIME, []).append(seconds / 60)
    return {name: Spread(tuple(values)) for name, values in found.items()}


def probe_curve(path: Path) -> tuple[list[float], list[float]]:
    """Tokens read, and the share of right guesses after each."""
    result = read_json(path, "a probe")["results"][0]
    return [float(step) for step in result["steps"]], result["top1"]


def budgets(run: Path) -> tuple[float, float]:
    """Tokens that a run has read, and the seconds that it took for them, by the median of its pace."""
    config = read_json(run / "config.json", "a run")["config"]
    log = read_log(run / "log.jsonl")
    tokens = log[-1]["step"] * config["batch_size"] * config["views"] * config["model"]["grid"] ** 2
    return tokens, tokens / statistics.median(entry["tokens_per_second"] for entry in log)
