"""What a run keeps besides its newest weights: the best by a validation store, and those of every so many steps."""

import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from st_ar import load_model
from st_ar.data.store import TokenStore
from st_ar.errors import Interrupted
from st_ar.evaluation.likelihood import validation_loss
from st_ar.hardware import parameters, run_bytes
from st_ar.model.weights import open_model
from st_ar.training import loop
from st_ar.training.checkpoint_files import list_checkpoints, read_record
from st_ar.training.loop import train
from st_ar.training.run import append_log
from tests.data.random_store import random_store
from tests.disk import contents, flip_byte, refused
from tests.training.toy_runs import GUIDED_RUN, PLAIN_RUN, assert_same_result, assert_same_weights, log_of, saved_state

# The best by a validation store


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Codes without rule: what is learnt from the training images' makes them ever less likely."""
    return random_store(tmp_path_factory.mktemp("others") / "tokens", images=9, crops=3, seed=1)[0]


MEASURED = replace(GUIDED_RUN, steps=24, checkpoint_every=6, keep=1, optim=replace(GUIDED_RUN.optim, lr=1e-2))


@pytest.fixture(scope="module")
def measured(tokens: Path, others: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(MEASURED, tokens, tmp_path_factory.mktemp("measured") / "run", validation=others, preset="toy")


def losses_of(run: Path) -> dict[int, float]:
    return {int(entry["step"]): entry["validation_loss"] for entry in log_of(run) if "validation_loss" in entry}


def test_the_averaged_weights_are_measured_at_every_checkpoint(measured: Path, others: Path) -> None:
    losses = losses_of(measured)
    assert list(losses) == [6, 12, 18, 24]
    assert losses[24] == pytest.approx(validation_loss(load_model(measured, ema=True), TokenStore(others)), rel=1e-6)
    saved = json.loads((measured / "config.json").read_text())
    assert saved["validation"] == TokenStore(others).describe()


def test_measuring_changes_nothing_else(tokens: Path, measured: Path, tmp_path: Path) -> None:
    run = train(MEASURED, tokens, tmp_path / "run", preset="toy")
    assert_same_weights(load_model(run).state_dict(), load_model(measured).state_dict())
    assert not (run / "best").exists()
    assert [entry for entry in log_of(measured) if "validation_loss" not in entry] == log_of(run)


def test_the_best_so_far_is_a_model_of_its_own_and_its_checkpoint_is_kept(measured: Path, others: Path) -> None:
    losses = losses_of(measured)
    best = min(losses, key=losses.__getitem__)
    assert best < 24
    model, info = open_model(measured / "best", ema=True)
    assert info.step == best
    assert validation_loss(model, TokenStore(others)) == pytest.approx(losses[best], rel=1e-6)
    saved = json.loads((measured / "best" / "config.json").read_text())
    assert saved["validation_loss"] == losses[best]
    assert open_model(measured)[1].step == 24
    assert [step for step, _ in list_checkpoints(measured / "checkpoints")] == [best, 24]
    assert read_record(measured / "checkpoints" / f"step_{best:08d}")["validation_loss"] == losses[best]


def test_a_checkpoint_on_interruption_is_not_measured_and_the_best_is_the_same(
    tokens: Path, others: Path, measured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupting(path: Path, entry: dict[str, Any]) -> None:
        append_log(path, entry)
        if entry["step"] == 8:
            signal.raise_signal(signal.SIGTERM)

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(loop, "append_log", interrupting)
        with pytest.raises(Interrupted, match="stopped at step 8"):
            train(MEASURED, tokens, run, validation=others, preset="toy")
    assert list(losses_of(run)) == [6]
    train(MEASURED, tokens, run, validation=others, resume=True, preset="toy")
    assert_same_result(run, measured)
    assert contents(run / "best") == contents(measured / "best")


def test_the_store_that_is_measured_may_not_change(tokens: Path, others: Path, measured: Path, tmp_path: Path) -> None:
    run = shutil.copytree(measured, tmp_path / "run")
    with refused(run, r"begun with other settings: validation.crops was .* now None"):
        train(MEASURED, tokens, run, resume=True, preset="toy")
    with refused(run, r"begun with other settings: validation_images was 1024, now 4"):
        train(replace(MEASURED, validation_images=4), tokens, run, validation=others, resume=True, preset="toy")


def test_a_validation_store_that_does_not_suit_is_refused_before_anything_is_written(
    tokens: Path, tmp_path: Path
) -> None:
    other = random_store(tmp_path / "other", images=9, crops=1, vocab_size=32)[0]
    with refused(tmp_path, "has 32 tokens in the codebook, the model 16"):
        train(MEASURED, tokens, tmp_path / "run", validation=other)
    named = random_store(tmp_path / "named", images=9, crops=1)[0]
    saved = json.loads((named / "meta.json").read_text())
    (named / "meta.json").write_text(json.dumps(saved | {"class_names": ["class-0", "class-2", "class-1"]}))
    with refused(tmp_path, r"names its classes otherwise than .* \(class 1 is 'class-1' and 'class-2'\)"):
        train(MEASURED, tokens, tmp_path / "run", validation=named)
    damaged = random_store(tmp_path / "damaged", images=9, crops=1)[0]
    flip_byte(next(damaged.glob("codes-*")), 200)
    with refused(tmp_path, "damaged: its content does not match the checksum"):
        train(MEASURED, tokens, tmp_path / "run", validation=damaged)
    saved = json.loads((other / "meta.json").read_text())
    (other / "meta.json").write_text(json.dumps(saved | {"vocab_size": 16, "tokenizer": "f" * 64}))
    with refused(tmp_path, "was made by tokenizer ffffffffffff"):
        train(MEASURED, tokens, tmp_path / "run", validation=other)


# Those of every so many steps


def test_weights_are_kept_every_so_many_steps_as_models_of_their_own(tokens: Path, tmp_path: Path) -> None:
    config = replace(GUIDED_RUN, steps=14, checkpoint_every=2, keep=1, keep_every=4)
    run = train(config, tokens, tmp_path / "run", preset="toy")
    assert sorted(path.name for path in (run / "kept").iterdir()) == ["step_00000004", "step_00000008", "step_00000012"]
    for step in (4, 8, 12):
        state = saved_state(run, step)
        for ema, prefix in ((False, "student.model."), (True, "ema.")):
            model, info = open_model(run / "kept" / f"step_{step:08d}", ema=ema)
            assert (info.step, info.ema) == (step, ema)
            for name, tensor in model.state_dict().items():
                assert torch.equal(tensor, state[prefix + name]), name
    assert open_model(run)[1].step == 14


def test_kept_weights_are_written_by_the_next_start_if_a_kill_prevented_it(tokens: Path, tmp_path: Path) -> None:
    config = replace(GUIDED_RUN, keep_every=12)
    run = train(config, tokens, tmp_path / "run", preset="toy")
    kept = contents(run / "kept")
    assert kept
    (run / "kept" / "step_00000012" / "config.json").unlink()
    train(config, tokens, run, resume=True, preset="toy")
    assert contents(run / "kept") == kept


def test_nothing_is_kept_unasked(straight: Path) -> None:
    assert not (straight / "kept").exists()


def test_the_disk_that_a_run_takes_is_known_beforehand(tokens: Path, tmp_path: Path) -> None:
    model = replace(GUIDED_RUN.model, dim=128, n_layers=4, n_heads=2)  # large beside what the files say of themselves
    config = replace(PLAIN_RUN, model=model, steps=4, checkpoint_every=1, keep=1, keep_every=2)
    run = train(config, tokens, tmp_path / "run", preset="toy")
    found = sum(path.stat().st_size for path in run.rglob("*") if path.is_file())
    whole = run_bytes(config)
    assert whole == parameters(model) * 4 * (4 * 4 + 2 * 3)
    one = (
        parameters(model) * 4 * 4
    )  # step 4's checkpoint counts as the newest and as one that is kept; one more is being written
    assert whole - 2 * one < found < whole
    assert run_bytes(replace(config, steps=None, epochs=2.0), images=60) == whole + 8 * (one + parameters(model) * 8)
