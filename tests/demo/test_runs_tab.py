"""A run's history: curves of what was logged, the samples that are there, and runs that have nothing yet."""

import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from st_ar.config import TrainConfig
from st_ar.demo.runs_tab import MAX_POINTS, read_history, read_sample, sample_steps, stamp
from st_ar.errors import UserError
from st_ar.files import write_json
from st_ar.settings import to_dict
from st_ar.training.run import append_log
from tests.toys import TINY


def lines(run: Path, count: int) -> None:
    run.mkdir(exist_ok=True)
    for step in range(1, count + 1):
        entry = {"step": step, "loss_ar": 5.0 / step, "loss_mim": 0.0, "tokens_per_second": 1000.0 + step}
        append_log(run / "log.jsonl", entry)


def test_curves_are_what_was_logged(tmp_path: Path) -> None:
    lines(tmp_path, 5)
    append_log(tmp_path / "log.jsonl", {"step": 5, "validation_loss": 1.5})
    append_log(tmp_path / "log.jsonl", {"step": 6, "loss_ar": 0.5, "ridge_probe_top1": 0.25, "loss_mim": 0.0})
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 7, "los')  # being written
    state, charts = read_history(tmp_path, "mine")
    assert state == "mine: step 6, 1,005 tokens/s; training."
    assert list(charts) == ["loss", "probe"]  # terms that are all 0 are not self-guidance
    series = charts["loss"].data["series"]
    assert series["training"] == {"x": [1, 2, 3, 4, 5, 6], "y": pytest.approx([5, 2.5, 5 / 3, 1.25, 1, 0.5])}
    assert series["validation"] == {"x": [5], "y": [1.5]}
    assert charts["probe"].data["series"] == {"ridge regression, not the MAE protocol": {"x": [6], "y": [25.0]}}


def test_long_logs_are_thinned_and_keep_their_end(tmp_path: Path) -> None:
    lines(tmp_path, 2 * MAX_POINTS + 3)
    xs = read_history(tmp_path, "mine")[1]["loss"].data["series"]["training"]["x"]
    assert len(xs) <= MAX_POINTS
    assert xs[-1] == 2 * MAX_POINTS + 3
    assert set(np.diff(xs)) == {3.0}


def test_a_run_that_stands_still_is_not_said_to_train(tmp_path: Path) -> None:
    lines(tmp_path, 2)
    before = time.time() - 3 * 3600
    os.utime(tmp_path / "log.jsonl", (before, before))
    assert read_history(tmp_path, "mine")[0].endswith("no new log entries for 3 hours.")


@pytest.mark.parametrize(("budget", "total"), [({"steps": 3}, 3), ({"epochs": 2.0}, 20)])  # 20 = 2 * 80 images / 8
def test_the_last_step_of_a_run_is_its_end_however_old(tmp_path: Path, budget: dict[str, float], total: int) -> None:
    config = to_dict(
        replace(TrainConfig(model=TINY, batch_size=8, steps=1), **{"steps": None, "epochs": None} | budget)
    )
    write_json(tmp_path / "config.json", {"config": config, "tokens": {"images": 80}})
    for step, state in ((2, "training"), (total, "finished")):
        append_log(tmp_path / "log.jsonl", {"step": step, "loss_ar": 1.0})
        assert read_history(tmp_path, "mine")[0] == f"mine: step {step} of {total}; {state}."
    os.utime(tmp_path / "log.jsonl", (0, 0))
    assert read_history(tmp_path, "mine")[0].endswith("; finished.")


def test_what_changes_is_seen(tmp_path: Path) -> None:
    seen = [stamp(tmp_path)]
    lines(tmp_path, 1)
    seen.append(stamp(tmp_path))
    (tmp_path / "samples").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "samples" / "step_00000001.png")
    seen.append(stamp(tmp_path))
    assert len(set(seen)) == 3
    assert stamp(tmp_path) == seen[-1]


def test_samples_are_found_by_their_steps(tmp_path: Path) -> None:
    folder = tmp_path / "samples"
    folder.mkdir()
    for step in (10, 2):
        Image.new("RGB", (4, 4), (step, 0, 0)).save(folder / f"step_{step:08d}.png")
    (folder / "step_.png").touch()
    (folder / "other.png").touch()
    (folder / "step_00000012.png").write_bytes(b"cut")
    assert sample_steps(tmp_path) == (2, 10, 12)
    assert read_sample(tmp_path, 10).getpixel((0, 0)) == (10, 0, 0)
    with pytest.raises(UserError, match="no samples of step 3"):
        read_sample(tmp_path, 3)
    with pytest.raises(UserError, match=r"step_00000012\.png cannot be read"):
        read_sample(tmp_path, 12)


def test_a_run_without_a_log_is_said_to_have_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no log yet"):
        read_history(tmp_path, "mine")
