"""PSNR, SSIM and the use of a codebook, and the pictures that show them."""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from st_ar.cli import main
from st_ar.data.images import open_images
from st_ar.data.source import Example, ImageSource, center_crop
from st_ar.errors import UserError
from st_ar.evaluation import reconstruction
from st_ar.evaluation.generation.features import Compute
from st_ar.evaluation.generation.image_sets import from_source, open_files
from st_ar.evaluation.metrics import frechet_distance, mean_and_covariance
from st_ar.evaluation.reconstruction import (
    evaluation_images,
    measure_tokenizer,
    psnr,
    reconstruct,
    save_picture,
    ssim,
)
from st_ar.tokenizer import to_pixels, to_uint8
from st_ar.tokenizer.kmeans import KMeansTokenizer
from tests.data.pictures import broken_pictures, encoded, noise
from tests.disk import contents
from tests.evaluation.generation.test_evaluate import pictures, save_folder, toy
from tests.small_line import random_source, random_tokenizer


def photographs(count: int = 6) -> np.ndarray:
    """Patches of photographs, uint8 [count, 36, 36, 3]."""
    return np.stack([np.asarray(example.read()) for example in islice(open_images("photos").examples(0), count)])


def blurred(images: np.ndarray) -> np.ndarray:
    """The images at half the resolution, enlarged again."""
    size = images.shape[1]
    small = [Image.fromarray(image).resize((size // 2, size // 2)) for image in images]
    return np.stack([np.asarray(image.resize((size, size))) for image in small])


# PSNR


@pytest.mark.parametrize(("difference", "expected"), [(255, 0.0), (1, 20 * math.log10(255)), (51, 20 * math.log10(5))])
def test_psnr_of_a_constant_difference(difference: int, expected: float) -> None:
    black = torch.zeros(1, 5, 7, 3, dtype=torch.uint8)
    assert psnr(black, black + difference).tolist() == pytest.approx([expected])
    assert psnr(black + difference, black).tolist() == pytest.approx([expected])


def test_psnr_is_of_each_pair_and_infinite_for_equals() -> None:
    true = photographs()
    made = blurred(true)
    made[2] = true[2]
    found = psnr(torch.from_numpy(true), torch.from_numpy(made)).tolist()
    assert found[2] == math.inf
    for index in (0, 1, 3, 4, 5):
        assert found[index] == pytest.approx(peak_signal_noise_ratio(true[index], made[index]), rel=1e-5)


# SSIM


def expected_ssim(a: np.ndarray, b: np.ndarray) -> float:
    settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    return float(structural_similarity(a, b, data_range=255, channel_axis=-1, **settings))


@given(height=st.integers(11, 30), width=st.integers(11, 30), seed=st.integers(0, 99), spread=st.integers(1, 120))
def test_ssim_is_scikit_images_on_noise(height: int, width: int, seed: int, spread: int) -> None:
    a = np.asarray(noise(width, height, seed))
    change = np.random.default_rng(seed + 1).integers(-spread, spread + 1, a.shape)
    b = (a + change).clip(0, 255).astype(np.uint8)
    found = ssim(torch.from_numpy(a.copy())[None], torch.from_numpy(b)[None])
    assert found.item() == pytest.approx(expected_ssim(a, b), abs=1e-6)


def test_ssim_is_scikit_images_on_photographs() -> None:
    true = photographs()
    made = blurred(true)
    found = ssim(torch.from_numpy(true), torch.from_numpy(made)).tolist()
    assert found == pytest.approx([expected_ssim(a, b) for a, b in zip(true, made, strict=True)], abs=1e-6)
    assert max(found) - min(found) > 0.05  # they differ, so that mixing them up would show


@pytest.mark.parametrize(("height", "width", "fine"), [(11, 11, True), (10, 11, False), (40, 10, False)])
def test_images_smaller_than_the_window_are_refused(height: int, width: int, fine: bool) -> None:
    images = torch.zeros(1, height, width, 3, dtype=torch.uint8)
    if fine:
        assert ssim(images, images).item() == pytest.approx(1)
    else:
        with pytest.raises(UserError, match=f"windows of 11 pixels: images of {height} x {width} are too small"):
            ssim(images, images)


# Tokenizers

GREYS = (-1.0, -0.25, 0.25, 1.0)


def grey_tokenizer() -> KMeansTokenizer:
    """Four codes: patches of 4 x 4 pixels in four greys."""
    return KMeansTokenizer(torch.tensor(GREYS)[:, None].expand(4, 48).contiguous(), patch=4)


def grey_images(codes: list[list[int]]) -> np.ndarray:
    """Images of 12 x 12 pixels that have just these nine codes each."""
    greys = (
        torch.tensor(GREYS)[torch.tensor(codes)].reshape(-1, 1, 3, 3).repeat_interleave(4, 2).repeat_interleave(4, 3)
    )
    return to_uint8(greys.expand(-1, 3, -1, -1)).numpy()


def test_usage_and_perplexity_count_codes_over_all_images() -> None:
    images = grey_images([[0] * 9, [0, 0, 0, 1, 1, 1, 3, 3, 3]])
    made, found = reconstruct(grey_tokenizer(), images)
    np.testing.assert_array_equal(made, images)
    shares = [12 / 18, 3 / 18, 3 / 18]
    assert found.usage == 0.75
    assert found.perplexity == pytest.approx(math.exp(-sum(share * math.log(share) for share in shares)))
    assert (found.psnr, found.ssim) == (pytest.approx(10 * math.log10(255**2 * images[0].size), rel=1e-6), 1.0)


@pytest.mark.parametrize(("codes", "perplexity"), [([2] * 9, 1.0), ([0, 1, 3] * 3, 3.0)])
def test_perplexity_is_the_number_of_codes_that_are_used_alike(codes: list[int], perplexity: float) -> None:
    assert reconstruct(grey_tokenizer(), grey_images([codes]))[1].perplexity == pytest.approx(perplexity)


@pytest.mark.parametrize("batch_size", [1, 4, 6, 64])
def test_what_is_measured_is_the_mean_over_images_whatever_the_batch(batch_size: int) -> None:
    images = np.stack([center_crop(Image.fromarray(image), 12) for image in photographs()])
    made, found = reconstruct(grey_tokenizer(), images, batch_size)
    tokenizer = grey_tokenizer()
    expected = to_uint8(tokenizer.decode(tokenizer.encode(to_pixels(torch.from_numpy(images))))).numpy()
    np.testing.assert_array_equal(made, expected)
    pairs = list(zip(images, expected, strict=True))
    assert found.psnr == pytest.approx(np.mean([peak_signal_noise_ratio(a, b) for a, b in pairs]), rel=1e-5)
    assert found.ssim == pytest.approx(np.mean([expected_ssim(a, b) for a, b in pairs]), abs=1e-6)


def test_an_image_that_comes_back_exactly_counts_as_off_by_one_level() -> None:
    images = np.stack([np.full((12, 12, 3), 128, np.uint8), center_crop(Image.fromarray(photographs()[0]), 12)])
    tokenizer = grey_tokenizer()
    exact = to_uint8(tokenizer.decode(tokenizer.encode(to_pixels(torch.from_numpy(images[:1]))))).numpy()
    images[0] = exact[0]
    made, found = reconstruct(tokenizer, images)
    np.testing.assert_array_equal(made[0], images[0])
    other = peak_signal_noise_ratio(images[1], made[1])
    assert found.psnr == pytest.approx((10 * np.log10(255**2 * 12 * 12 * 3) + other) / 2, rel=1e-5)


# Images to measure on


def numbered(total: int, **changes: object) -> ImageSource:
    """Images of one colour, which says their number."""

    def examples(start: int) -> Iterator[Example]:
        for index in range(start, total):
            yield Example(Image.new("RGB", (20, 16), (index // 256, index % 256, 7)), 0)

    source = ImageSource(
        name="numbers", class_names=["a"], count=total, examples=examples, size=12, crop_range=1, mirror=True
    )
    return replace(source, **changes)


def numbers(images: np.ndarray) -> list[int]:
    return (images[:, 0, 0, 0].astype(int) * 256 + images[:, 0, 0, 1]).tolist()


@given(total=st.integers(1, 700), count=st.integers(1, 100))
def test_so_many_different_images_from_all_over_the_source(total: int, count: int) -> None:
    images = evaluation_images(numbered(total), 12, count)
    assert images.shape[1:] == (12, 12, 3)
    found = numbers(images)
    assert len(found) == min(count, total)
    assert sorted(set(found)) == found
    if count >= 16:  # from 16 places, the first at the beginning and the last at the end
        assert (found[0], found[-1]) == (0, total - 1)
        assert np.diff(found).max() <= max(0, total - count) // 15 + 2


@pytest.mark.parametrize("changes", [{"streaming": True}, {"count": None}])
def test_of_a_stream_or_a_source_of_unknown_length_the_first(changes: dict[str, object]) -> None:
    assert numbers(evaluation_images(numbered(300, **changes), 12, 20)) == list(range(20))


def test_they_are_centre_crops() -> None:
    (found,) = evaluation_images(numbered(1, examples=lambda _: iter([Example(noise(31, 19), 0)])), 12, 5)
    np.testing.assert_array_equal(found, center_crop(noise(31, 19), 12))


def test_broken_images_are_passed_over_and_a_source_of_nothing_else_is_refused() -> None:
    broken = [Example(data, 0, name) for name, data in broken_pictures().items()]
    broken.append(Example(Image.new("RGB", (1, 1_000_000)), 0, "too narrow to be enlarged"))
    whole = Example(encoded(noise(20, 16)), 0, "whole")
    mixed = [*broken, whole, *broken]
    source = numbered(1, count=len(mixed), examples=lambda start: iter(mixed[start:]))
    assert len(evaluation_images(source, 12, 100)) == 1
    with pytest.raises(UserError, match="numbers has no readable image"):
        evaluation_images(replace(source, examples=lambda start: iter(broken[start:]), count=len(broken)), 12, 100)


# Pictures


def flat(values: range) -> np.ndarray:
    """Images of 2 x 2 pixels in one grey each."""
    return np.stack([np.full((2, 2, 3), value, np.uint8) for value in values])


@pytest.mark.parametrize(
    ("images", "count", "columns", "expected"),
    [
        (1, 32, 8, [[0]]),
        (5, 32, 8, [[0, 1, 2, 3, 4]]),
        (8, 32, 8, [[0, 1, 2, 3, 4, 5, 6, 7]]),
        (11, 32, 4, [[0, 1, 2, 4], [5, 7, 8, 10]]),  # 8 of 11 are shown, evenly spread
        (9, 3, 8, [[0, 4, 8]]),
        (60, 6, 3, [[0, 11, 23], [35, 47, 59]]),
        (60, 7, 3, [[0, 11, 23], [35, 47, 59]]),
    ],
)
def test_each_image_is_shown_above_its_reconstruction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, images: int, count: int, columns: int, expected: list[list[int]]
) -> None:
    monkeypatch.setattr(reconstruction, "SHOWN", count)
    path = tmp_path / "new" / "picture.png"
    save_picture(path, flat(range(images)), flat(range(100, 100 + images)), columns)
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        pixels = np.asarray(picture)
    rows = [row for chosen in expected for row in (chosen, [100 + index for index in chosen])]
    np.testing.assert_array_equal(pixels[::2, ::2, 0], rows)
    np.testing.assert_array_equal(pixels, pixels[::2, ::2].repeat(2, 0).repeat(2, 1))  # nothing beside the images


def test_a_picture_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    with pytest.raises(UserError, match=r"cannot write .*picture\.png"):
        save_picture(tmp_path / "file" / "picture.png", flat(range(1)), flat(range(1)))
    assert (tmp_path / "file").read_text() == "precious"


Capture = pytest.CaptureFixture[str]


def test_the_numbers_are_those_of_the_whole_set_whatever_the_batches(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", arr_0=pictures(20))
    tokenizer, extractor = random_tokenizer(), toy()
    made, expected = reconstruct(tokenizer, pictures(20))
    real, drawn = (
        mean_and_covariance(extractor.run(torch.from_numpy(x)).features.numpy()) for x in (pictures(20), made)
    )
    for batch_size in (1, 6, 64):
        images = open_files(str(tmp_path / "a.npz"))
        found = measure_tokenizer(tokenizer, images, extractor, Compute(batch_size=batch_size))["metrics"]
        assert list(found) == ["rFID", "PSNR (dB)", "SSIM", "codebook usage", "codebook perplexity"]
        assert found["rFID"] == pytest.approx(frechet_distance(*real, *drawn), rel=1e-4)
        assert list(found.values())[1:] == pytest.approx(list(expected), rel=1e-5)


def test_the_picture_shows_each_image_above_its_reconstruction(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", arr_0=pictures(100))
    images = open_files(str(tmp_path / "a.npz"))
    measure_tokenizer(random_tokenizer(), images, None, Compute(), picture=tmp_path / "shown.png")
    shown = np.asarray(Image.open(tmp_path / "shown.png"))
    assert shown.shape == (8 * 12, 8 * 12, 3)
    made, _ = reconstruct(random_tokenizer(), pictures(100))
    np.testing.assert_array_equal(shown[:12, :12], pictures(100)[0])
    np.testing.assert_array_equal(shown[-12:, -12:], made[99])


def reconstruct_command(folder: Path, count: int, size: int = 12) -> list[str]:
    """The command for a tokenizer and a file of pictures that this writes."""
    np.savez(folder / "a.npz", arr_0=pictures(count, size=size))
    random_tokenizer().save(folder / "t")
    files = f"--tokenizer {folder / 't'} --images {folder / 'a.npz'}"
    return ["reconstruct", *files.split(), "--device", "cpu"]


def test_every_reconstruction_is_kept_as_an_image_that_evaluate_reads(tmp_path: Path, capsys: Capture) -> None:
    command = reconstruct_command(tmp_path, 7)
    command += ["--extractor", "none", "--batch-size", "3", "--save", str(tmp_path / "made")]
    main(command)
    made, _ = reconstruct(random_tokenizer(), pictures(7))
    kept = open_files(str(tmp_path / "made"))
    np.testing.assert_array_equal(np.stack([image for _, image in kept.read(0, 1)]), made)
    before = contents(tmp_path / "made")
    with pytest.raises(SystemExit):
        main(command)
    assert "choose another --save" in capsys.readouterr().err
    assert contents(tmp_path / "made") == before


def test_a_reconstruction_that_fails_leaves_no_folder(tmp_path: Path) -> None:
    command = reconstruct_command(tmp_path, 7)
    saved = ["--save", str(tmp_path / "made"), "--out", str(tmp_path / "a.npz" / "x.png")]
    with pytest.raises(SystemExit):
        main([*command, "--extractor", "none", *saved])
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["a.npz", "t"]


def test_broken_images_are_counted_and_listed(tmp_path: Path, capsys: Capture) -> None:
    command = reconstruct_command(tmp_path, 1)
    folder = save_folder(tmp_path / "images", pictures(9))
    (folder / "000004.png").write_bytes(b"")
    command = [f"folder:{folder}" if part.endswith("a.npz") else part for part in command]
    command += ["--size", "12", "--extractor", "none", "--json", str(tmp_path / "found.json")]
    with pytest.raises(SystemExit):
        main(command)
    assert "1 of 9 images cannot be used, more than --max-skipped 0.01; the first is 000004.png: empty." in (
        capsys.readouterr().err
    )
    main([*command, "--max-skipped", "0.2"])
    result = json.loads((tmp_path / "found.json").read_text())
    assert (result["images"]["count"], result["images"]["skipped"]) == (8, 1)
    assert result["images"]["skipped_images"] == [{"index": 4, "name": "000004.png", "reason": "empty"}]
    note = f"folder:{folder}: 1 of 9 images cannot be used and are left out: 000004.png (empty)"
    assert result["notes"] == [note]
    assert f"note: {note}\n" in capsys.readouterr().err
    evaluation_images(replace(open_images(f"folder:{folder}"), name="another name"), 12, 9)
    assert "note: another name: 1 of 9 images cannot be used" in capsys.readouterr().err


def test_images_that_do_not_suit_the_tokenizer_are_refused() -> None:
    with pytest.raises(UserError, match="5 pixels cannot be cut into 2-pixel patches"):
        measure_tokenizer(random_tokenizer(), from_source(random_source(size=6), 5), None, Compute())


def test_reconstruct_by_command_never_says_fid_of_another_network(tmp_path: Path, capsys: Capture) -> None:
    command = reconstruct_command(tmp_path, 12, size=32)
    main(
        [*command, "--extractor", "efficientnet", "--json", str(tmp_path / "r.json"), "--out", str(tmp_path / "r.png")]
    )
    out = capsys.readouterr().out
    assert re.search(r"^rFD-EfficientNet-Lite0 +\d+\.\d{3}$", out, flags=re.MULTILINE)
    assert "FID" not in out
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["images"]["count"] == 12
    assert result["tokenizer"]["fingerprint"] == random_tokenizer().fingerprint
    main([*command, "--extractor", "none", "--json", "-"])
    assert list(json.loads(capsys.readouterr().out)["metrics"]) == list(result["metrics"])[1:]
    with pytest.raises(SystemExit):
        main([*command, "--extractor", "none", "--out", "x.jpg"])
    assert "is not a PNG file: give a name that ends in .png" in capsys.readouterr().err
