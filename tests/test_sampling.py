"""The sampling job: the right labels, the right pictures, and files that say how they were made."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import st_ar
from st_ar.errors import UserError
from st_ar.files import sha256
from st_ar.model.generate import generate
from st_ar.model.weights import open_model
from st_ar.randomness import Purpose, torch_seed
from st_ar.sampling import SampleSettings, check_output, choose_labels, sample_images, save_samples
from tests.disk import contents, full_disk, refused
from tests.small_line import SmallLine, make_line, random_tokenizer
from tests.toys import random_model

# Labels


@given(st.integers(1, 40), st.integers(1, 7), st.integers(0, 5))
def test_balanced_labels_take_the_classes_in_turn(num: int, num_classes: int, seed: int) -> None:
    expected = [index % num_classes for index in range(num)]
    assert choose_labels(num, num_classes, seed, mode="balanced") == expected


def test_chosen_classes_come_in_the_order_given() -> None:
    assert choose_labels(5, 9, 0, mode="balanced", only=(7, 2)) == [7, 2, 7, 2, 7]


def test_random_labels_are_even_and_a_function_of_the_seed() -> None:
    labels = choose_labels(3000, 3, 0, mode="random")
    assert labels == choose_labels(3000, 3, 0, mode="random")
    assert labels != choose_labels(3000, 3, 1, mode="random")
    assert np.bincount(labels).tolist() == pytest.approx([1000] * 3, abs=110)  # 4 standard deviations
    assert set(choose_labels(100, 9, 0, mode="random", only=(7, 2))) == {2, 7}


@pytest.mark.parametrize("mode", ["balanced", "random"])
@pytest.mark.parametrize("label", [-1, 3])
def test_a_class_that_the_model_does_not_know_is_refused(mode: str, label: int) -> None:
    with pytest.raises(UserError, match=f"--labels {label} is out of range: the model knows classes 0 to 2"):
        choose_labels(4, 3, 0, mode=mode, only=(0, label))  # 3 would be the null class


@pytest.mark.parametrize("num", [0, -5])
def test_no_images_are_refused(num: int) -> None:
    with pytest.raises(UserError, match=f"--num must be at least 1, not {num}"):
        choose_labels(num, 3, 0, mode="balanced")


# Images


def painted(codes: torch.Tensor) -> np.ndarray:
    """Pictures of codes [B, 9], pixel by pixel: ADM's clamp(127.5 x + 128), truncated."""
    codebook = random_tokenizer().codebook.double().numpy().reshape(11, 3, 2, 2)
    pictures = np.zeros((len(codes), 6, 6, 3), np.uint8)
    for picture, image in zip(pictures, codes.tolist(), strict=True):
        for row in range(6):
            for column in range(6):
                patch = codebook[image[3 * (row // 2) + column // 2]]
                picture[row, column] = np.clip(127.5 * patch[:, row % 2, column % 2] + 128, 0, 255).astype(np.uint8)
    return pictures


def test_pictures_are_the_tokens_of_each_batch_painted() -> None:
    model, labels = random_model(), [0, 1, 2, 0, 1]
    settings = SampleSettings(seed=4, batch_size=2, temperature=0.8, top_k=7, cfg_scale=2.0)
    tokens = [
        generate(
            model,
            torch.tensor(labels[start : start + 2]),
            seed=torch_seed(4, Purpose.SAMPLING, start),
            temperature=0.8,
            top_k=7,
            cfg_scale=2.0,
        )
        for start in (0, 2, 4)
    ]
    images = sample_images(model, random_tokenizer(), labels, settings)
    assert images.dtype == np.uint8
    # One level is the rounding of float32 before the truncation.
    assert np.abs(images.astype(int) - painted(torch.cat(tokens)).astype(int)).max() <= 1


def test_a_seed_gives_the_same_images_and_another_seed_others() -> None:
    model, tokenizer, labels = random_model(), random_tokenizer(), [0, 1, 2]
    first = sample_images(model, tokenizer, labels, SampleSettings(seed=0))
    torch.rand(7)  # the global generator has no part in it
    np.testing.assert_array_equal(sample_images(model, tokenizer, labels, SampleSettings(seed=0)), first)
    assert not np.array_equal(sample_images(model, tokenizer, labels, SampleSettings(seed=1)), first)


@pytest.mark.parametrize("cfg_scale", [1.0, 3.0])
def test_the_likeliest_token_alone_is_greedy_sampling(cfg_scale: float) -> None:
    model, labels = random_model(), [2, 0]
    images = sample_images(model, random_tokenizer(), labels, SampleSettings(top_k=1, cfg_scale=cfg_scale))
    tokens = generate(model, torch.tensor(labels), greedy=True, cfg_scale=cfg_scale)
    assert np.abs(images.astype(int) - painted(tokens).astype(int)).max() <= 1


def test_a_tokenizer_of_another_codebook_is_refused() -> None:
    with pytest.raises(UserError, match="the tokenizer has 12 codes, the model 11"):
        sample_images(random_model(), random_tokenizer(12), [0])


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(UserError, match="temperature must be above 0, not 0"):
        sample_images(random_model(), random_tokenizer(), [0], SampleSettings(temperature=0.0))
    with pytest.raises(UserError, match="label 9 is out of range"):
        sample_images(random_model(), random_tokenizer(), [9])


def test_guidance_without_end_is_refused() -> None:
    with pytest.raises(UserError, match="guidance scale"):  # it makes NaN of the logits
        sample_images(random_model(), random_tokenizer(), [0], SampleSettings(cfg_scale=float("inf")))


@pytest.mark.parametrize("batch_size", [0, -1])
def test_a_batch_of_no_images_is_refused(batch_size: int) -> None:
    with pytest.raises(UserError, match="batch-size"):
        sample_images(random_model(), random_tokenizer(), [0], SampleSettings(batch_size=batch_size))


# Files


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> SmallLine:
    return make_line(tmp_path_factory.mktemp("line"))


LABELS = [0, 2, 1]
SETTINGS = SampleSettings(seed=9, top_k=5, cfg_scale=1.5)


def noise(count: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 6, 6, 3)).astype(np.uint8)


def save(line: SmallLine, out: Path, *, ema: bool = False) -> None:
    _, info = open_model(line.model, ema=ema)
    save_samples(out, noise(), LABELS, SETTINGS, info, random_tokenizer())


def test_an_npz_has_adms_layout(line: SmallLine, tmp_path: Path) -> None:
    save(line, tmp_path / "deep" / "samples.npz")
    assert set(contents(tmp_path)) == {"deep/samples.npz", "deep/samples.json"}
    with np.load(tmp_path / "deep" / "samples.npz", allow_pickle=False) as saved:
        assert set(saved) == {"arr_0", "arr_1"}
        assert (saved["arr_0"].dtype, saved["arr_1"].dtype) == (np.uint8, np.int64)
        np.testing.assert_array_equal(saved["arr_0"], noise())
        assert saved["arr_1"].tolist() == LABELS


def test_pngs_hold_every_pixel(line: SmallLine, tmp_path: Path) -> None:
    save(line, tmp_path / "samples")
    names = [f"{index:06d}.png" for index in range(3)]
    assert set(contents(tmp_path / "samples")) == {*names, "metadata.json"}
    for name, image in zip(names, noise(), strict=True):
        with Image.open(tmp_path / "samples" / name) as opened:
            assert (opened.format, opened.mode) == ("PNG", "RGB")
            np.testing.assert_array_equal(np.asarray(opened), image)


@pytest.mark.parametrize(("out", "metadata"), [("samples.npz", "samples.json"), ("samples", "samples/metadata.json")])
@pytest.mark.parametrize("ema", [False, True])
def test_samples_say_how_they_were_made(line: SmallLine, tmp_path: Path, out: str, metadata: str, ema: bool) -> None:
    save(line, tmp_path / out, ema=ema)
    saved = json.loads((tmp_path / metadata).read_text())
    weights = line.model / ("ema.safetensors" if ema else "model.safetensors")
    assert saved["weights"] == {"file": weights.name, "sha256": sha256(weights), "ema": ema, "step": 7}
    assert saved["tokenizer"] == random_tokenizer().fingerprint
    assert saved["settings"] == asdict(SETTINGS)
    assert (saved["images"], saved["labels"]) == (3, LABELS)
    assert saved["environment"]["torch"] == torch.__version__
    assert saved["environment"]["st_ar"] == st_ar.__version__


def test_an_existing_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "samples.npz").write_bytes(b"precious")
    with refused(tmp_path, "samples.npz exists already and is not empty"):
        check_output(tmp_path / "samples.npz")


def test_an_existing_folder_is_refused_unless_it_is_empty(tmp_path: Path) -> None:
    check_output(tmp_path / "new")
    check_output(tmp_path / "new.npz")
    (tmp_path / "folder").mkdir()
    check_output(tmp_path / "folder")
    (tmp_path / "folder" / "000000.png").write_bytes(b"precious")
    with refused(tmp_path, "folder exists already and is not empty"):
        check_output(tmp_path / "folder")


def test_a_file_in_the_way_of_the_metadata_is_refused(tmp_path: Path) -> None:
    (tmp_path / "samples.json").write_bytes(b"precious")
    with refused(tmp_path, "samples.json exists already"):
        check_output(tmp_path / "samples.npz")


@pytest.mark.parametrize("name", ["samples.png", "samples.NPZ", "samples.v2"])
def test_another_kind_of_file_is_refused(tmp_path: Path, name: str) -> None:
    with refused(tmp_path, "to a .npz file or to a folder of PNGs"):
        check_output(tmp_path / name)


def test_a_full_disk_leaves_no_half_written_file(line: SmallLine, tmp_path: Path) -> None:
    with refused(tmp_path, r"cannot write .*samples\.npz: File too large; nothing there was changed"), full_disk(200):
        save(line, tmp_path / "samples.npz")
