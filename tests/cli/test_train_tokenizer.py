"""Training a tokenizer by command: help, the whole way to a token store, and mistakes that harm nothing."""

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from st_ar.cli import main
from st_ar.cli.train import TrainKMeans, TrainVQ
from st_ar.config import VQ_PRESETS, VQConfig, VQTrainConfig
from st_ar.data.source import center_crop
from st_ar.data.store import TokenStore
from st_ar.tokenizer import load_tokenizer, to_pixels
from st_ar.tokenizer.vq import VQTokenizer
from tests.cli.test_main import flags, helped, refused
from tests.data.pictures import encoded, noise
from tests.disk import contents

Capture = pytest.CaptureFixture[str]

SMALL = [
    *("--model.channels", "8", "--model.multipliers", "1", "2", "--model.z-channels", "8"),
    *("--model.codebook-size", "16", "--model.codebook-dim", "4", "--batch-size", "4", "--evaluate-images", "8"),
    *("--adversary.start", "1", "--adversary.channels", "4", "--dtype", "float32", "--device", "cpu"),
]


def command(out: Path, *more: str) -> list[str]:
    images = ["--images", "photos:train", "--test-images", "photos:test"]
    return ["train-tokenizer", "vq-cifar10", *images, "--out", str(out), *SMALL, *more]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three steps at a constant rate. Tests that change it take a copy: `run`."""
    out = tmp_path_factory.mktemp("vq") / "run"
    main(command(out, "--steps", "3", "--optim.schedule", "constant", "--log-every", "1"))
    return out


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return shutil.copytree(trained, tmp_path / "run")


# Help


def test_help_lists_every_preset(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    text = helped(capsys, monkeypatch, "train-tokenizer", "--help")
    assert "usage: st-ar train-tokenizer PRESET --images SRC --out DIR" in text
    for name, build in {"kmeans": TrainKMeans, **VQ_PRESETS}.items():
        assert re.search(rf"(?m)^  {name} +{re.escape((build.__doc__ or '').splitlines()[0])}$", text)


@pytest.mark.parametrize("preset", VQ_PRESETS)
def test_a_presets_help_explains_every_setting_with_its_value(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch, preset: str
) -> None:
    text = helped(capsys, monkeypatch, "train-tokenizer", preset, "--help")
    assert (VQ_PRESETS[preset].__doc__ or "").splitlines()[0] in text
    own = [f"--{f.name.replace('_', '-')}" for f in dataclasses.fields(TrainVQ) if f.name not in ("config", "preset")]
    for flag in [*own, *flags(VQTrainConfig)]:
        assert re.search(rf"(?m)^\W*{flag}\b", text), flag
    assert "--preset" not in text
    channels = VQ_PRESETS[preset]().model.channels
    assert re.search(rf"--model\.channels INT[^(]*\(default: {channels}\)", text)


# The whole way


def test_a_run_has_the_settings_given_and_the_presets_rest(trained: Path) -> None:
    saved = json.loads((trained / "config.json").read_text())
    assert saved["preset"] == "vq-cifar10"
    assert saved["images"]["source"] == "photos:train"
    expected = json.loads(json.dumps(dataclasses.asdict(VQ_PRESETS["vq-cifar10"]())))
    expected["model"] |= {"channels": 8, "multipliers": [1, 2], "z_channels": 8, "codebook_size": 16, "codebook_dim": 4}
    expected["adversary"] |= {"start": 1, "channels": 4}
    expected["optim"] |= {"schedule": "constant"}
    expected |= {"steps": 3, "batch_size": 4, "evaluate_images": 8, "log_every": 1, "dtype": "float32", "device": "cpu"}
    assert saved["config"] == expected
    log = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log] == [1, 2, 3, 3]
    assert ["loss_discriminator" in entry for entry in log[:3]] == [False, True, True]
    assert (log[3]["evaluated_on"], log[3]["images"]) == ("photos:test", 8)
    with Image.open(trained / "reconstructions" / "step_00000003.png") as picture:
        assert picture.size == (8 * 32, 2 * 32)


def test_the_run_is_a_tokenizer_that_tokenize_takes(trained: Path, tmp_path: Path, capsys: Capture) -> None:
    for index in range(5):
        path = tmp_path / "images" / "ab"[index % 2] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(noise(50, 40, index)))
    store = str(tmp_path / "store")
    arguments = ["--images", f"folder:{tmp_path / 'images'}", "--size", "32", "--crops", "center", "--out", store]
    main(["tokenize", "--tokenizer", str(trained), *arguments])
    assert capsys.readouterr().out == f"{store}: 5 images x 1 crop x 16 x 16 tokens; 2 classes of 2 to 3 images\n"
    tokenizer = load_tokenizer(trained)
    assert isinstance(tokenizer, VQTokenizer)
    assert tokenizer.config == VQConfig(
        channels=8, multipliers=(1, 2), z_channels=8, codebook_size=16, codebook_dim=4, residual_blocks=1
    )
    opened = TokenStore(Path(store))
    assert (opened.meta.tokenizer, opened.meta.vocab_size) == (tokenizer.fingerprint, 16)
    images = torch.from_numpy(np.stack([center_crop(noise(50, 40, index), 32) for index in (0, 2, 4, 1, 3)]))
    expected = tokenizer.encode(to_pixels(images)).flatten(1).numpy()
    np.testing.assert_array_equal(opened.codes(np.arange(5), np.zeros((5, 1), int))[:, 0], expected)


def test_what_a_finished_run_prints(run: Path, capsys: Capture) -> None:
    before = load_file(run / "vq.safetensors")
    main(command(run, "--steps", "3", "--optim.schedule", "constant", "--log-every", "1", "--resume"))
    assert capsys.readouterr().out == (f"{run}: tokenizer trained; reconstructions in {run / 'reconstructions'}\n")
    after = load_file(run / "vq.safetensors")
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize(
    ("preset", "flag", "value", "expected"),
    [
        ("vq-16", "--steps", "1", {"steps": 1, "epochs": None}),  # the preset has 40 epochs
        ("vq-cifar10", "--epochs=0.0004", "", {"steps": None, "epochs": 0.0004}),  # the preset has 3000 steps
    ],
)
def test_the_users_budget_replaces_the_presets(
    tmp_path: Path, preset: str, flag: str, value: str, expected: dict[str, Any]
) -> None:
    sizes = ["--size", "32", "--perceptual-weight", "0", "--adversary.layers", "2", "--model.residual-blocks", "1"]
    arguments = [*command(tmp_path / "run")[2:], *sizes, flag, *([value] if value else [])]
    main(["train-tokenizer", preset, *arguments])
    config = json.loads((tmp_path / "run" / "config.json").read_text())["config"]
    assert {name: config[name] for name in expected} == expected
    assert json.loads((tmp_path / "run" / "tokenizer.json").read_text())["step"] in (1, 2)


def test_kmeans_still_works(tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "kmeans"
    main(["train-tokenizer", "kmeans", "--images", "digits:test", "--vocab-size", "8", "--out", str(out)])
    assert capsys.readouterr().out == f"{out}: 8 codes of 4 x 4 pixels\n"
    assert (load_tokenizer(out).kind, load_tokenizer(out).vocab_size) == ("kmeans", 8)


# Mistakes


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((), "train-tokenizer has no preset: give one of kmeans, vq-16"),
        (("--images", "photos"), "train-tokenizer has no preset: .* before the options"),
        (("vq-cifar",), r"unknown preset 'vq-cifar': did you mean vq-cifar10\?"),
        (("k-means",), r"unknown preset 'k-means': did you mean kmeans\?"),
    ],
)
def test_an_unknown_word_is_answered_in_one_line(capsys: Capture, arguments: tuple[str, ...], match: str) -> None:
    refused(capsys, match, "train-tokenizer", *arguments)


@pytest.mark.parametrize(
    ("setting", "match"),
    [
        (("--steps", "3", "--epochs", "1"), "give --steps or --epochs, not both"),
        (("--model.channels", "24"), "--model.channels 24 times --model.multipliers 2 is 48"),
        (("--adversary.channels", "24"), "--adversary.channels 24 gives a layer 48 channels"),
        (("--size", "31"), "--size 31 is not a multiple of a code's 2 pixels"),
        (("--dtype", "float16"), "--dtype"),
        (("--optim.learning-rate", "1"), "--optim.learning-rate"),
    ],
)
def test_a_setting_out_of_range_is_named_and_nothing_is_written(
    capsys: Capture, tmp_path: Path, setting: tuple[str, ...], match: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(command(tmp_path / "run", *setting))
    assert stop.value.code == 2
    err = re.sub(r"[│\s]+", " ", capsys.readouterr().err)  # tyro wraps what it boxes
    assert match in err
    assert "Traceback" not in err
    assert contents(tmp_path) == {}


def test_mistakes_that_the_disk_must_not_suffer_from(capsys: Capture, trained: Path, tmp_path: Path) -> None:
    before = contents(trained)
    constant = ["--steps", "3", "--optim.schedule", "constant", "--log-every", "1"]
    refused(capsys, "holds a run already, with a checkpoint of step 3: give --resume", *command(trained, *constant))
    again = command(trained, *constant, "--resume")
    refused(capsys, r"other settings: commitment was 0\.25, now 0\.5\. Give", *again, "--commitment", "0.5")
    refused(capsys, "other settings: .*source was photos:train, now digits:test", *again, "--images", "digits:test")
    refused(capsys, "has done 3 steps already, more than the 2", *again, "--steps", "2")
    refused(capsys, "holds no run to resume", *command(tmp_path / "new", *constant, "--resume"))
    refused(capsys, "unknown image source 'photo'", *command(tmp_path / "new", "--images", "photo"))
    kmeans = ["train-tokenizer", "kmeans", "--images", "digits:test", "--out", trained]
    refused(capsys, "exists already and is not empty", *kmeans)
    assert contents(trained) == before
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_the_run_cannot_be_written_to(capsys: Capture, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    refused(capsys, "cannot write .*file", *command(tmp_path / "file" / "run", "--steps", "1"))
    assert contents(tmp_path) == {"file": b"precious"}
