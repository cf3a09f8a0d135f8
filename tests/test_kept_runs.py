"""benchmarks/collect.py and kept_runs.py: what is kept of runs, one table of all, and the pages' own tables against it."""

import importlib
import json
import re
import statistics
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from matplotlib.text import Text

from st_ar.reproduce.paper import CONTROL
from tests.ranks import ROOT

ST_AR = "+ MIM + step + view (ST-AR)"


@pytest.fixture
def kept_runs(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("kept_runs")


def keep(folder: Path, run: str, *, probe: float, distance: float, loss: float, test: str = "the test store") -> None:
    """What `reproduce` leaves of a run, as far as it is read; the probe has half as much after the first of two steps."""
    files: dict[str, dict[str, Any]] = {
        "probe": {"test": {"fingerprint": test}, "results": [{"steps": [8, 64], "top1": [probe / 2, probe]}]},
        "likelihood": {"store": {"fingerprint": test}, "results": [{"loss": loss}]},
        "unguided.evaluation": {
            "reference": {"sha256": "theirs"},
            "metrics": {"FD-Network": distance, "precision (Network)": 0.75, "recall (Network)": 0.5},
        },
    }
    for kind, said in files.items():
        (folder / f"{run}-{kind}.json").write_text(json.dumps(said))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    keep(tmp_path, "st-ar-b-50-epochs-seed0", probe=0.5, distance=6.0, loss=3.75)
    keep(tmp_path, "ar-b-50-epochs-2-views-seed0", probe=0.25, distance=3.0, loss=3.5)
    keep(tmp_path, "ar-b-50-epochs-2-views-seed2", probe=0.375, distance=5.0, loss=3.25)
    keep(tmp_path, "ar-b-50-epochs-2-views-seed2-ema", probe=0.125, distance=7.0, loss=3.0)
    keep(tmp_path, "ar-l-50-epochs-2-views-seed0", probe=0.625, distance=2.0, loss=3.0)
    keep(tmp_path, "of-no-table-seed0", probe=0.625, distance=2.0, loss=3.0)
    return tmp_path


def test_runs_have_their_tables_labels_and_order_and_every_seed_counts(kept_runs: ModuleType, folder: Path) -> None:
    rows = kept_runs.read(folder)
    assert [(label, list(seeds)) for label, seeds in rows.items()] == [
        (CONTROL.label, [0, 2]),
        (f"{CONTROL.label}, EMA weights", [2]),
        (ST_AR, [0]),
        (f"{CONTROL.label}, size L", [0]),
        ("of-no-table", [0]),
    ]
    steps = {"probe by step, % 00008": 12.5, "probe by step, % 00064": 25.0}
    assert rows[CONTROL.label][0] == {"FD": 3.0, "precision": 0.75, "recall": 0.5, "validation loss": 3.5} | steps
    deviation = statistics.stdev([3.0, 5.0])
    assert kept_runs.spread(rows[CONTROL.label], "FD", 2) == f"4.00 ± {deviation:.2f}"
    assert kept_runs.spread(rows[ST_AR], "FD", 2) == "6.00"


def test_class_accuracy_is_in_percent_and_guided_samples_have_columns_of_their_own(
    kept_runs: ModuleType, folder: Path
) -> None:
    for scale, accuracy in (("1", 0.625), ("1.5", 0.875)):
        metrics = {"class accuracy (classifier)": accuracy, "FD-classifier": 2.5, "IS-classifier": 8.0}
        said = {"reference": {"sha256": "theirs"}, "metrics": metrics}
        (folder / f"st-ar-b-50-epochs-seed1-guidance-{scale}.evaluation.json").write_text(json.dumps(said))
    assert kept_runs.read(folder)[ST_AR][1] == {
        "class accuracy": 62.5,
        "FD": 2.5,
        "IS": 8.0,
        "class accuracy, guidance 1.5": 87.5,
        "FD, guidance 1.5": 2.5,
    }


def test_gains_and_costs_are_over_the_controls_mean(
    kept_runs: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: dict[str, Any] = {}
    draw = kept_runs.line_chart
    monkeypatch.setattr(kept_runs, "line_chart", lambda series, **rest: (drawn.update(series), draw(series, **rest))[1])
    kept_runs.cost(kept_runs.read(folder), folder / "cost.svg")
    distances, probes = drawn[CONTROL.label]
    assert distances == pytest.approx([-25.0, 25.0])
    assert probes == pytest.approx([-6.25, 6.25])
    distances, probes = drawn[ST_AR]
    assert distances == pytest.approx([50.0])
    assert probes == pytest.approx([18.75])
    assert "<svg" in (folder / "cost.svg").read_text()


def test_gains_in_class_accuracy_are_over_the_control_of_the_same_folder(
    kept_runs: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for recipe, accuracy in (("st-ar-b-50-epochs", 0.5), ("ar-b-50-epochs-2-views", 0.375)):
        said = {"reference": {"sha256": "theirs"}, "metrics": {"class accuracy (classifier)": accuracy}}
        (folder / f"{recipe}-seed0-guidance-1.evaluation.json").write_text(json.dumps(said))
    drawn: dict[str, Any] = {}
    draw = kept_runs.line_chart
    monkeypatch.setattr(kept_runs, "line_chart", lambda series, **rest: (drawn.update(series), draw(series, **rest))[1])
    rows = kept_runs.read(folder)
    kept_runs.class_gains({"classes-mnist": rows, "other": rows}, folder / "gains.svg")
    for where in ("MNIST", "other"):
        assert drawn[f"{CONTROL.label} on {where}"] == ([0.0], [0.0])  # the seed without a class accuracy is no point
        assert drawn[f"{ST_AR} on {where}"] == ([25.0], [12.5])
    assert ">ST-AR on MNIST<" in (folder / "gains.svg").read_text()


def drawn_costs() -> dict[str, tuple[list[float], list[float]]]:
    """The points of docs/images/cifar10-cost.svg."""
    series = json.loads((ROOT / "docs/images/cifar10-cost.json").read_text())["series"]
    return {label: (found["x"], found["y"]) for label, found in series.items()}


@pytest.mark.parametrize(
    "series",
    [drawn_costs(), {f"one of nine rows, {n}": ([n % 3, 50], [n // 3, n]) for n in range(9)}],
    ids=["docs", "grid"],
)
def test_labels_beside_points_cover_neither_points_nor_each_other(
    kept_runs: ModuleType, series: dict[str, tuple[list[float], list[float]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("point_labels.ORDERS", 4)
    figure = kept_runs.draw_costs(series).figure
    figure.draw_without_rendering()
    [axes] = figure.axes
    boxes = [Text.get_window_extent(text) for text in axes.texts]  # an annotation's own has its leader too
    labels = [" ".join(text.get_text().split()) for text in axes.texts]
    assert sorted(labels) == sorted(kept_runs.SHORT.get(label, label) for label in series)
    points = {
        kept_runs.SHORT.get(label, label): axes.transData.transform(list(zip(*found, strict=True)))
        for label, found in series.items()
    }
    for label, box in zip(labels, boxes, strict=True):
        assert not any(box.overlaps(other) for other in boxes if other is not box), label
        assert not any(box.contains(*point) for found in points.values() for point in found), label
        away = [np.hypot(*(np.clip(point, box.min, box.max) - point)) for point in points[label]]
        assert min(away) < 130, label


def test_figures_show_live_weights_at_the_end_and_of_them_what_is_asked_for(
    kept_runs: ModuleType, folder: Path
) -> None:
    keep(folder, "ar-b-50-epochs-2-views-seed0-step750", probe=0.125, distance=7.0, loss=3.0)
    rows = kept_runs.read(folder)
    assert f"{CONTROL.label}, after 750 steps" in rows
    assert list(kept_runs.chosen(rows, ())) == [CONTROL.label, ST_AR, f"{CONTROL.label}, size L", "of-no-table"]
    assert kept_runs.chosen(rows, [ST_AR, CONTROL.label]) == {label: rows[label] for label in (ST_AR, CONTROL.label)}
    with pytest.raises(SystemExit, match=r"there is no row 'nobody'; there are 'AR, 2 views \(control\)', "):
        kept_runs.chosen(rows, ["nobody"])


def test_rows_without_a_figure_are_refused_and_with_one_drawn(
    kept_runs: ModuleType,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "results" / "kept").mkdir(parents=True)
    (tmp_path / "results" / "kept" / "runs").symlink_to(folder)
    monkeypatch.setattr(kept_runs, "RESULTS", tmp_path / "results")
    asked = ["kept_runs.py", "kept", "--rows", ST_AR]
    monkeypatch.setattr("sys.argv", asked)
    with pytest.raises(SystemExit):
        kept_runs.main()
    assert "--rows says what a figure shows: give --cost, --curves or --classes" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", [*asked, "--curves", str(tmp_path / "probe.svg")])
    kept_runs.main()
    assert f"| {ST_AR} | 1 | 6.00 | 0.750 | 0.500 | 3.750 | 25.0 50.0 |" in capsys.readouterr().out
    drawn = (tmp_path / "probe.svg").read_text()
    assert "ST-AR" in drawn
    assert CONTROL.label not in drawn


@pytest.mark.parametrize("tables", [True, False])
def test_runs_are_kept_with_or_without_the_table_that_they_were_made_for(
    kept_runs: ModuleType, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, tables: bool
) -> None:
    collect, work, results = importlib.import_module("collect"), tmp_path / "work", tmp_path / "results"
    made = "ar-b-50-epochs-2-views-seed0"
    for run in (made, "ar-b-50-epochs-2-views-seed2"):  # the second was made for another table
        (work / "runs" / run).mkdir(parents=True)
        (work / "runs" / run / "config.json").write_text(json.dumps({"tokens": f"{work}/tokens"}))
        (work / "runs" / run / "log.jsonl").write_text("")
        keep(work / "runs", run, probe=0.25, distance=3.0, loss=3.5)
    said = {"reference": {"sha256": "theirs"}, "metrics": {"class accuracy (classifier)": 0.5}}
    (work / "runs" / f"{made}-guidance-2.evaluation.json").write_text(json.dumps(said))
    (work / "classifier").mkdir()
    (work / "classifier" / "config.json").write_text("{}")
    (work / "evidence.json").write_text(json.dumps({"commands": [["train", "preset", "--out", f"{work}/runs/{made}"]]}))
    options = ["--name", "kept", "--runs", *([] if tables else ["--no-tables"])]
    monkeypatch.setattr(collect, "RESULTS", results)
    monkeypatch.setattr("sys.argv", ["collect.py", str(work), "evidence", *options])
    collect.main()
    assert (results / "kept" / "evidence.json").exists() == tables
    assert json.loads((results / "kept" / "runs" / made / "config.json").read_text()) == {"tokens": "kept/tokens"}
    first = kept_runs.read(folder)[CONTROL.label][0] | {"class accuracy, guidance 2": 50.0}
    assert kept_runs.read(results / "kept" / "runs") == {CONTROL.label: {0: first}}
    assert (results / "kept" / "classifier.json").exists()


def test_what_was_measured_on_something_else_is_refused(kept_runs: ModuleType, folder: Path) -> None:
    keep(folder, "st-ar-b-50-epochs-seed1", probe=0.5, distance=6.0, loss=3.75, test="another")
    with pytest.raises(SystemExit, match=r"st-ar-b-50-epochs-seed1-\w+\.json and .* were not measured on the same"):
        kept_runs.read(folder)


def test_a_folder_without_measurements_says_what_keeps_them(kept_runs: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"holds no measurements: benchmarks/collect\.py --runs keeps them"):
        kept_runs.read(tmp_path)


def numbers(text: str) -> list[str]:
    """Means, and deviations where there are some."""
    return re.findall(r"\d+\.\d+", text)


def page_rows(headings: str, *pages: str) -> list[list[str]]:
    """The numbers of each row of the pages' tables that have these headings."""
    text = "\n".join((ROOT / "docs" / "results" / name).read_text() for name in pages)
    tables = [part for part in text.split("\n\n") if part.startswith("|") and headings in part.splitlines()[0]]
    lines = [line.split("|", 2)[2] for table in tables for line in table.splitlines()[2:]]  # labels have numbers too
    return [numbers(line) for line in lines]


def agree(said: list[str], measured: list[str]) -> bool:
    """Every number of a row is one of the kept, as far as it is told."""
    pairs = zip(said, measured, strict=False)  # a row may say more than is kept here
    return all(abs(float(a) - float(b)) <= 0.5001 * 10 ** -len(a.partition(".")[2]) for a, b in pairs)


def test_the_pages_tables_are_what_was_kept(kept_runs: ModuleType) -> None:
    """Each row of CIFAR-10's pages is one of the kept, and each kept one of k-means tokens has its row there."""
    headings = "| FD-EfficientNet-Lite0 | precision | recall | validation loss | probe, last step, % |"
    rows = page_rows(headings, "cifar10.md", "appendix.md")
    kept = {}
    for name in ("cifar10-kmeans", "cifar10-kmeans-l", "cifar10-kmeans-longer", "cifar10-kmeans-16", "cifar10"):
        measured = kept_runs.read(kept_runs.RESULTS / name / "runs")
        shown = ("FD", "precision", "recall", "validation loss")
        columns = {column: kept_runs.COLUMNS[column] for column in shown} | {kept_runs.probe_columns(measured)[-1]: 1}
        texts = [
            [kept_runs.spread(seeds, of, digits + 2) for of, digits in columns.items()] for seeds in measured.values()
        ]
        kept[name] = [numbers(" ".join(text)) for text in texts if "-" not in text]
    assert len(rows) > 20
    assert [row for row in rows if not any(agree(row, measured) for found in kept.values() for measured in found)] == []
    for measured in (measured for name, found in kept.items() if "kmeans" in name for measured in found):
        assert any(agree(row, measured) for row in rows), measured


@pytest.mark.parametrize(
    ("headings", "columns", "folders"),
    [
        (
            "| class accuracy, % | FD-classifier | IS-classifier | precision | recall |",
            ("class accuracy", "FD", "IS", "precision", "recall"),
            ("classes-mnist", "classes-cifar10", "classes-characters"),
        ),
        (
            "| guidance 1.5 | class accuracy, % | FD-classifier |",
            ("class accuracy, guidance 1.5", "FD, guidance 1.5"),
            ("classes-mnist", "classes-cifar10", "classes-characters"),
        ),
        (
            "| class accuracy, % | FD-classifier | guidance 1.5: class accuracy, % | FD-classifier |",
            ("class accuracy", "FD", "class accuracy, guidance 1.5", "FD, guidance 1.5"),
            ("classes-mnist-1500", "classes-cifar10-4000"),
        ),
    ],
)
def test_the_tables_of_class_fidelity_are_what_was_kept(
    kept_runs: ModuleType, headings: str, columns: tuple[str, ...], folders: tuple[str, ...]
) -> None:
    rows = page_rows(headings, "class-fidelity.md")
    measured = [seeds for name in folders for seeds in kept_runs.read(kept_runs.RESULTS / name / "runs").values()]
    texts = [[kept_runs.spread(seeds, column, 5) for column in columns] for seeds in measured]
    kept = [numbers(" ".join(text)) for text in texts if "-" not in text]
    assert len(rows) == len(kept) > 0
    assert [row for row in rows if not any(len(row) == len(each) and agree(row, each) for each in kept)] == []
