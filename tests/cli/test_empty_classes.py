"""Classes without images: named, left out of balanced samples, and warned of when asked for."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from st_ar.cli import main
from st_ar.data.store import TokenStore
from st_ar.errors import note
from st_ar.evaluation.generation.sweep import SweptModel
from st_ar.model.weights import open_model

TINY = "--steps 1 --batch-size 4 --model.vocab-size 8 --model.dim 32 --model.n-heads 2 --model.n-layers 2 --log-every 1"


def run(command: str) -> None:
    main(command.split())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four classes, of which `bee` and `dog` have no images, a tokenizer, tokens and a model."""
    folder = tmp_path_factory.mktemp("classes")
    for label in ("ant", "bee", "cow", "dog"):
        (folder / "pictures" / label).mkdir(parents=True)
        for number in range(4 if label in ("ant", "cow") else 0):
            pixels = np.random.default_rng(number).integers(0, 256, (32, 32, 3), np.uint8)
            Image.fromarray(pixels).save(folder / "pictures" / label / f"{number}.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run("train-tokenizer kmeans --images folder:pictures --size 32 --vocab-size 8 --out tokenizer")
        run("tokenize --images folder:pictures --tokenizer tokenizer --size 32 --out tokens")
        run(f"train llamagen-photos --tokens tokens --out run --model.num-classes 4 {TINY}")
    return folder


@pytest.fixture
def sample(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> "Sample":
    monkeypatch.chdir(folder)
    return Sample(folder, capsys)


class Sample:
    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.capsys = folder, capsys

    def __call__(self, out: str, *options: str) -> tuple[list[int], str]:
        """Labels of the samples, and what was noted."""
        note.cache_clear()  # notes are printed once
        main(["sample", "--model", "run", "--tokenizer", "tokenizer", "--out", out, *options])
        return np.load(self.folder / out)["arr_1"].tolist(), self.capsys.readouterr().err


def test_the_store_and_the_model_know_them(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert TokenStore(folder / "tokens").empty_classes == [1, 3]
    assert open_model(folder / "run")[1].empty_classes == [1, 3]
    run(f"tokenize --images folder:{folder}/pictures --tokenizer {folder}/tokenizer --size 32 --out {folder}/again")
    assert "4 classes of 0 to 4 images, none of bee, dog" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "labels"),
    [
        (["--num", "5"], [0, 2, 0, 2, 0]),
        (["--per-class", "2"], [0, 2, 0, 2]),
    ],
)
def test_balanced_samples_leave_them_out(sample: Sample, options: list[str], labels: list[int]) -> None:
    found, noted = sample(f"{len(labels)}.npz", *options)
    assert found == labels
    assert "note: the model has seen no image of class 1, 3; they are left out, and --labels can name them\n" in noted


def test_random_samples_leave_them_out(sample: Sample) -> None:
    found, _ = sample("random.npz", "--num", "40", "--label-mode", "random")
    assert set(found) == {0, 2}


def test_one_that_is_asked_for_is_drawn_and_warned_of(sample: Sample) -> None:
    found, noted = sample("asked.npz", "--labels", "2", "3", "--num", "2")
    assert found == [2, 3]
    assert "note: the model has seen no image of class 3\n" in noted


def test_sweeps_leave_them_out(folder: Path) -> None:
    assert SweptModel(folder / "run", folder / "tokenizer", folder / "sweep", num=4).labels == [0, 2, 0, 2]


def test_a_converted_model_still_knows_them(folder: Path) -> None:
    main(["convert", str(folder / "run"), str(folder / "converted"), "--to", "st-ar"])
    assert json.loads((folder / "converted/config.json").read_text())["empty_classes"] == [1, 3]


@pytest.mark.parametrize(
    ("options", "origin"),
    [([], "off by default; --cfg-scale changes it"), (["--cfg-scale", "1.5"], "as given")],
)
def test_samples_record_where_the_scale_comes_from(sample: Sample, options: list[str], origin: str) -> None:
    name = f"scale{len(options)}"
    sample(f"{name}.npz", "--num", "2", *options)
    assert json.loads((sample.folder / f"{name}.json").read_text())["cfg_scale_origin"] == origin
