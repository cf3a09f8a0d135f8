"""PSNR, SSIM and the use of a codebook, and the pictures that show them."""

import math
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

from st_ar.data.images import open_images
from st_ar.data.source import Example, ImageSource, center_crop
from st_ar.errors import UserError
from st_ar.evaluation.reconstruction import evaluation_images, psnr, reconstruct, save_picture, ssim
from st_ar.tokenizer import to_pixels, to_uint8
from st_ar.tokenizer.kmeans import KMeansTokenizer
from tests.data.pictures import broken_pictures, encoded, noise


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


def test_psnr_of_one_wrong_pixel() -> None:
    a = torch.full((1, 4, 4, 3), 100, dtype=torch.uint8)
    b = a.clone()
    b[0, 1, 2, 0] = 112  # mean squared error 144 / 48 = 3
    assert psnr(a, b).item() == pytest.approx(10 * math.log10(255**2 / 3))


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


def test_ssim_of_equal_and_of_opposite_images() -> None:
    true = torch.from_numpy(photographs())
    assert ssim(true, true).tolist() == pytest.approx([1.0] * 6)
    assert ssim(true, 255 - true).max() < 0.3
    assert ssim(true, 255 - true).min() < -0.8


def test_ssim_of_two_flat_images() -> None:
    a, b = (torch.full((1, 16, 16, 3), value, dtype=torch.uint8) for value in (100, 150))
    c1 = (0.01 * 255) ** 2
    assert ssim(a, b).item() == pytest.approx((2 * 100 * 150 + c1) / (100**2 + 150**2 + c1), abs=1e-6)


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
    with pytest.raises(UserError, match="numbers has no image that can be read"):
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
    tmp_path: Path, images: int, count: int, columns: int, expected: list[list[int]]
) -> None:
    path = tmp_path / "new" / "picture.png"
    save_picture(path, flat(range(images)), flat(range(100, 100 + images)), count, columns)
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
