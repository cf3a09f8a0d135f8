"""`st-ar reproduce` from end to end on a small folder of images, and what it refuses."""

import csv
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from st_ar.cli import run_command
from st_ar.cli.projects import Reproduce
from st_ar.errors import UserError
from st_ar.reproduce import page
from st_ar.reproduce.page import show
from st_ar.reproduce.paper import CONTROL, EXPERIMENTS, SCALES, Name, Row, Size
from st_ar.reproduce.plan import Data, Plan, run_stages
from st_ar.training.run import read_log
from tests.disk import contents

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of 30 pictures, told apart by their colour."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for number, name in enumerate(("blue", "green", "red")):
        (folder / name).mkdir()
        for index in range(30):
            pixels = rng.integers(0, 200, (36, 36, 3))
            pixels[..., 2 - number] += 55
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def tokenizer(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    run_command(["train-tokenizer", "kmeans", "--images", f"folder:{images}", "--size", "32", "--out", str(out)])
    return out


@pytest.fixture
def known_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """The speed of this machine, which a dry run measures for some seconds."""
    monkeypatch.setattr(page, "training_rate", lambda _: 1e12)


def test_a_figure_is_made_beside_the_papers_numbers_and_made_once(
    images: Path, tokenizer: Path, tmp_path: Path, capsys: Capture
) -> None:
    out, source = tmp_path / "work", f"folder:{images}"
    names = {
        "AR, 2 views (control)": "ar-b-50-epochs-2-views",
        "AR, 2 views, for the time of ST-AR": "ar-b-50-epochs-2-views-equal-time",
        "ST-AR": "st-ar-b-50-epochs",
    }
    asked = ["fig4", "--steps", "1", "--seeds", "0", "1", "--out", str(out)]
    asked += ["--data", source, "--test-data", source, "--tokenizer", str(tokenizer)]
    wanted = [*asked, "--rows", *names]
    run_command(["reproduce", *wanted])
    said = capsys.readouterr().out
    rows = list(csv.reader((out / "fig4.csv").read_text().splitlines()))
    assert [row[0] for row in rows[1:]] == list(names)
    assert rows[0] == ["", "paper: probe, %", "probe, last step (%)", "tokens read (M)", "training (min)"]
    assert [row[1] for row in rows[1:]] == ["-", "-", "45.27"]
    found = json.loads((out / "fig4.json").read_text())
    for label, run in names.items():
        probes = [json.loads((out / "runs" / f"{run}-seed{seed}-probe.json").read_text()) for seed in (0, 1)]
        last = [100 * probe["results"][0]["top1"][-1] for probe in probes]
        measured = found["measured"][label]["probe, last step (%)"]
        assert measured["values"] == pytest.approx(last)
        assert measured["deviation"] == pytest.approx(statistics.stdev(last))
        logs = [read_log(out / "runs" / f"{run}-seed{seed}" / "log.jsonl") for seed in (0, 1)]
        tokens = [log[-1]["step"] * 64 * 2 * 64 for log in logs]
        assert found["measured"][label]["tokens read (M)"]["values"] == pytest.approx([count / 1e6 for count in tokens])
        minutes = [count / log[-1]["tokens_per_second"] / 60 for count, log in zip(tokens, logs, strict=True)]
        assert found["measured"][label]["training (min)"]["values"] == pytest.approx(minutes)
        assert f"{statistics.mean(last):.1f} ± {statistics.stdev(last):.1f}" in said
    assert "2 seeds: mean ± standard deviation" in said
    assert said.count("\nst-ar train ") == 6
    assert "<svg" in (out / "fig4.html").read_text()
    assert json.loads((out / "fig4-probe.json").read_text())["series"].keys() == names.keys()
    before = contents(out)
    run_command(["reproduce", *wanted])
    assert "st-ar train" not in capsys.readouterr().out
    assert contents(out).keys() == before.keys()
    run_command(["reproduce", *wanted, "--json", "-"])
    assert json.loads(capsys.readouterr().out) == json.loads((out / "fig4.json").read_text())
    with pytest.raises(UserError, match="was made by another command"):
        run_command(["reproduce", *wanted, "--steps", "2"])
    run_command(["reproduce", *asked, "--rows", "ST-AR", "AR, 2 views (control)"])
    assert "st-ar train" not in capsys.readouterr().out
    assert [row[0] for row in csv.reader((out / "fig4.csv").read_text().splitlines())] == [
        "",
        "AR, 2 views (control)",
        "ST-AR",
    ]
    assert json.loads((out / "fig4.json").read_text())["measured"] == {
        label: found["measured"][label] for label in ("AR, 2 views (control)", "ST-AR")
    }


def run_rows(name: Name, rows: Sequence[Row], data: Data, out: Path, *, steps: int, metrics: Sequence[str]) -> Plan:
    """Train and measure some rows of a table, without samples."""
    asked = replace(EXPERIMENTS[name], rows=tuple(rows), metrics=tuple(metrics))
    plan = Plan(asked, SCALES["tiny"], data, out, steps=steps, weights=("live", "ema"))
    run_stages(plan.stages, out, run_command)
    return plan


@pytest.fixture
def data(images: Path, tokenizer: Path) -> Data:
    source = f"folder:{images}"
    fit = {"vocab_size": 256, "num_classes": 3}
    return Data(images=source, test_images=source, tokenizer=tokenizer, fit=fit)


def test_what_a_long_run_is_worth_after_each_quarter_is_a_curve(data: Data, tmp_path: Path, capsys: Capture) -> None:
    rows = EXPERIMENTS["length"].rows[:4]
    plan = run_rows("length", rows, data, tmp_path / "work", steps=4, metrics=["likelihood"])
    capsys.readouterr()
    show("length", plan)
    said = capsys.readouterr().out
    losses = {
        (weights, step): json.loads((plan.work / "runs" / f"{name}-step{step}-{kind}likelihood.json").read_text())
        for name in ["ar-b-50-epochs-2-views-kept-seed0"]
        for weights, kind in ((CONTROL.label, ""), (f"{CONTROL.label}, EMA", "ema-"))
        for step in (1, 2, 3, 4)
    }
    drawn = json.loads((plan.work / "length-loss.json").read_text())["series"]
    assert drawn.keys() == {CONTROL.label, f"{CONTROL.label}, EMA"}
    for weights, curve in drawn.items():
        assert curve["x"] == pytest.approx([step * 64 * 2 * 64 / 1e6 for step in (1, 2, 3, 4)])
        expected = [losses[weights, step]["results"][0]["loss"] for step in (1, 2, 3, 4)]
        assert curve["y"] == pytest.approx(expected)
        assert len(set(expected)) == 4
    assert "AR, 2 views (control), after 3/4" in said
    assert "<svg" in (plan.work / "length.html").read_text()


@pytest.mark.slow
def test_what_rows_look_at_is_a_table_of_its_own(data: Data, tmp_path: Path, capsys: Capture) -> None:
    assert "attention" in EXPERIMENTS["evidence"].metrics
    plan = run_rows("evidence", [CONTROL], data, tmp_path / "work", steps=1, metrics=["attention"])
    out = plan.work
    capsys.readouterr()
    show("evidence", plan)
    said = capsys.readouterr().out
    looks = said[said.index("Attention of the layer at half depth") :].splitlines()
    assert looks[2].split("  ")[-1].strip() == "entropy (nats), EMA"
    layers = json.loads((out / "runs" / "ar-b-50-epochs-2-views-seed0-attention" / "statistics.json").read_text())
    (model,) = layers["models"].values()
    half = model["layers"]["2"]["over_heads"]["mean"]
    row = next(line for line in looks if line.startswith(CONTROL.label))
    assert f"{half['class_weight']:.3f}" in row
    assert f"{half['distance']:.2f}" in row
    text = (out / "evidence.html").read_text()
    assert text.count("<table") == 2
    assert "On the class: weight on the class position" in text
    assert (out / "evidence.csv").read_text().count("attention at half depth: distance (tokens), EMA") == 1


def test_a_dry_run_makes_nothing_and_says_what_it_would_cost(
    tmp_path: Path, capsys: Capture, request: pytest.FixtureRequest
) -> None:
    run_command(["reproduce", "table3", "--out", str(tmp_path / "work"), "--dry-run"])
    said = capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    assert said.count("st-ar train ") == 7
    assert said.count("st-ar evaluate ") == 7
    assert "39 commands" in said
    assert "device-hours" in said
    assert "GB are free" in said
    request.getfixturevalue("known_rate")
    (tmp_path / "work" / "done").mkdir(parents=True)
    for name, seconds in (("tokens-training", 3.0), ("ar-b-50-epochs-1-views-seed0", None)):  # that one was stopped
        mark = {"command": ["train"], "seconds": seconds}
        (tmp_path / "work" / "done" / f"{name}.json").write_text(json.dumps(mark))
    run_command(["reproduce", "table3", "--out", str(tmp_path / "work"), "--dry-run"])
    said = capsys.readouterr().out
    assert said.count("st-ar train ") == 7
    assert "38 commands (1 more are done)" in said


@pytest.mark.usefixtures("known_rate")
def test_full_size_is_planned(tmp_path: Path, capsys: Capture) -> None:
    source = ["--data", "folder:train", "--test-data", "folder:val", "--tokenizer", "vq_ds16_c2i.pt"]
    reference = ["--reference", "VIRTUAL_imagenet256_labeled.npz"]
    where = ["--out", str(tmp_path / "work"), "--dry-run"]
    run_command(["reproduce", "table3", "--scale", "imagenet", *source, *reference, *where])
    said = capsys.readouterr().out
    assert "st-ar train st-ar-b --tokens" in said
    assert "--per-class 50" in said
    assert "--extractor inception" in said
    assert "st-ar reference" not in said


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--scale", "small"], "--scale small needs both --data and --test-data"),
        (["--data", "photos:train"], "--scale tiny needs both --data and --test-data"),
        (
            ["--rows", "AR, 1 view", "ST-AR"],
            "table3 has no row 'ST-AR': give --rows some of 'AR, 1 view', 'AR, 2 views",
        ),
        (["--steps", "0"], "--steps is 0: give at least 1"),
        (["--seeds", "1", "1"], "--seeds must be one or more different numbers"),
        (
            ["--scale", "imagenet", "--steps", "5", "--data", "photos", "--test-data", "photos"],
            "imagenet has the paper's lengths",
        ),
        (["--scale", "imagenet", "--data", "photos", "--test-data", "photos"], "give --tokenizer"),
    ],
)
def test_what_cannot_be_planned_is_refused(tmp_path: Path, given: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run_command(["reproduce", "table3", "--out", str(tmp_path / "work"), *given])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("missing", ["jinja2", "matplotlib"])
def test_a_library_that_draws_the_table_is_missed_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)  # importing it raises
    with pytest.raises(UserError, match=missing):
        run_command(["reproduce", "fig4", "--steps", "1", "--out", str(tmp_path / "work")])
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_table_of_another_size_has_files_of_its_own(images: Path, tmp_path: Path, capsys: Capture) -> None:
    out, source = tmp_path / "work", f"folder:{images}"
    control = "AR, 2 views (control)"
    wanted = ["fig4", "--steps", "1", "--rows", control, "--data", source, "--test-data", source, "--out", str(out)]
    run_command(["reproduce", *wanted])
    of_b = (out / "fig4.json").read_text()
    run_command(["reproduce", *wanted, "--size", "L", "--json", str(tmp_path / "table.json")])
    assert "Figure 4: linear probing over the steps, size L" in capsys.readouterr().out
    assert (out / "fig4.json").read_text() == of_b
    assert (tmp_path / "table.json").read_text() == (out / "fig4-l.json").read_text()
    run = json.loads((out / "runs" / "ar-l-50-epochs-2-views-seed0" / "config.json").read_text())
    assert [run["config"]["model"][key] for key in ("dim", "n_layers", "n_heads")] == [192, 6, 6]


@pytest.mark.parametrize("size", ["L", "XL"])
def test_half_the_depth_is_that_at_every_size(tmp_path: Path, size: Size) -> None:
    rows = Reproduce(what="table5", out=tmp_path, size=size)._experiment().rows
    configs = [SCALES["imagenet"].config(row.recipe, 0)[1] for row in rows]
    depth = configs[0].model.n_layers
    assert [config.selfguided.layer(depth) for config in configs] == [depth // 4, depth // 2, 3 * depth // 4, depth]


def test_a_size_shows_no_numbers_of_the_papers_b(tmp_path: Path) -> None:
    chosen = Reproduce(what="table3", out=tmp_path, size="XL")._experiment()
    assert [(row.recipe.size, row.paper) for row in chosen.rows] == [("XL", {})] * len(EXPERIMENTS["table3"].rows)


@pytest.mark.parametrize("what", ["table1", "table2"])
def test_a_table_that_compares_sizes_has_no_other(what: Name, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{what} compares sizes: leave out --size"):
        run_command(["reproduce", what, "--size", "L", "--out", str(tmp_path), "--dry-run"])
