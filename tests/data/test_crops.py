"""Crops against ADM's own procedure, line by line, and against images whose pixels say where they are."""

from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from st_ar.data.source import Crops, Kind, center_crop, five_crops
from st_ar.errors import UserError

PLACES = ["top-left", "top-right", "bottom-left", "bottom-right", "center"]


def slow_center_crop(image: Image.Image, size: int) -> np.ndarray:
    """guided-diffusion's center_crop_arr, and a crop that copies pixel by pixel."""
    while min(*image.size) >= 2 * size:
        image = image.resize(tuple(x // 2 for x in image.size), resample=Image.Resampling.BOX)
    scale = size / min(*image.size)
    image = image.resize(tuple(round(x * scale) for x in image.size), resample=Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    pixels = [[image.getpixel((left + x, top + y)) for x in range(size)] for y in range(size)]
    return np.array(pixels, np.uint8)


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def coordinates(side: int) -> np.ndarray:
    """An image [side, side, 3] each of whose pixels says its row and column."""
    rows, columns = np.mgrid[:side, :side]
    return np.stack([rows % 256, columns % 256, 16 * (rows // 256) + columns // 256], axis=-1).astype(np.uint8)


@given(width=st.integers(1, 70), height=st.integers(1, 70), size=st.integers(1, 24), seed=st.integers(0, 99))
def test_center_crop_is_guided_diffusions(width: int, height: int, size: int, seed: int) -> None:
    image = noise(width, height, seed)
    np.testing.assert_array_equal(center_crop(image, size), slow_center_crop(image, size))


@pytest.mark.parametrize(
    ("width", "height", "size"), [(37, 53, 9), (101, 33, 8), (33, 101, 16), (17, 17, 32), (64, 64, 32)]
)
def test_center_crop_on_odd_sizes(width: int, height: int, size: int) -> None:
    image = noise(width, height)
    np.testing.assert_array_equal(center_crop(image, size), slow_center_crop(image, size))


def test_an_image_of_the_right_size_is_not_resampled() -> None:
    pixels = coordinates(33)
    np.testing.assert_array_equal(center_crop(Image.fromarray(pixels), 33), pixels)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_images_of_other_modes_become_rgb(mode: str) -> None:
    image = noise(12, 12).convert(mode)
    np.testing.assert_array_equal(center_crop(image, 12), np.asarray(image.convert("RGB")))


def cut_by_hand(pixels: np.ndarray, size: int, place: str) -> np.ndarray:
    side = len(pixels)
    slices = {"top": slice(0, size), "left": slice(0, size), "bottom": slice(side - size, side)}
    slices["right"] = slices["bottom"]
    if place == "center":
        middle = slice((side - size) // 2, (side - size) // 2 + size)
        return pixels[middle, middle]
    vertical, horizontal = place.split("-")
    return pixels[slices[vertical], slices[horizontal]]


def test_five_crops_are_corners_and_center_in_order() -> None:
    pixels = coordinates(8)
    for crop, place in zip(five_crops(pixels, 4), PLACES, strict=True):
        np.testing.assert_array_equal(crop, cut_by_hand(pixels, 4, place), err_msg=place)


def test_five_crops_of_an_oblong_image() -> None:
    pixels = coordinates(10)[:6]
    corners = [crop[0, 0, :2].tolist() for crop in five_crops(pixels, 4)]
    assert corners == [[0, 0], [0, 6], [2, 0], [2, 6], [1, 3]]


@pytest.mark.parametrize(("side", "start"), [(5, 0), (7, 2), (9, 2), (11, 4)])
def test_an_odd_margin_is_halved_as_torchvision_does(side: int, start: int) -> None:
    # torchvision's center_crop rounds the half margin to even; LlamaGen's tokens were cut with it.
    assert five_crops(coordinates(side), 4)[4][0, 0, :2].tolist() == [start, start]


def test_ten_crops_are_five_and_five_of_the_mirror_image() -> None:
    crops = Crops(kind="ten", size=4, range=1.5)
    pixels = coordinates(6)
    cut = crops.cut(Image.fromarray(pixels))
    expected = [cut_by_hand(image, 4, place) for image in (pixels, np.fliplr(pixels)) for place in PLACES]
    np.testing.assert_array_equal(cut, np.stack(expected))
    assert crops.names == PLACES + [f"mirrored-{place}" for place in PLACES]


def test_a_mirrored_left_crop_is_the_right_crop_mirrored() -> None:
    crops = Crops(kind="ten", size=5, range=1.4)
    cut = dict(zip(crops.names, crops.cut(Image.fromarray(coordinates(7))), strict=True))
    np.testing.assert_array_equal(cut["mirrored-top-left"], np.fliplr(cut["top-right"]))
    np.testing.assert_array_equal(cut["mirrored-bottom-right"], np.fliplr(cut["bottom-left"]))


def test_ten_crops_without_mirror_are_five() -> None:
    crops = Crops(kind="ten", size=4, range=1.5, mirror=False)
    assert crops.names == PLACES
    np.testing.assert_array_equal(crops.cut(Image.fromarray(coordinates(6))), five_crops(coordinates(6), 4))


def test_the_center_crop_alone_is_the_fifth() -> None:
    crops = Crops(kind="center", size=4, range=1.5)
    assert crops.names == ["center"]
    np.testing.assert_array_equal(crops.cut(Image.fromarray(coordinates(6))), coordinates(6)[None, 1:5, 1:5])


def test_the_center_crop_may_come_with_its_mirror_image() -> None:
    crops = Crops(kind="center-mirror", size=4, range=1.5)
    assert crops.names == ["center", "mirrored-center"]
    center = coordinates(6)[1:5, 1:5]
    np.testing.assert_array_equal(crops.cut(Image.fromarray(coordinates(6))), np.stack([center, np.fliplr(center)]))
    alone = Crops(kind="center-mirror", size=4, range=1.5, mirror=False)
    assert alone.names == ["center"]
    np.testing.assert_array_equal(alone.cut(Image.fromarray(coordinates(6))), center[None])


@pytest.mark.parametrize(
    ("size", "wide", "side"), [(256, 1.1, 281), (256, 1.05, 268), (10, 1.1, 11), (32, 36 / 32, 36), (7, 1, 7)]
)
def test_the_side_before_cropping_is_llamagens(size: int, wide: float, side: int) -> None:
    # LLAMAGEN.md: the short side becomes int(size * 1.1). An image of that side is cut without being resampled.
    cut = Crops(kind="ten", size=size, range=wide).cut(Image.fromarray(coordinates(side)))
    np.testing.assert_array_equal(cut[3], coordinates(side)[side - size :, side - size :])


@given(width=st.integers(2, 50), height=st.integers(2, 50), size=st.integers(1, 16), wide=st.floats(1, 2))
def test_every_crop_is_as_large_as_its_name_says_and_part_of_the_image(
    width: int, height: int, size: int, wide: float
) -> None:
    crops = Crops(kind="ten", size=size, range=wide)
    cut = crops.cut(noise(width, height))
    assert cut.shape == (len(crops.names), size, size, 3)
    assert cut.dtype == np.uint8
    whole = slow_center_crop(noise(width, height), int(size * wide + 1e-6))
    np.testing.assert_array_equal(cut[0], whole[:size, :size])
    np.testing.assert_array_equal(cut[8], whole[:, ::-1][len(whole) - size :, len(whole) - size :])


@pytest.mark.parametrize("wide", [0.99, 2.01, float("nan")])
def test_a_range_out_of_bounds_is_refused(wide: float) -> None:
    with pytest.raises(UserError, match=rf"--crop-range must lie in \[1, 2\], not {wide}"):
        Crops(kind="ten", size=32, range=wide)


def test_a_size_below_one_is_refused() -> None:
    with pytest.raises(UserError, match="--size must be at least 1 pixel, not 0"):
        Crops(kind="ten", size=0, range=1.1)


@pytest.mark.parametrize("wide", [1.1, 1.05])
@pytest.mark.parametrize(("width", "height"), [(333, 251), (97, 211), (601, 599), (64, 64)])
def test_ten_crops_of_odd_sizes_at_llamagens_ranges(width: int, height: int, wide: float) -> None:
    whole = slow_center_crop(noise(width, height), int(64 * wide))
    cut = Crops(kind="ten", size=64, range=wide).cut(noise(width, height))
    expected = [cut_by_hand(image, 64, place) for image in (whole, np.fliplr(whole)) for place in PLACES[:4]]
    np.testing.assert_array_equal(cut[[0, 1, 2, 3, 5, 6, 7, 8]], np.stack(expected))
    start = round((len(whole) - 64) / 2)
    np.testing.assert_array_equal(cut[4], whole[start : start + 64, start : start + 64])


@pytest.mark.parametrize("kind", get_args(Kind))
@pytest.mark.parametrize("mirror", [True, False])
def test_many_images_are_cut_at_once_as_one_by_one(kind: Kind, mirror: bool) -> None:
    crops = Crops(kind=kind, size=7, range=1.5, mirror=mirror)
    images = [noise(10, 10, seed) for seed in range(3)]
    together = crops.cut_pixels(np.stack([np.asarray(image) for image in images]))
    np.testing.assert_array_equal(together, np.stack([crops.cut(image) for image in images]))
    assert together.shape[1] == len(crops.names)
