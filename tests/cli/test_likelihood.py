"""`st-ar likelihood`: the validation loss of several weights in one call, and mistakes that cost nothing."""

import json
import math
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from st_ar.cli import run_command
from st_ar.data.store import TokenStore
from st_ar.evaluation.likelihood import validation_loss
from st_ar.files import sha256
from st_ar.model.weights import load_model
from tests.data.random_store import random_store
from tests.disk import flip_byte, refused
from tests.small_line import SmallLine, make_line

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def line(tmp_path: Path) -> SmallLine:
    return make_line(tmp_path)


def command(line: SmallLine, *options: object) -> list[str]:
    return ["likelihood", *map(str, ("--tokens", line.tokens, "--model", line.model, "--device", "cpu", *options))]


def test_both_weights_with_their_losses(line: SmallLine, tmp_path: Path, capsys: Capture) -> None:
    run_command(command(line, "--weights", "both", "--names", "one", "--out", tmp_path / "losses.json"))
    said = capsys.readouterr().out
    record = json.loads((tmp_path / "losses.json").read_text())
    store = TokenStore(line.tokens)
    for result, name, ema in zip(record["results"], ("one", "one (EMA)"), (False, True), strict=True):
        loss = validation_loss(load_model(line.model, ema=ema), store)
        assert result["model"] == name
        assert result["loss"] == pytest.approx(loss, rel=1e-6)
        file = line.model / ("ema.safetensors" if ema else "model.safetensors")
        assert result["weights"] == {"file": str(file), "sha256": sha256(file), "ema": ema, "step": 7}
        assert f"{loss:.4f}" in said
        assert f"{math.exp(loss):.2f}" in said
    assert record["results"][0]["loss"] != record["results"][1]["loss"]
    run_command(command(line, "--ema", "--names", "one", "--out", tmp_path / "averaged.json"))
    assert json.loads((tmp_path / "averaged.json").read_text())["results"] == [record["results"][1] | {"model": "one"}]
    assert record["store"] == store.describe()
    assert f"{len(store)} images; a uniform guess among 11 tokens has {math.log(11):.4f}" in said


@pytest.mark.parametrize(("scale", "loss"), [(math.nan, None), (1e4, "inf")])
def test_weights_that_have_diverged_are_refused_and_large_losses_are_not(
    line: SmallLine, tmp_path: Path, capsys: Capture, scale: float, loss: str | None
) -> None:
    file = line.model / "model.safetensors"
    tensors = load_file(file)
    tensors["output.weight"] = tensors["output.weight"] * scale
    save_file(tensors, file)
    arguments = command(line, "--names", "mine", "--out", tmp_path / "losses.json")
    if loss is None:
        with refused(tmp_path, "the loss of mine is not finite: the training of these weights has diverged"):
            run_command(arguments)
    else:
        run_command(arguments)
        assert 700 < json.loads((tmp_path / "losses.json").read_text())["results"][0]["loss"] < math.inf
        assert capsys.readouterr().out.splitlines()[-3].endswith(loss)


def test_stores_of_others_and_taken_places_are_refused(line: SmallLine, tmp_path: Path) -> None:
    other, _, _ = random_store(tmp_path / "other", images=2, grid=3, vocab_size=12)
    with refused(tmp_path, "12 tokens in the codebook, the model 11"):
        run_command(command(line, "--tokens", other))
    named, _, _ = random_store(tmp_path / "named", images=2, grid=3, vocab_size=11, num_classes=3)
    with refused(tmp_path, "was made by tokenizer"):
        run_command(command(line, "--tokens", named))
    (tmp_path / "taken.json").write_text("{}")
    with refused(tmp_path, "taken.json exists already"):
        run_command(command(line, "--out", tmp_path / "taken.json"))
    shard = next(line.tokens.glob("codes-*.npy"))
    flip_byte(shard, shard.stat().st_size - 1)
    with refused(tmp_path, "does not match the checksum"):
        run_command(command(line))
    flip_byte(shard, shard.stat().st_size - 1)
    with refused(tmp_path, "--ema is short for --weights ema"):
        run_command(command(line, "--weights", "both", "--ema"))
    with refused(tmp_path, "2 --names for 1 models"):
        run_command(command(line, "--names", "a", "b"))
