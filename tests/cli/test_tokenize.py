"""From a user's own images, broken ones among them, and from LlamaGen's tokens to a store, by command."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from st_ar import load_tokenizer
from st_ar.cli import main
from st_ar.data.source import Crops
from st_ar.data.store import TokenStore
from st_ar.errors import note
from st_ar.tokenizer import to_pixels
from tests.data.pictures import broken_pictures, encoded, noise
from tests.data.test_llamagen import write_llamagen
from tests.data.test_tables import table, write

Capture = pytest.CaptureFixture[str]


def st_ar(*arguments: str | Path) -> None:
    main([str(argument) for argument in arguments])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of 10 images, one of them broken, and a tokenizer trained on them."""
    for index in range(20):
        path = tmp_path / "images" / ("ant", "bee")[index % 2] / f"{index:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(noise(40, 30, index)))
    (tmp_path / "images" / "bee" / "05.png").write_bytes(broken_pictures()["truncated png"])
    images = f"folder:{tmp_path / 'images'}"
    st_ar("train-tokenizer", "kmeans", "--images", images, "--size", "16", "--vocab-size", "8", "--out", tmp_path / "t")
    return tmp_path


def test_a_folder_with_a_broken_image_becomes_a_store(folder: Path, capsys: Capture) -> None:
    command = ["tokenize", "--images", f"folder:{folder / 'images'}", "--tokenizer", folder / "t", "--size", "16"]
    with pytest.raises(SystemExit):
        st_ar(*command, "--out", folder / "store")
    assert (
        "1 of 20 images cannot be used, more than --max-skipped 0.01; the first is bee/05.png"
        in capsys.readouterr().err
    )
    st_ar(*command, "--out", folder / "store", "--max-skipped", "0.1", "--workers", "1")
    listed = folder / "store" / "skipped.jsonl"
    assert capsys.readouterr().out == (
        f"{folder / 'store'}: 19 images x 10 crops x 4 x 4 tokens; 2 classes of 9 to 10 images; 1 unusable image, listed in {listed}\n"
    )
    store = TokenStore(folder / "store")
    assert store.meta.class_names == ["ant", "bee"]
    assert store.labels.tolist() == [0] * 10 + [1] * 9
    cut = Crops(kind="ten", size=16, range=1.1).cut(noise(40, 30, 2))
    expected = load_tokenizer(folder / "t").encode(to_pixels(torch.from_numpy(cut.copy()))).flatten(1).numpy()
    np.testing.assert_array_equal(store.codes(np.array([1]), np.arange(10)[None])[0], expected)


def test_parquet_files_with_five_crops_and_with_one(folder: Path, capsys: Capture) -> None:
    path = write(folder / "train.parquet", table(7))
    command = ["tokenize", "--images", f"parquet:{path}", "--tokenizer", folder / "t", "--size", "16"]
    st_ar(*command, "--no-mirror", "--crop-range", "1.125", "--out", folder / "five")
    st_ar(*command, "--crops", "center", "--out", folder / "one")
    out = capsys.readouterr().out
    assert f"{folder / 'five'}: 7 images x 5 crops x 4 x 4 tokens; 3 classes of " in out
    assert f"{folder / 'one'}: 7 images x 1 crop x 4 x 4 tokens; 3 classes of " in out
    whole = Crops(kind="center", size=16, range=1.0).cut(noise(seed=3))  # LlamaGen's centre crop is not enlarged first
    expected = load_tokenizer(folder / "t").encode(to_pixels(torch.from_numpy(whole.copy()))).flatten(1).numpy()
    found = TokenStore(folder / "one").codes(np.array([3]), np.array([[0]]))[0]
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(("size", "enlarged"), [((32, 40), True), ((300, 128), True), ((130, 129), False)])
def test_a_forgotten_size_that_enlarges_images_is_noted(
    tmp_path: Path, capsys: Capture, size: tuple[int, int], enlarged: bool
) -> None:
    (tmp_path / "images").mkdir()
    for index in range(2):
        (tmp_path / "images" / f"{index}.png").write_bytes(encoded(noise(*size, index)))
    command = ["--images", f"folder:{tmp_path / 'images'}", "--out"]
    kmeans = ["train-tokenizer", "kmeans", *command, tmp_path / "t", "--vocab-size", "8", "--patch", "64"]
    for arguments in (kmeans, ["tokenize", "--tokenizer", tmp_path / "t", *command, tmp_path / "store"]):
        note.cache_clear()  # notes are printed once in a process
        st_ar(*arguments)
        side = f"of {min(size)} pixels, enlarged to 256 by default: --size {min(size)} keeps it\n"
        assert (f"note: the first image has a shorter side {side}" in capsys.readouterr().err) == enlarged
    st_ar(*arguments[:-1], tmp_path / "given", "--size", "256")
    # The digits have 8 pixels, and a default size of their own.
    st_ar("train-tokenizer", "kmeans", "--images", "digits", "--out", tmp_path / "digits")
    assert "enlarged" not in capsys.readouterr().err


def test_llamagens_tokens_are_imported(tmp_path: Path, capsys: Capture) -> None:
    codes = write_llamagen(tmp_path)
    write_llamagen(tmp_path, name="more", seed=1)
    folders = ["--codes", tmp_path / "codes", "--labels", tmp_path / "labels", "--more-codes", tmp_path / "more"]
    st_ar("import-tokens", *folders, "--num-classes", "1000", "--out", tmp_path / "store")
    assert (
        capsys.readouterr().out
        == f"{tmp_path / 'store'}: 13 images x 20 crops x 3 x 3 tokens; 1000 classes of 0 to 4 images, none of 4, 5, 6, 7, 8 and 991 more\n"
    )
    store = TokenStore(tmp_path / "store")
    assert json.loads((tmp_path / "store" / "meta.json").read_text())["vocab_size"] == 16384
    np.testing.assert_array_equal(store.codes(np.array([4]), np.arange(10)[None])[0], codes[4])


def test_an_import_with_a_tokenizer_of_another_codebook_is_refused(folder: Path, capsys: Capture) -> None:
    write_llamagen(folder)
    with pytest.raises(SystemExit):
        st_ar(
            *("import-tokens", "--codes", folder / "codes", "--labels", folder / "labels"),
            *("--tokenizer", folder / "t", "--out", folder / "store"),
        )
    assert "has 8 codes, and --vocab-size is 16384: give the same number" in capsys.readouterr().err
    assert not (folder / "store").exists()


@pytest.mark.parametrize(("flag", "value"), [("--workers", "-1"), ("--batch-size", "0"), ("--max-skipped", "2")])
def test_settings_out_of_range_are_refused(folder: Path, capsys: Capture, flag: str, value: str) -> None:
    command = ["tokenize", "--images", f"folder:{folder / 'images'}", "--tokenizer", folder / "t", "--size", "16"]
    with pytest.raises(SystemExit):
        st_ar(*command, "--out", folder / "store", flag, value)
    err = capsys.readouterr().err
    assert flag in err
    assert err.count("\n") == 1
    assert not (folder / "store").exists()
