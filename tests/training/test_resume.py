"""Runs that are stopped, killed and resumed, and what is refused to one that is."""

import json
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from st_ar.config import TrainConfig
from st_ar.data.store import TokenStore
from st_ar.distributed import stop_on_signal
from st_ar.hardware import choose_dtype
from st_ar.model.weights import open_model
from st_ar.training import run as run_module
from st_ar.training.checkpoint_files import list_checkpoints
from st_ar.training.loop import train
from st_ar.training.run import append_log
from tests.data.random_store import random_store
from tests.disk import contents, flip_byte, refused
from tests.killing import survivors
from tests.toys import NO_DROPOUT
from tests.training.dying import die, train_guided
from tests.training.toy_runs import GUIDED_RUN, PLAIN_RUN, assert_same_result, log_of


@pytest.fixture(scope="module")
def dead(tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GUIDED_RUN in processes that get a signal. Each case is resumed by one test."""
    return die(train_guided, tmp_path_factory.mktemp("dead"), tokens)


@pytest.mark.parametrize(
    ("instant", "step", "left"),
    [
        ("checkpoint", 8, [".step_00000008.partial", "step_00000004"]),
        ("export", 12, ["step_00000008", "step_00000012"]),
    ],
)
def test_a_run_killed_while_it_is_saved_ends_as_if_it_had_never_stopped(
    tokens: Path, straight: Path, dead: Path, instant: str, step: int, left: list[str]
) -> None:
    case = dead / f"SIGKILL-{instant}-{step}"
    out = case / "run"
    assert int((case / "status").read_text()) == -signal.SIGKILL, (case / "said").read_text()
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == left
    train(GUIDED_RUN, tokens, out, resume=True, preset="toy")
    assert_same_result(out, straight)
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["step_00000008", "step_00000012"]


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_as_if_it_had_never_stopped(tmp_path: Path) -> None:
    random_store(tmp_path / "tokens", images=20, crops=4, shards=2)
    random_store(tmp_path / "validation", images=9, crops=1, seed=1)
    straight, *runs = survivors("training", tmp_path, kills=6, half_written=1)
    best = json.loads((straight / "best" / "config.json").read_text())["step"]
    assert 0 < best < 24
    for run in runs:
        assert_same_result(run, straight)
        assert contents(run / "best") == contents(straight / "best")
        assert contents(run / "kept") == contents(straight / "kept")
        assert sorted(path.name for path in (run / "kept").iterdir()) == [f"step_{step:08d}" for step in (8, 16, 24)]
        assert [step for step, _ in list_checkpoints(run / "checkpoints")] == sorted({best, 8, 16, 22, 24})
        assert {path.name for path in run.rglob(".*")} == {".lock", ".metadata"}  # and nothing half written


@pytest.mark.parametrize(("name", "instant"), [("SIGTERM", "backward"), ("SIGINT", "log")])
def test_a_run_stopped_by_a_signal_saves_itself_and_resumes_exactly(
    tokens: Path, straight: Path, dead: Path, name: str, instant: str
) -> None:
    case = dead / f"{name}-{instant}-7"
    out, said = case / "run", (case / "said").read_text()
    assert int((case / "status").read_text()) == 7, said
    assert "stopped at step 7 of 12; the run is saved" in said
    assert "--resume" in said
    assert said.split()[-1] == str(int(signal.Signals[name]))
    assert (out / "checkpoints" / "step_00000007").is_dir()
    assert open_model(out)[1].step == 7
    train(GUIDED_RUN, tokens, out, resume=True, preset="toy")
    assert_same_result(out, straight)


def test_a_run_that_broke_before_its_first_checkpoint_starts_again(
    tokens: Path, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(path: Path, entry: dict[str, Any]) -> None:
        append_log(path, entry)
        if entry["step"] == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "append_log", broken)
        with pytest.raises(KeyboardInterrupt):
            train(GUIDED_RUN, tokens, tmp_path / "run", preset="toy")
    assert len(log_of(tmp_path / "run")) == 3
    train(GUIDED_RUN, tokens, tmp_path / "run", resume=True, preset="toy")
    assert_same_result(tmp_path / "run", straight)


def test_signals_are_handled_as_before_once_training_is_over() -> None:
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, signal.default_int_handler) for number in numbers]
    try:
        with stop_on_signal() as stop:
            assert all(signal.getsignal(number) is not signal.default_int_handler for number in numbers)
            signal.raise_signal(signal.SIGTERM)
            assert stop == [signal.SIGTERM]
            assert all(
                signal.getsignal(number) is signal.default_int_handler for number in numbers
            )  # a second one is at once
        assert all(signal.getsignal(number) is signal.default_int_handler for number in numbers)
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def test_resuming_a_finished_run_changes_nothing_but_its_config(tokens: Path, run: Path) -> None:
    before = contents(run)
    train(GUIDED_RUN, tokens, run, resume=True, preset="toy")
    after = contents(run)
    assert {name for name in after if after[name] != before.get(name)} <= {"config.json"}
    assert after.keys() == before.keys()


def test_the_batch_may_be_accumulated_in_a_run(tokens: Path, tmp_path: Path) -> None:
    still = replace(GUIDED_RUN, model=replace(GUIDED_RUN.model, **NO_DROPOUT), steps=4)  # dropout draws by micro-batch
    train(still, tokens, tmp_path / "whole")
    train(replace(still, accumulate=3), tokens, tmp_path / "pieces")
    for whole, pieced in zip(log_of(tmp_path / "whole"), log_of(tmp_path / "pieces"), strict=True):
        assert pieced["loss"] == pytest.approx(whole["loss"], rel=1e-4)
        assert pieced["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-3)


def test_more_steps_may_be_added_under_a_constant_rate(tokens: Path, straight: Path, tmp_path: Path) -> None:
    train(replace(GUIDED_RUN, steps=7), tokens, tmp_path / "run", preset="toy")
    train(GUIDED_RUN, tokens, tmp_path / "run", resume=True, preset="toy")
    assert_same_result(tmp_path / "run", straight)
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert saved["config"]["steps"] == 12


@pytest.mark.parametrize("schedule", ["cosine", "trapezoid"])
def test_steps_may_not_be_added_once_the_rate_has_fallen_for_the_old_end(
    tokens: Path, tmp_path: Path, schedule: str
) -> None:
    # No run from the beginning has these rates: the result would be a function of when it was stopped.
    config = replace(PLAIN_RUN, steps=4, optim=replace(PLAIN_RUN.optim, schedule=schedule))
    train(config, tokens, tmp_path / "run")
    message = f"steps was 4, now 8, and with --optim.schedule {schedule} the 4 steps already taken would have had other learning rates"
    with refused(tmp_path, message):
        train(replace(config, steps=8), tokens, tmp_path / "run", resume=True)


def lasting(until: float, steps: int = 12) -> TrainConfig:
    """Self-guidance for a part of so many steps."""
    return replace(GUIDED_RUN, steps=steps, selfguided=replace(GUIDED_RUN.selfguided, until=until))


def test_self_guidance_may_end_early_in_a_resumed_run(tokens: Path, tmp_path: Path) -> None:
    early = train(lasting(7 / 12), tokens, tmp_path / "early")
    train(lasting(1.0, steps=7), tokens, tmp_path / "run")
    train(lasting(7 / 12), tokens, tmp_path / "run", resume=True)
    assert_same_result(tmp_path / "run", early)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["config"]["selfguided"]["until"] == 7 / 12


@pytest.mark.parametrize(
    ("begun", "now", "message"),
    [
        (
            lasting(1.0, steps=7),
            lasting(0.5),
            "steps was 7, now 12; selfguided.until was 1.0, now 0.5, and step 7 is already taken, with",
        ),
        (lasting(0.5, steps=8), lasting(0.5), "steps was 8, now 12, and step 5 is already taken, without"),
        (
            lasting(0.5, steps=8),
            lasting(1.0, steps=8),
            "selfguided.until was 0.5, now 1.0, and step 5 is already taken, without",
        ),
    ],
)
def test_self_guidance_may_not_change_in_past_steps(
    tokens: Path, tmp_path: Path, begun: TrainConfig, now: TrainConfig, message: str
) -> None:
    train(begun, tokens, tmp_path / "run")
    with refused(tmp_path, f"{message} self-guidance. Give the old ones to resume it"):
        train(now, tokens, tmp_path / "run", resume=True)


def test_a_run_with_weights_and_no_checkpoint_is_not_started_again(tokens: Path, run: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    with refused(run, "has weights of step 12 but no checkpoint to resume from: put its checkpoints back, or choose"):
        train(replace(GUIDED_RUN, steps=20), tokens, run, resume=True, preset="toy")


def test_a_folder_is_trained_in_by_one_process_at_a_time(tokens: Path, run: Path) -> None:
    hold = "import fcntl, sys; file = open(sys.argv[1], 'ab'); fcntl.lockf(file, fcntl.LOCK_EX); print('held', flush=True); input()"
    command = [sys.executable, "-c", hold, str(run / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with refused(run, "another process is training in .*run: wait for its end, or stop it first"):
            train(replace(GUIDED_RUN, steps=20), tokens, run, resume=True, preset="toy")
        other.communicate("\n")
    train(GUIDED_RUN, tokens, run, resume=True, preset="toy")  # the lock ends with who held it


def test_the_type_may_be_named_or_left_to_the_machine(tokens: Path, tmp_path: Path) -> None:
    dtype = str(choose_dtype("auto", torch.device("cpu"))).removeprefix("torch.")
    begun = replace(PLAIN_RUN, dtype="auto", steps=4)
    train(begun, tokens, tmp_path / "run", preset="toy")
    train(replace(begun, dtype=dtype), tokens, tmp_path / "run", resume=True, preset="toy")


def test_micro_batches_may_change_as_long_as_the_negatives_do_not(tokens: Path, tmp_path: Path) -> None:
    config = replace(GUIDED_RUN, steps=4, model=replace(GUIDED_RUN.model, **NO_DROPOUT))
    straight = train(replace(config, steps=6), tokens, tmp_path / "straight", preset="toy")
    train(config, tokens, tmp_path / "run", preset="toy")
    train(replace(config, steps=6, accumulate=3), tokens, tmp_path / "run", resume=True, preset="toy")
    found, expected = (open_model(run)[0].state_dict() for run in (tmp_path / "run", straight))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-4)
    local = replace(config, selfguided=replace(config.selfguided, negatives="local"))
    train(local, tokens, tmp_path / "local", preset="toy")
    with refused(tmp_path / "local", "accumulate was 1, now 3"):
        train(replace(local, accumulate=3), tokens, tmp_path / "local", resume=True, preset="toy")


def test_an_exports_folder_is_no_run(tokens: Path, run: Path) -> None:
    with refused(run, "export exists already and is not empty"):
        train(GUIDED_RUN, tokens, run / "export", preset="toy")
    with refused(run, "export holds no run to resume, its config.json is of something else"):
        train(GUIDED_RUN, tokens, run / "export", resume=True, preset="toy")


def test_images_are_not_negatives_of_themselves(tokens: Path, tmp_path: Path) -> None:
    large = 2 * len(TokenStore(tokens))
    with refused(
        tmp_path, f"--batch-size {large} is more than the {large // 2} images of .*; give at most {large // 2}"
    ):
        train(replace(GUIDED_RUN, batch_size=large), tokens, tmp_path / "run")


CHANGES: dict[str, tuple[TrainConfig, str]] = {
    "batch size": (replace(GUIDED_RUN, batch_size=4), "batch_size was 6, now 4"),
    "seed": (replace(GUIDED_RUN, seed=1), "seed was 0, now 1"),
    "views": (replace(GUIDED_RUN, views=3), "views was 2, now 3"),
    "label dropout": (replace(GUIDED_RUN, class_dropout=0.2), "class_dropout was 0.1, now 0.2"),
    "rate": (replace(GUIDED_RUN, optim=replace(GUIDED_RUN.optim, lr=1e-3)), "optim.lr was 0.003, now 0.001"),
    "depth": (replace(GUIDED_RUN, model=replace(GUIDED_RUN.model, n_layers=3)), "model.n_layers was 2, now 3"),
    "loss": (
        replace(GUIDED_RUN, selfguided=replace(GUIDED_RUN.selfguided, beta=1.0)),
        "selfguided.beta was 0.5, now 1.0",
    ),
    "type": (replace(GUIDED_RUN, dtype="bfloat16"), "dtype was float32, now bfloat16"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_run_is_not_resumed_with_another(tokens: Path, run: Path, what: str) -> None:
    config, message = CHANGES[what]
    with refused(
        run, f"was begun with other settings: .*{message}.*Give the old ones to resume it, or choose another --out"
    ):
        train(config, tokens, run, resume=True, preset="toy")


def test_all_the_changed_settings_are_named(tokens: Path, run: Path) -> None:
    with refused(run, "batch_size was 6, now 4; seed was 0, now 1"):
        train(replace(GUIDED_RUN, batch_size=4, seed=1), tokens, run, resume=True, preset="toy")


def test_a_run_is_not_resumed_on_a_store_of_other_size(run: Path, tmp_path: Path) -> None:
    other = random_store(tmp_path / "tokens", images=24, crops=4)[0]
    with refused(tmp_path, "images was 20, now 24"):
        train(GUIDED_RUN, other, run, resume=True, preset="toy")


def test_a_run_is_not_resumed_on_a_store_of_other_codes(run: Path, tmp_path: Path) -> None:
    # Such as the same images cropped from another size: the same names and counts, other tokens.
    other = random_store(tmp_path / "tokens", images=20, crops=4, shards=2, seed=1)[0]
    with refused(tmp_path, "was begun with other settings"):
        train(GUIDED_RUN, other, run, resume=True, preset="toy")


def test_a_store_may_move(tokens: Path, straight: Path, tmp_path: Path) -> None:
    train(replace(GUIDED_RUN, steps=7), tokens, tmp_path / "run", preset="toy")
    moved = shutil.copytree(tokens, tmp_path / "elsewhere")
    train(GUIDED_RUN, moved, tmp_path / "run", resume=True, preset="toy")
    assert_same_result(tmp_path / "run", straight)


def test_a_run_is_not_written_over(tokens: Path, run: Path) -> None:
    with refused(
        run, "holds a run already, with a checkpoint of step 12: give --resume to continue it, or choose another --out"
    ):
        train(GUIDED_RUN, tokens, run)


def test_a_run_without_a_checkpoint_is_not_written_over_either(tokens: Path, run: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    with refused(run, "holds a run already, without a checkpoint yet"):
        train(GUIDED_RUN, tokens, run)


def test_a_folder_of_other_files_is_not_changed(tokens: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with refused(tmp_path, "exists already and is not empty: a run is never overwritten"):
        train(PLAIN_RUN, tokens, tmp_path)
    with refused(tmp_path, "exists already and is not empty: a run is never overwritten"):
        train(PLAIN_RUN, tokens, tmp_path / "thesis.tex")


@pytest.mark.parametrize("name", ["nowhere", "."])
def test_there_must_be_a_run_to_resume(tokens: Path, tmp_path: Path, name: str) -> None:
    with refused(tmp_path, "holds no run to resume: leave out --resume to begin one, or check --out"):
        train(PLAIN_RUN, tokens, tmp_path / name, resume=True)
    assert list(tmp_path.iterdir()) == []


def test_a_run_of_another_format_is_not_continued(tokens: Path, run: Path) -> None:
    saved = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(saved | {"format_version": 9}))
    with refused(run, "has format version 9; this st-ar continues 1"):
        train(GUIDED_RUN, tokens, run, resume=True, preset="toy")


def test_a_damaged_checkpoint_is_named_and_the_end_is_the_same(
    tokens: Path, run: Path, straight: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flip_byte(run / "checkpoints" / "step_00000012" / "tensors" / "__0_0.distcp", 5000)
    train(GUIDED_RUN, tokens, run, resume=True, preset="toy")
    assert "step_00000012 is damaged (tensors/__0_0.distcp does not match its checksum)" in capsys.readouterr().err
    assert_same_result(run, straight)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        *("step_00000008", "step_00000012", "step_00000012.damaged")
    ]


UNSUITABLE: dict[str, tuple[TrainConfig, str]] = {
    "codebook": (replace(PLAIN_RUN, model=replace(PLAIN_RUN.model, vocab_size=32)), "--model.vocab-size 16"),
    "grid": (replace(PLAIN_RUN, model=replace(PLAIN_RUN.model, grid=8)), "--model.grid 4"),
    "classes": (replace(PLAIN_RUN, model=replace(PLAIN_RUN.model, num_classes=10)), "--model.num-classes 3"),
    "views": (replace(PLAIN_RUN, views=5), "--views 5 asks for different crops"),
}


@pytest.mark.parametrize("what", UNSUITABLE)
def test_a_store_that_does_not_suit_the_model_is_refused_before_anything_is_written(
    tokens: Path, tmp_path: Path, what: str
) -> None:
    config, message = UNSUITABLE[what]
    with refused(tokens, message):
        train(config, tokens, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_damaged_store_is_refused_before_anything_is_written(tokens: Path, tmp_path: Path) -> None:
    damaged = shutil.copytree(tokens, tmp_path / "tokens")
    flip_byte(damaged / "codes-00001-of-00002.npy")
    with refused(damaged, "codes-00001-of-00002.npy is damaged"):
        train(PLAIN_RUN, damaged, tmp_path / "run")
    assert not (tmp_path / "run").exists()
