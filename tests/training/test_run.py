"""log.jsonl: appended, rewound, and readable whatever instant a run was killed at."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from st_ar.errors import UserError
from st_ar.model.weights import open_model
from st_ar.selfguided.objective import Losses, SelfGuided
from st_ar.training import loop
from st_ar.training.checkpoint_files import list_checkpoints
from st_ar.training.loop import Learner, forward_backward, train
from st_ar.training.run import append_log, lock_run, read_log, rewind_log
from tests.disk import contents, full_disk, read_only, refused
from tests.training.toy_runs import GUIDED_RUN, PLAIN_RUN, assert_same_result, assert_same_weights, log_of, saved_state


def entries(steps: range) -> list[dict[str, float]]:
    return [{"step": step, "loss": 1 / step} for step in steps]


def written(folder: Path, steps: range) -> Path:
    for entry in entries(steps):
        append_log(folder / "log.jsonl", entry)
    return folder / "log.jsonl"


def test_appended_entries_are_read(tmp_path: Path) -> None:
    log = written(tmp_path, range(1, 6))
    assert read_log(log) == entries(range(1, 6))
    assert [json.loads(line) for line in log.read_text().splitlines()] == entries(range(1, 6))


def test_a_log_that_is_not_there_is_empty(tmp_path: Path) -> None:
    assert read_log(tmp_path / "log.jsonl") == []


def test_rewinding_drops_what_came_after_the_step(tmp_path: Path) -> None:
    log = written(tmp_path, range(1, 8))
    rewind_log(log, 4)
    assert read_log(log) == entries(range(1, 5))
    append_log(log, {"step": 5, "loss": 7.0})
    assert read_log(log)[-1] == {"step": 5, "loss": 7.0}
    assert list(contents(tmp_path)) == ["log.jsonl"]


def test_rewinding_to_the_start_leaves_an_empty_log(tmp_path: Path) -> None:
    log = written(tmp_path, range(1, 4))
    rewind_log(log, 0)
    assert read_log(log) == []


@given(cut=st.integers(0, 200))
def test_a_truncated_log_keeps_its_whole_lines_and_continues(
    tmp_path_factory: pytest.TempPathFactory, cut: int
) -> None:
    log = written(tmp_path_factory.mktemp("log"), range(1, 7))
    data = log.read_bytes()[:cut]
    log.write_bytes(data)
    whole = data.count(b"\n") + (not data.endswith(b"\n") and data.endswith(b"}"))
    assert read_log(log) == entries(range(1, 7))[:whole]
    rewind_log(log, whole)
    append_log(log, {"step": whole + 1, "loss": 0.5})
    assert read_log(log) == [*entries(range(1, 7))[:whole], {"step": whole + 1, "loss": 0.5}]


def test_a_full_disk_is_reported_with_the_remedy(tmp_path: Path) -> None:
    log = written(tmp_path, range(1, 4))
    with (
        full_disk(log.stat().st_size),
        refused(tmp_path, "cannot write .*log.jsonl: .*free some space and continue with --resume"),
    ):
        append_log(log, {"step": 4, "loss": 0.25})
    with pytest.raises(UserError, match="cannot write"), full_disk(10):
        rewind_log(log, 2)
    assert read_log(log) == entries(range(1, 4))


def test_a_run_that_is_read_only_names_the_cause(tmp_path: Path) -> None:
    remedy = (
        "Read-only file system; .* give a folder that you can write to, and copy this one there to continue its job"
    )
    log = written(tmp_path, range(1, 4))
    for _ in range(2):  # without a lock, and with the one of an earlier training
        with read_only(tmp_path):
            with refused(tmp_path, rf"cannot write .*/\.lock: {remedy}"):
                lock_run(tmp_path)
            with refused(tmp_path, rf"cannot write .*/log\.jsonl: {remedy}"):
                append_log(log, {"step": 4})
        lock_run(tmp_path).close()
    (tmp_path / ".lock").unlink()
    (tmp_path / ".lock").mkdir()
    with refused(tmp_path, r"\.lock cannot be opened \(Is a directory\): remove it"):
        lock_run(tmp_path)


@pytest.mark.parametrize(
    "line", ["{", "[]", "3", '{"loss": 1}', '{"step": "2"}', '{"step": 1, "step": 2}', "\x00\udcff"]
)
def test_a_damaged_line_in_the_middle_is_named_and_nothing_after_it_is_lost(tmp_path: Path, line: str) -> None:
    log = written(tmp_path, range(1, 4))
    lines = log.read_text().splitlines()
    lines[1] = line
    log.write_text("\n".join(lines) + "\n", errors="surrogateescape")
    for read in (read_log, lambda path: rewind_log(path, 3)):
        with refused(tmp_path, r"log\.jsonl is damaged \(line 2: .*\): fix or remove that line"):
            read(log)


def test_a_folder_in_the_logs_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").mkdir()
    with refused(tmp_path, r"cannot read .*log\.jsonl"):
        read_log(tmp_path / "log.jsonl")


# Trouble on the way


def test_a_full_disk_stops_the_run_and_leaves_the_last_checkpoint(tokens: Path, straight: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(replace(GUIDED_RUN, steps=4), tokens, out, preset="toy")
    before = contents(out / "checkpoints") | contents(out / "export")
    with (
        full_disk(1 << 16),
        pytest.raises(ValueError, match=r"(?s)checkpoint of step 8 .*step_00000004 is intact.*--resume"),
    ):
        train(GUIDED_RUN, tokens, out, resume=True, preset="toy")
    assert contents(out / "checkpoints") | contents(out / "export") == before
    train(GUIDED_RUN, tokens, out, resume=True, preset="toy")
    assert_same_result(out, straight)


EXPLODING = replace(PLAIN_RUN, optim=replace(PLAIN_RUN.optim, lr=1e38))


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_last_checkpoint(tokens: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"not finite at step 2 .*step_00000001. Start a new run from it with --init .*/run "
    ):
        train(replace(EXPLODING, checkpoint_every=1), tokens, tmp_path / "run")
    assert open_model(tmp_path / "run")[1].step == 1
    assert [entry["step"] for entry in log_of(tmp_path / "run")] == [1]


def test_a_loss_that_is_not_finite_before_any_checkpoint_says_so(tokens: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"not finite at step 2 .*there is no checkpoint yet"):
        train(EXPLODING, tokens, tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_weights_that_explode_later_leave_a_checkpoint(
    tokens: Path, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(loop, "learning_rate", lambda optim, step, total: 1e38 if step == 6 else optim.lr)
        with pytest.raises(ValueError, match=r"not finite at step 7 .*the last good checkpoint is .*step_00000004"):
            train(GUIDED_RUN, tokens, tmp_path / "run", preset="toy")
    slower = replace(GUIDED_RUN, steps=1, optim=replace(GUIDED_RUN.optim, lr=1e-4))
    train(slower, tokens, tmp_path / "next", init=tmp_path / "run")  # as the message says
    train(GUIDED_RUN, tokens, tmp_path / "run", resume=True, preset="toy")
    assert_same_result(tmp_path / "run", straight)


# Steps that are skipped


def poisoned(patch: pytest.MonkeyPatch, **steps: float) -> None:
    """Add to a gradient at step s, for each s=value, what makes the norm not finite."""
    poison = {int(name.removeprefix("at_")): value for name, value in steps.items()}
    current, sample = 0, SelfGuided.sample

    def seen(self: SelfGuided, shape: Any, step: int, **rest: Any) -> Any:
        nonlocal current
        current = step
        return sample(self, shape, step, **rest)

    def armed(learner: Learner, *rest: Any) -> Losses:
        losses = forward_backward(learner, *rest)
        if current in poison:
            assert isinstance(learner.student, SelfGuided)
            gradient = learner.student.model.tok_embeddings.weight.grad
            assert gradient is not None
            gradient[3, 5] = poison[current]
        return losses

    patch.setattr(SelfGuided, "sample", seen)
    patch.setattr(loop, "forward_backward", armed)


SKIPPING = replace(GUIDED_RUN, skip_nonfinite=2, checkpoint_every=1, keep=20)


@pytest.fixture(scope="module")
def skipped(tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has skipped steps 4 and 9."""
    with pytest.MonkeyPatch.context() as patch:
        poisoned(patch, at_4=math.nan, at_9=math.inf)
        return train(SKIPPING, tokens, tmp_path_factory.mktemp("skipped") / "run", preset="toy")


