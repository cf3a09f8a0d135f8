"""A table of all runs that benchmarks/collect.py has kept in a folder of results, whenever and wherever each was made.

    python benchmarks/kept_runs.py cifar10-kmeans

A line for each recipe and its weights, with the mean and standard deviation over its seeds. Runs of one folder share their
tokenizer and reference, which is checked here.
"""

import argparse
import json
import re
import sys
from collections import defaultdict
from pathlib import Path

from common import RESULTS
from st_ar.comparison import Spread
from st_ar.reproduce.measured import likelihood, probe_curve

NAME = re.compile(
    r"(?P<recipe>.+)-seed\d+(?P<weights>(-step\d+)?(-ema)?)-(?P<kind>probe|likelihood|unguided\.evaluation)\.json"
)
COLUMNS = {"FD": 2, "precision": 3, "recall": 3, "validation loss": 3, "probe, last step, %": 1}


def numbers(path: Path, kind: str) -> dict[str, float]:
    """What a file says."""
    if kind == "probe":
        return {"probe, last step, %": 100 * probe_curve(path)[1][-1]}
    if kind == "likelihood":
        return {"validation loss": likelihood(path)}
    metrics: dict[str, float] = json.loads(path.read_text())["metrics"]
    return {next(column for column in COLUMNS if name.startswith(column)): value for name, value in metrics.items()}


def identity(path: Path, kind: str) -> str:
    """What must be the same in all files of a kind for their numbers to compare."""
    said = json.loads(path.read_text())
    part, key = {"probe": ("test", "fingerprint"), "likelihood": ("store", "fingerprint")}.get(
        kind, ("reference", "sha256")
    )
    return said[part][key]


def main() -> None:
    """Read, check, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="folder below benchmarks/results")
    runs = RESULTS / parser.parse_args().name / "runs"
    rows: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    measured_on: dict[str, tuple[str, str]] = {}
    for path in sorted(runs.glob("*.json")):
        if not (found := NAME.fullmatch(path.name)):
            continue
        recipe, weights, kind = found["recipe"], found["weights"], found["kind"]
        first = measured_on.setdefault(kind, (identity(path, kind), path.name))
        if identity(path, kind) != first[0]:
            sys.exit(f"{path.name} and {first[1]} were not measured on the same: they do not compare")
        for column, value in numbers(path, kind).items():
            rows[recipe + weights.replace("-", ", ")][column].append(value)
    if not rows:
        sys.exit(f"{runs} holds no measurements: benchmarks/collect.py --runs keeps them")
    print(f"| | seeds | {' | '.join(COLUMNS)} |\n|---|---|{'---|' * len(COLUMNS)}")
    for label, row in rows.items():
        cells = [Spread(tuple(row[column])).text(digits) if row[column] else "-" for column, digits in COLUMNS.items()]
        print(f"| {label} | {max(map(len, row.values()))} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
