"""A table of all runs that benchmarks/collect.py has kept in a folder of results, whenever and wherever each was made.

    python benchmarks/kept_runs.py cifar10-kmeans
    python benchmarks/kept_runs.py cifar10-kmeans --cost docs/images/cifar10-cost.svg
    python benchmarks/kept_runs.py cifar10-kmeans --rows 'AR, 2 views (control)' '+ view' --curves probe.svg
    python benchmarks/kept_runs.py classes-mnist classes-cifar10 --classes docs/images/class-gains.svg

One row per recipe and kind of weights, with the mean and standard deviation over its seeds. All runs of a folder must share their
tokenizer and reference. Figures show the live weights after the last step: each recipe's gain in the probe and cost in FD against the
control, one point per seed, named beside its points; the same for class accuracy and the probe, of one folder or several; and the probe's
accuracy by step.
"""

import argparse
import json
import re
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import get_args

from common import RESULTS
from point_labels import label_points
from st_ar.figures import COLOURS, Drawing, Lines, line_chart
from st_ar.report import Spread
from st_ar.reproduce.paper import CONTROL, EXPERIMENTS, Size, resized
from st_ar.reproduce.plan import likelihood, probe_curve, run_name

NAME = re.compile(
    r"(?P<recipe>.+)-seed(?P<seed>\d+)(-step(?P<step>\d+))?(?P<ema>-ema)?-"
    r"((?P<kind>probe|likelihood)|(unguided|guidance-(?P<scale>[\d.]+))\.evaluation)\.json"
)
COLUMNS = {"class accuracy": 1, "FID": 2, "FD": 2, "IS": 2, "precision": 3, "recall": 3, "validation loss": 3}
"""Columns and their digits. A guided run has the first three with ", guidance SCALE"."""
PROBE = "probe by step, %"
ACCURACY = "class accuracy"
BOTH = "contrast alone, nothing masked"
SHORT = {
    "AR, 2 views, for the time of ST-AR": "AR, 2 views, ST-AR's time",
    "AR, 2 views, for the time of the contrast alone": "AR, 2 views, the contrast's time",
    "AR, 2 views, for the time of the contrast alone in every second step": "AR, 2 views, time of every 2nd step",
    "+ MIM": "MIM",
    "+ step": "inter-step",
    "+ view": "inter-view",
    "+ view, in every second step": "inter-view, every 2nd step",
    "+ MIM + step": "MIM + inter-step",
    "+ MIM + view": "MIM + inter-view",
    "+ MIM + step + view (ST-AR)": "ST-AR",
    "contrast temperature 0.5": "ST-AR, temperature 0.5",
    "contrast temperature 0.5, in the first 80 % of the run": "ST-AR, temperature 0.5, first 80 %",
    BOTH: "both contrasts",
    f"{BOTH}, in the first half of the run": "both, first half",
    f"{BOTH}, in the first 80 % of the run": "both, first 80 %",
    f"{BOTH}, at half the weight": "both, half weight",
    f"{BOTH}, in every second step": "both, every 2nd step",
}
"""Labels in figures, where they are shorter than the tables'."""
TITLES = {
    "classes-mnist": "MNIST",
    "classes-mnist-1500": "MNIST, 1,500 steps",
    "classes-cifar10": "CIFAR-10",
    "classes-cifar10-4000": "CIFAR-10, 4,000 steps",
    "classes-characters": "characters",
}
"""Folders' names in the figure of several."""
AT = " on "
"""Between a row's label and a folder's title."""
PLAIN, CONTRAST, MASKED = COLOURS[:3]
"""Colours in the figure of gains and costs: plain training, contrast alone, with masks and masked image modelling."""
FIRST = ("evidence", "remedies", "cheaper", "questions", "length")  # the order of the rows, and whose labels they have


def labels() -> dict[str, str]:
    """Runs' names without their seeds, and what the tables call them; in the tables' order. After them those of --size."""
    tables = {what: EXPERIMENTS[what].rows for what in (*FIRST, *EXPERIMENTS)}
    named: dict[str, str] = {}
    for row in (row for rows in tables.values() for row in rows):
        named.setdefault(run_name(row.recipe), row.method or row.label)
    of_one_size = {what: rows for what, rows in tables.items() if all(row.recipe.size == "B" for row in rows)}
    for size in get_args(Size):
        for what, row in ((what, row) for what, rows in of_one_size.items() for row in rows):
            named.setdefault(run_name(resized(row.recipe, size, what)), f"{row.method or row.label}, size {size}")
    return named


