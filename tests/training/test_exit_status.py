"""How `st-ar train` ends, as a shell or a scheduler sees it: the statuses of docs/options.md, in one line each."""

import re
import signal
from pathlib import Path
from typing import Any

import pytest

from st_ar.cli import main
from st_ar.model.weights import open_model
from st_ar.training import loop
from st_ar.training.checkpoint_files import list_checkpoints
from st_ar.training.run import append_log
from tests.data.random_store import random_store
from tests.disk import full_disk

SMALL = "--model.dim 32 --model.n-layers 2 --model.n-heads 2 --model.vocab-size 16 --model.grid 4 --model.num-classes 3"
RUN = "--batch-size 6 --views 1 --log-every 1 --steps 8 --checkpoint-every 2 --device cpu --dtype float32"


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    tokens = random_store(tmp_path / "tokens", images=20, crops=4)[0]
    return f"train llamagen-photos --tokens {tokens} --out {tmp_path / 'run'} {SMALL} {RUN}".split()


def status(*command: str) -> int:
    try:
        main(command)
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def send(number: signal.Signals, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Send a signal while a step is logged."""

    def signalled(path: Path, entry: dict[str, Any]) -> None:
        append_log(path, entry)
        if entry["step"] == step:
            signal.raise_signal(number)

    monkeypatch.setattr("st_ar.training.run.append_log", signalled)


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_the_run(
    command: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    expected: int,
) -> None:
    with monkeypatch.context() as patch:
        send(number, 3, patch)
        assert status(*command) == expected
    assert re.fullmatch(r"st-ar: stopped at step 3 of 8; the run is saved: .*--resume.*\n", capsys.readouterr().err)
    assert [step for step, _ in list_checkpoints(tmp_path / "run" / "checkpoints")] == [2, 3]
    assert open_model(tmp_path / "run")[1].step == 3
    assert status(*command, "--resume") == 0
    assert open_model(tmp_path / "run")[1].step == 8


def test_a_signal_in_the_last_step_finds_the_run_finished(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    send(signal.SIGTERM, 8, monkeypatch)
    assert status(*command) == 0
    assert "stopped" not in capsys.readouterr().err
    assert open_model(tmp_path / "run")[1].step == 8


def test_a_full_disk_is_found_in_the_background_and_ends_the_run(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with full_disk(1 << 14):
        assert status(*command) == 2
    said = capsys.readouterr().err
    assert re.fullmatch(
        r"st-ar: cannot write the checkpoint of step 2 \(.*\); there is no earlier one; free .*\n", said
    )
    assert status(*command, "--resume") == 0
    assert open_model(tmp_path / "run")[1].step == 8


def test_a_full_disk_under_the_last_checkpoint_is_no_success(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status(*command, "--steps", "6") == 0
    with full_disk(1 << 14):
        assert status(*command, "--resume", "--checkpoint-every", "100") == 2  # found when all steps are done
    assert re.search(r"checkpoint of step 8 \(.*\); .*step_00000006 is intact", capsys.readouterr().err)


def test_divergence_and_lack_of_memory_exit_with_2(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert status(*command, "--optim.lr", "1e38") == 2
    assert re.search(r"^st-ar: the loss or its gradient is not finite at step 2 .*\n$", capsys.readouterr().err)


def test_a_bad_batch_may_be_skipped_by_the_command(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "clip_gradients", _broken_once(loop.clip_gradients))
    assert status(*command, "--skip-nonfinite", "1") == 0
    assert '"skipped"' in (tmp_path / "run" / "log.jsonl").read_text().splitlines()[1]


def _broken_once(clip: Any) -> Any:
    calls = 0

    def armed(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        norm = clip(*args)
        return norm * float("inf") if calls == 2 else norm

    return armed


def test_a_validation_store_keeps_the_best_weights_by_the_command(command: list[str], tmp_path: Path) -> None:
    other = random_store(tmp_path / "others", images=5, crops=1, seed=1)[0]
    options = ["--validation", str(other), "--validation-images", "4", "--keep", "1", "--keep-every", "4"]
    assert status(*command, *options) == 0
    best = open_model(tmp_path / "run" / "best", ema=True)[1].step
    assert [step for step, _ in list_checkpoints(tmp_path / "run" / "checkpoints")] == sorted({best, 4, 8})
