"""Runs that begin with a model's weights."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from st_ar.cli import main
from st_ar.config import PLAIN
from st_ar.data.store import TokenBatches, TokenStore
from st_ar.data.text import write_text
from st_ar.model.weights import load_model
from st_ar.training.loop import train
from tests.data.random_store import checksum, random_store
from tests.disk import refused
from tests.toys import NO_DROPOUT, random_captions, random_model, save_export
from tests.training.toy_runs import GUIDED_RUN, assert_same_result, log_of

STILL = replace(GUIDED_RUN, model=replace(GUIDED_RUN.model, **NO_DROPOUT), class_dropout=0.0, steps=1)
PLAIN_STEP = replace(STILL, selfguided=PLAIN)


def next_token(run: Path, tokens: Path, *, ema: bool = False) -> float:
    """The cross-entropy of a run's model on the first batch of PLAIN_STEP, written out."""
    views = TokenBatches(TokenStore(tokens), batch_size=STILL.batch_size, views=STILL.views, seed=STILL.seed)
    batch, labels = views.batch(0)
    codes = batch.flatten(0, 1)
    with torch.no_grad():
        logits = load_model(run, ema=ema)(codes[:, :-1], labels.repeat_interleave(STILL.views)).logits
    chosen = logits.double().log_softmax(-1).gather(-1, codes.unsqueeze(-1))
    return -chosen.mean().item()


@pytest.mark.parametrize("ema", [False, True])
def test_the_first_step_is_taken_from_the_models_weights(
    tokens: Path, straight: Path, tmp_path: Path, ema: bool
) -> None:
    run = train(PLAIN_STEP, tokens, tmp_path / "run", init=straight, init_ema=ema)
    assert log_of(run)[0]["loss_ar"] == pytest.approx(next_token(straight, tokens, ema=ema), rel=1e-5)


def test_student_and_ema_start_from_the_initial_weights(tokens: Path, straight: Path, tmp_path: Path) -> None:
    barely = replace(STILL, optim=replace(STILL.optim, lr=1e-12))
    run = train(barely, tokens, tmp_path / "run", init=straight)
    given = load_model(straight).state_dict()
    for weights in (load_model(run), load_model(run, ema=True)):
        for name, value in weights.state_dict().items():
            torch.testing.assert_close(value, given[name], rtol=0, atol=1e-9)


def test_projector_moments_and_steps_start_fresh(tokens: Path, straight: Path, tmp_path: Path) -> None:
    """As of a run whose random weights would have been the model's: those of seed 0 themselves."""
    tiny = replace(
        GUIDED_RUN, steps=1, optim=replace(GUIDED_RUN.optim, lr=1e-38)
    )  # moves nothing that float32 can hold
    random = train(tiny, tokens, tmp_path / "random")
    run = train(GUIDED_RUN, tokens, tmp_path / "run", init=random, preset="toy")
    assert_same_result(run, straight)


def test_it_is_recorded_which_weights_they_were(tokens: Path, straight: Path, tmp_path: Path) -> None:
    run = train(PLAIN_STEP, tokens, tmp_path / "run", init=straight, init_ema=True)
    said = json.loads((run / "config.json").read_text())["init"]
    assert said == {"sha256": checksum(straight / "export" / "ema.safetensors"), "ema": True, "step": 12}


def test_dropout_and_grid_may_be_others(straight: Path, tmp_path: Path) -> None:
    larger = random_store(tmp_path / "tokens", images=20, crops=4, grid=5)[0]
    changed = replace(PLAIN_STEP.model, grid=5, drop_path=0.1)
    run = train(
        replace(PLAIN_STEP, model=changed, optim=replace(STILL.optim, lr=1e-12)),
        larger,
        tmp_path / "run",
        init=straight,
    )
    for name, value in load_model(run).state_dict().items():
        torch.testing.assert_close(value, load_model(straight).state_dict()[name], rtol=0, atol=1e-9)