def numbers(path: Path, kind: str, scale: str = "") -> dict[str, float]:
    """What a file says, by column; of a probe each step, and class accuracy in %."""
    if kind == "probe":
        return {f"{PROBE} {read:05.0f}": 100 * accuracy for read, accuracy in zip(*probe_curve(path), strict=True)}
    if kind == "likelihood":
        return {"validation loss": likelihood(path)}
    metrics: dict[str, float] = json.loads(path.read_text(encoding="utf-8"))["metrics"]
    found = {column: value for name, value in metrics.items() for column in COLUMNS if name.startswith(column)}
    if ACCURACY in found:
        found[ACCURACY] *= 100
    if scale in ("", "1"):
        return found
    return {f"{column}, guidance {scale}": found[column] for column in (ACCURACY, "FID", "FD") if column in found}


def identity(path: Path, kind: str) -> str:
    """What must be the same in all files of a kind for their numbers to compare."""
    said = json.loads(path.read_text(encoding="utf-8"))
    part, key = {"probe": ("test", "fingerprint"), "likelihood": ("store", "fingerprint")}.get(
        kind, ("reference", "sha256")
    )
    return said[part][key]


def read(folder: Path) -> dict[str, dict[int, dict[str, float]]]:
    """Label -> seed -> column -> number, of all runs of a folder, in the tables' order."""
    named = labels()
    found: dict[tuple[int, int, str], dict[int, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    measured_on: dict[str, tuple[str, str]] = {}
    for path in sorted(folder.glob("*.json")):
        if not (part := NAME.fullmatch(path.name)):
            continue
        kind, recipe, step = part["kind"] or "evaluation", part["recipe"], int(part["step"] or 0)
        first = measured_on.setdefault(kind, (identity(path, kind), path.name))
        if identity(path, kind) != first[0]:
            sys.exit(f"{path.name} and {first[1]} were not measured on the same: they do not compare")
        label = named.get(recipe, recipe)
        label += f", after {step:,} steps" if step else ""
        label += ", EMA weights" if part["ema"] else ""
        place = list(named).index(recipe) if recipe in named else len(named)
        found[place, step, label][int(part["seed"])] |= numbers(path, kind, part["scale"] or "")
    if not found:
        sys.exit(f"{folder} holds no measurements: benchmarks/collect.py --runs keeps them")
    return {key[-1]: found[key] for key in sorted(found)}


def spread(seeds: dict[int, dict[str, float]], column: str, digits: int) -> str:
    """Mean and standard deviation over the seeds."""
    values = tuple(measured[column] for measured in seeds.values() if column in measured)
    return Spread(values).text(digits) if values else "-"


def chosen(
    rows: dict[str, dict[int, dict[str, float]]], labels: Sequence[str]
) -> dict[str, dict[int, dict[str, float]]]:
    """What figures show: the rows of the last step's live weights, or of those only the named."""
    ended = {label: seeds for label, seeds in rows.items() if ", after " not in label and "EMA weights" not in label}
    if unknown := [label for label in labels if label not in ended]:
        sys.exit(f"there is no row {unknown[0]!r}; there are {', '.join(map(repr, ended))}")
    return {label: ended[label] for label in labels or ended}


def cost(rows: dict[str, dict[int, dict[str, float]]], target: Path) -> None:
    """Draw the gain and the cost of each recipe."""
    columns = probe_columns(rows)
    if not columns:
        sys.exit("there are no probes to draw")
    draw_costs(above_control(rows, "FD", columns[-1])).save(target)
    print(target)


def above_control(
    rows: dict[str, dict[int, dict[str, float]]], x: str, y: str
) -> dict[str, tuple[list[float], list[float]]]:
    """Each run's two columns above the control's mean, by label: FD in % of it, others as differences."""
    points = {
        label: [(found[x], found[y]) for found in seeds.values() if {x, y} <= found.keys()]
        for label, seeds in rows.items()
    }
    if not points.get(CONTROL.label):
        sys.exit("there is no control to compare with")
    base = [mean(values) for values in zip(*points[CONTROL.label], strict=True)]

    def above(axis: int, column: str, value: float) -> float:
        return 100 * (value / base[axis] - 1) if column == "FD" else value - base[axis]

    return {
        label: ([above(0, x, first) for first, _ in found], [above(1, y, second) for _, second in found])
        for label, found in points.items()
        if found
    }


def draw_costs(series: Lines) -> Drawing:
    """Draw gains over costs."""
    name = "Gain in the probe and cost in FD of each form of self-guidance"
    return draw_points(series, name, x="FD above the control's, %", y="probe, points above the control's")


def class_gains(folders: dict[str, dict[str, dict[int, dict[str, float]]]], target: Path) -> None:
    """Draw the gain in class accuracy over the gain in the probe, of the rows of several folders."""
    series: dict[str, tuple[list[float], list[float]]] = {}
    for name, rows in folders.items():
        columns = probe_columns(rows)
        if not columns or not any(ACCURACY in found for seeds in rows.values() for found in seeds.values()):
            sys.exit(f"{name} has no probes, or no class accuracies")
        found = above_control(rows, columns[-1], ACCURACY)
        series |= {f"{label}{AT}{TITLES.get(name, name)}": points for label, points in found.items()}
    name = "Gain in class accuracy and gain in the probe"
    x, y = "probe, points above the control's", "class accuracy, points above the control's"
    draw_points(series, name, x=x, y=y).save(target)
    print(target)


def draw_points(series: Lines, name: str, x: str, y: str) -> Drawing:
    """Draw runs as points, in colours for plain training, contrasts alone, and masks, and label the rows at their points."""
    drawing = line_chart(series, name=name, x=x, y=y)
    drawing.figure.set_size_inches(5.2, 5.6)
    [axes] = drawing.figure.axes
    axes.legend().remove()
    axes.margins(0.08, 0.15)  # room for labels
    for label, line in zip(series, axes.lines, strict=True):
        colour, marker = look(label)
        line.set(color=colour, marker=marker, linestyle="-", linewidth=1)
    label_points(axes, {short(label): found for label, found in series.items()})
    return drawing


def short(label: str) -> str:
    """A row's name in figures."""
    row, at, where = label.partition(AT)
    return SHORT.get(row, row) + at + where


def look(label: str) -> tuple[str, str]:
    """Colour and marker of a row: plain training, contrast alone, or with masks."""
    if label.startswith("AR, "):
        return PLAIN, "o"
    if label.partition(AT)[0] in ("+ step", "+ view") or label.startswith(BOTH):
        return CONTRAST, "s"
    return MASKED, "^"


def probe_columns(rows: dict[str, dict[int, dict[str, float]]]) -> list[str]:
    """The probe's steps in order."""
    return sorted(
        {column for seeds in rows.values() for found in seeds.values() for column in found if PROBE in column}
    )


def curves(rows: dict[str, dict[int, dict[str, float]]], target: Path) -> None:
    """Draw the probe's accuracy by step, the mean over the seeds."""
    columns = probe_columns(rows)
    if not columns:
        sys.exit("there are no probes to draw")
    read = [float(column.removeprefix(PROBE)) for column in columns]
    series = {
        SHORT.get(label, label): (
            read,
            [mean(found[column] for found in seeds.values() if column in found) for column in columns],
        )
        for label, seeds in rows.items()
        if any(columns[0] in found for found in seeds.values())
    }
    name = "Accuracy of a linear probe by step"
    line_chart(series, name=name, x="step", y="probe, %", x_ticks=read, label_ends=True).save(target)
    print(target)


def main() -> None:
    """Read, check, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", metavar="NAME", help="folder below benchmarks/results")
    parser.add_argument("--rows", nargs="+", default=(), metavar="LABEL", help="what is drawn; all by default")
    parser.add_argument("--cost", type=Path, metavar="FILE.svg", help="draw gain and cost")
    parser.add_argument("--curves", type=Path, metavar="FILE.svg", help="draw the probe's accuracy by step")
    parser.add_argument("--classes", type=Path, metavar="FILE.svg", help="draw gains in class accuracy and the probe")
    given = parser.parse_args()
    if given.rows and not (given.cost or given.curves or given.classes):
        parser.error("--rows says what a figure shows: give --cost, --curves or --classes")
    if len(given.names) > 1 and (given.cost or given.curves):
        parser.error("--cost and --curves draw one folder")
    folders = {name: read(RESULTS / name / "runs") for name in given.names}
    for name, rows in folders.items():
        print_table(rows)
        folders[name] = chosen(rows, given.rows)
    if given.cost:
        cost(folders[given.names[0]], given.cost)
    if given.curves:
        curves(folders[given.names[0]], given.curves)
    if given.classes:
        class_gains(folders, given.classes)


def print_table(rows: dict[str, dict[int, dict[str, float]]]) -> None:
    """Print all rows in Markdown."""
    there = {column for seeds in rows.values() for found in seeds.values() for column in found}
    columns = {
        column: digits for name, digits in COLUMNS.items() for column in sorted(there) if column.split(",")[0] == name
    }
    print(f"| | seeds | {' | '.join(columns)} | {PROBE} |\n|---|---|{'---|' * (len(columns) + 1)}")
    for label, seeds in rows.items():
        cells = [spread(seeds, column, digits) for column, digits in columns.items()]
        curve = " ".join(spread(seeds, column, 1).replace(" ± ", "±") for column in probe_columns({label: seeds}))
        print(f"| {label} | {len(seeds)} | {' | '.join(cells)} | {curve or '-'} |")


if __name__ == "__main__":
    main()
