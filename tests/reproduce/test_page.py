"""What the page reads of other commands' results, and what it refuses."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from st_ar.evaluation.attention import STATISTICS
from st_ar.files import write_json
from st_ar.report import Spread
from st_ar.reproduce.page import make_table
from st_ar.reproduce.plan import Files, measurements, probe_curve
from st_ar.settings import to_dict
from st_ar.training.run import seconds_per_step
from tests.disk import refused
from tests.training.toy_runs import PLAIN_RUN


def write_run(folder: Path, *entries: object) -> Path:
    write_json(folder / "config.json", {"config": to_dict(PLAIN_RUN)})
    (folder / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return folder


def test_seconds_of_a_step_are_the_median_over_the_log(tmp_path: Path) -> None:
    entries = [{"step": step, "tokens_per_second": speed} for step, speed in ((1, 10.0), (2, 96.0), (3, 1000.0))]
    assert seconds_per_step(write_run(tmp_path, *entries)) == 1.0  # 6 images of 16 tokens at 96 tokens a second


def test_steps_after_self_guidance_count_at_their_own_pace(tmp_path: Path) -> None:
    entries = [
        {"step": 10 * n, "tokens_per_second": speed} for n, speed in enumerate((96.0, 96.0, 96.0, 192.0), start=1)
    ]
    run = write_run(tmp_path, *entries)
    assert seconds_per_step(run) == 1.0
    config = replace(PLAIN_RUN, selfguided=replace(PLAIN_RUN.selfguided, until=0.75))
    write_json(run / "config.json", {"config": to_dict(config)})
    assert seconds_per_step(run) == pytest.approx((30 * 1.0 + 10 * 0.5) / 40)


@pytest.mark.parametrize("speed", [None, "fast", 0, -1.0, float("nan"), True])
def test_a_log_without_speeds_is_refused(tmp_path: Path, speed: object) -> None:
    write_run(tmp_path / "run", {"step": 1, "tokens_per_second": 9.0}, {"step": 2, "tokens_per_second": speed})
    with refused(tmp_path, r"log\.jsonl does not say how fast every step was"):
        seconds_per_step(tmp_path / "run")
    write_run(tmp_path / "run")
    with refused(tmp_path, r"log\.jsonl does not say how fast every step was"):
        seconds_per_step(tmp_path / "run")


@pytest.mark.parametrize("metrics", [None, 3, [1], {"FID": None}, {"FID": "3"}, {"FID": float("inf")}])
def test_an_evaluation_without_numbers_is_refused(tmp_path: Path, metrics: object) -> None:
    (tmp_path / "x.json").write_text(json.dumps({"metrics": metrics}))
    with refused(tmp_path, r"x\.json is damaged \(it has no metrics\): remove it"):
        measurements(Files(results={("evaluate", "live"): [tmp_path / "x.json"]}), ["fid"])


def test_a_probes_curve_is_its_first_results(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"results": [{"steps": [2, 9], "top1": [0.25, 0.5]}, {}]})
    assert probe_curve(tmp_path / "x.json") == ([2.0, 9.0], [0.25, 0.5])


@pytest.mark.parametrize(
    "results",
    [
        None,
        [],
        [3],
        {"steps": [1]},
        [{"steps": [], "top1": []}],
        [{"steps": [1, 2], "top1": [0.5]}],
        [{"steps": [1], "top1": [None]}],
    ],
)
def test_a_probe_without_a_curve_is_refused(tmp_path: Path, results: object) -> None:
    write_json(tmp_path / "x.json", {"results": results})
    with refused(tmp_path, r"x\.json is damaged \(it has no accuracy by step\): remove it"):
        probe_curve(tmp_path / "x.json")


@pytest.mark.parametrize(
    "models",
    [
        None,
        {},
        {"run": {}},
        {"run": {"layers": {}}},
        {"run": {"layers": {"1": None}}},
        {"run": {"layers": {"1": {"over_heads": []}}}},
        {"run": {"layers": {"1": {"over_heads": {"mean": {"distance": 1.0}}}}}},
        {"run": {"layers": {"1": {"over_heads": {"mean": dict.fromkeys(STATISTICS)}}}}},
    ],
)
def test_statistics_of_attention_without_numbers_are_refused(tmp_path: Path, models: object) -> None:
    write_json(tmp_path / "statistics.json", {"models": models})
    with refused(tmp_path, r"statistics\.json is damaged \(it has no statistics of a layer\): remove"):
        measurements(Files(results={("attention", "live"): [tmp_path]}), ["attention"])


def test_rows_have_a_dash_for_what_was_not_measured() -> None:
    rows = {"AR": {"FID": Spread((31.351,)), "probe, %": Spread((18.0, 20.0))}, "ST-AR": {"probe, %": Spread((45.27,))}}
    table = make_table(["FID", "probe, %"], rows)
    assert table.columns == ["", "FID", "probe, %"]
    assert table.rows == [["AR", "31.35", "19.0 ± 1.4"], ["ST-AR", "-", "45.3"]]


def test_the_papers_numbers_stand_beside_ours() -> None:
    measured, paper = {"precision": Spread((0.5,))}, {"paper: precision": Spread((0.57,))}
    assert make_table(["paper: precision", "precision"], {"AR": paper | measured}).rows == [["AR", "0.57", "0.500"]]