def test_a_stopped_run_resumes_only_with_the_same_initial_weights(tokens: Path, straight: Path, tmp_path: Path) -> None:
    whole = train(GUIDED_RUN, tokens, tmp_path / "whole", init=straight, preset="toy")
    run = tmp_path / "run"
    train(replace(GUIDED_RUN, steps=7), tokens, run, init=straight, preset="toy")
    with refused(run, "init.sha256 was .*, now None"):
        train(GUIDED_RUN, tokens, run, resume=True, preset="toy")
    with refused(run, "init.ema was False, now True"):
        train(GUIDED_RUN, tokens, run, resume=True, preset="toy", init=straight, init_ema=True)
    moved = shutil.copytree(straight, tmp_path / "moved")
    train(GUIDED_RUN, tokens, run, resume=True, preset="toy", init=moved)
    assert_same_result(run, whole)


def test_a_run_begun_with_random_weights_takes_no_others(tokens: Path, straight: Path, run: Path) -> None:
    with refused(run, "init.sha256 was None, now"):
        train(GUIDED_RUN, tokens, run, resume=True, preset="toy", init=straight)


def test_another_architecture_is_refused(tokens: Path, straight: Path, tmp_path: Path) -> None:
    other = replace(GUIDED_RUN, model=replace(GUIDED_RUN.model, n_layers=3, n_heads=4))
    with refused(
        tmp_path,
        r"model\.safetensors is another model: --model.n-heads is 2 there, 4 here; --model.n-layers is 2 there, 3 here",
    ):
        train(other, tokens, tmp_path / "run", init=straight)


def test_a_model_of_other_codes_is_refused(tokens: Path, straight: Path, tmp_path: Path) -> None:
    other = shutil.copytree(tokens, tmp_path / "tokens")
    replace(TokenStore(other).meta, tokenizer="f" * 64).write(other)
    with refused(tmp_path, "made by tokenizer ffffffffffff, the model uses the codes of 0123456789ab"):
        train(GUIDED_RUN, other, tmp_path / "run", init=straight)


def test_a_model_of_other_classes_is_refused(tokens: Path, straight: Path, tmp_path: Path) -> None:
    other = shutil.copytree(tokens, tmp_path / "tokens")
    replace(TokenStore(other).meta, class_names=["cat", "dog", "hen"]).write(other)
    with refused(tmp_path, "have different class names"):
        train(GUIDED_RUN, other, tmp_path / "run", init=straight)


def test_a_model_of_another_encoders_captions_is_refused(tokens: Path, tmp_path: Path) -> None:
    config = replace(GUIDED_RUN.model, condition="text", num_classes=1000, text_tokens=4, text_dim=6)
    model = random_model(config)
    save_export(tmp_path / "model", model, model, {"step": 3, "encoder": "one"})
    captions: list[Tensor] = list(random_captions(config, [2] * 20))
    write_text(tmp_path / "text.safetensors", [caption[-2:].numpy() for caption in captions], encoder="another")
    with refused(tmp_path, "encoded by 'another', the model was trained on captions by 'one'"):
        train(
            replace(GUIDED_RUN, model=config),
            tokens,
            tmp_path / "run",
            text=tmp_path / "text.safetensors",
            init=tmp_path / "model",
        )


def test_initial_weights_that_are_not_a_model_are_refused(tokens: Path, tmp_path: Path) -> None:
    with refused(tmp_path, "nowhere does not exist"):
        train(GUIDED_RUN, tokens, tmp_path / "run", init=tmp_path / "nowhere")
    with refused(tmp_path, "give --init too"):
        train(GUIDED_RUN, tokens, tmp_path / "run", init_ema=True)


def test_the_command_takes_it(tmp_path: Path) -> None:
    store = random_store(tmp_path / "tokens", images=8, crops=2, grid=8, vocab_size=1024, num_classes=10)[0]
    common = ["--tokens", str(store), "--steps", "1", "--batch-size", "2", "--model.dim", "16", "--model.n-heads", "2"]
    main(["train", "llamagen-cifar10", *common, "--out", str(tmp_path / "first")])
    main(
        [
            "train",
            "st-ar-cifar10",
            *common,
            "--out",
            str(tmp_path / "second"),
            "--init",
            str(tmp_path / "first"),
            "--init-ema",
        ]
    )
    said = json.loads((tmp_path / "second" / "config.json").read_text())["init"]
    assert (said["ema"], said["step"]) == (True, 1)