def test_a_skipped_step_changes_nothing_but_the_number_of_steps(skipped: Path) -> None:
    for step in (4, 9):
        assert_same_weights(saved_state(skipped, step), saved_state(skipped, step - 1))
        after = saved_state(skipped, step + 1)
        assert not torch.equal(
            after["student.model.output.weight"], saved_state(skipped, step)["student.model.output.weight"]
        )
    assert {float(value) for name, value in saved_state(skipped, 12).items() if name.endswith(".step")} == {10.0}


def test_skipped_steps_are_reported(skipped: Path) -> None:
    log = [json.loads(line) for line in (skipped / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log] == list(range(1, 13))
    assert {entry["step"]: entry for entry in log if "skipped" in entry} == {
        4: {"step": 4, "skipped": "gradient norm is nan"},
        9: {"step": 9, "skipped": "gradient norm is inf"},
    }


def test_steps_that_are_finite_are_those_of_a_run_that_may_skip_none(
    tokens: Path, straight: Path, tmp_path: Path
) -> None:
    train(replace(GUIDED_RUN, skip_nonfinite=3), tokens, tmp_path / "run", preset="toy")
    assert_same_result(tmp_path / "run", straight)


@pytest.mark.parametrize("stopped", [3, 4, 7])
def test_a_run_that_skips_is_resumed_to_the_same_end(
    tokens: Path, skipped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped: int
) -> None:
    poisoned(monkeypatch, at_4=math.nan, at_9=math.inf)
    train(replace(SKIPPING, steps=stopped), tokens, tmp_path / "run", preset="toy")
    train(SKIPPING, tokens, tmp_path / "run", resume=True, preset="toy")
    assert_same_result(tmp_path / "run", skipped)


def test_more_than_may_be_skipped_stop_the_run_also_when_it_was_resumed_in_between(
    tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poisoned(monkeypatch, at_4=math.nan, at_5=math.nan, at_9=math.nan)
    train(replace(SKIPPING, steps=7), tokens, tmp_path / "run", preset="toy")
    for _ in range(2):
        with pytest.raises(UserError, match=r"at step 9 \(gradient norm is nan\).*a larger --skip-nonfinite than 2$"):
            train(SKIPPING, tokens, tmp_path / "run", resume=True, preset="toy")
        assert list_checkpoints(tmp_path / "run" / "checkpoints")[-1][0] == 8
    train(replace(SKIPPING, skip_nonfinite=3), tokens, tmp_path / "run", resume=True, preset="toy")
    assert sum("skipped" in entry for entry in log_of(tmp_path / "run")) == 3


def test_a_loss_is_read_no_more_often_than_before_if_none_may_be_skipped(
    tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(loop, "not_finite", lambda terms: asked.append(1) or "")
    train(replace(PLAIN_RUN, steps=3), tokens, tmp_path / "run")
    assert asked == []


# Memory


def test_a_network_too_large_for_memory_is_an_error_that_names_the_settings(tokens: Path, tmp_path: Path) -> None:
    guided = replace(GUIDED_RUN.selfguided)
    object.__setattr__(guided, "projector_hidden", 1 << 44)  # beyond what may be asked for, so that no machine has it
    huge = replace(GUIDED_RUN, selfguided=guided)
    with pytest.raises(
        UserError,
        match=r"^out of memory \(2251799813685248 bytes more were needed\): give --activation-checkpointing full, "
        r"also with --resume; or give --accumulate 2, for micro-batches of 3 x 2 sequences; or give a smaller "
        r"--batch-size than 6 or a smaller --model$",
    ):
        train(huge, tokens, tmp_path / "run")


@pytest.mark.parametrize(
    "fail",
    [
        lambda: torch.empty(1 << 55),  # asks for it
        lambda: np.empty(1 << 55),
        lambda: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0")),
    ],
)
def test_a_step_too_large_for_memory_is_too(
    tokens: Path, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fail: Any
) -> None:
    def greedy(*args: Any) -> Losses:
        if (tmp_path / "run" / "export").is_dir():
            list(fail())
        return forward_backward(*args)

    smallest = replace(GUIDED_RUN, accumulate=6, activation_checkpointing="full", checkpoint_every=1)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "forward_backward", greedy)
        with pytest.raises(
            UserError, match=r"^out of memory.*: give a smaller --batch-size than 6 or a smaller --model$"
        ):
            train(smallest, tokens, tmp_path / "run")
    assert list_checkpoints(tmp_path / "run" / "checkpoints")


def test_another_error_is_left_as_it_is(tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> Losses:
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(loop, "forward_backward", broken)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        train(PLAIN_RUN, tokens, tmp_path / "run")
