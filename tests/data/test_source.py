"""Decoding and cropping: every format becomes upright 8-bit RGB, or a BrokenImageError."""

import contextlib
import io
import warnings
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from st_ar.data import source
from st_ar.data.source import MAX_PIXELS, BrokenImageError, Crops, Kind, center_crop, five_crops, read_image
from st_ar.errors import UserError
from tests.data.pictures import broken_pictures, encoded, noise, png


def pixels(picture: Image.Image | bytes | Path) -> np.ndarray:
    image = read_image(picture)
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "GIF", "WEBP", "JPEG"])
def test_bytes_paths_and_images_give_the_same_pixels(kind: str, tmp_path: Path) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(noise(), kind, **options)
    (tmp_path / "image").write_bytes(data)  # without a suffix
    np.testing.assert_array_equal(pixels(data), pixels(tmp_path / "image"))
    if kind not in ("JPEG", "GIF"):
        np.testing.assert_array_equal(pixels(data), np.asarray(noise()))
        np.testing.assert_array_equal(pixels(noise()), np.asarray(noise()))


def test_exif_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn, clockwise
    np.testing.assert_array_equal(pixels(encoded(noise(), exif=exif)), np.rot90(np.asarray(noise()), -1))


def test_damaged_exif_does_not_lose_the_image() -> None:
    data = encoded(noise(), "PNG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    np.testing.assert_array_equal(pixels(data), np.asarray(noise()))


def test_transparent_pixels_are_blended_with_white() -> None:
    colours = np.zeros((1, 3, 4), np.uint8)
    colours[0, :, 0] = 200
    colours[0, :, 3] = [0, 51, 255]
    expected = np.array([[[255] * 3, [244, 204, 204], [200, 0, 0]]])
    np.testing.assert_array_equal(pixels(encoded(Image.fromarray(colours))), expected)


def test_grey_with_alpha_is_blended_with_white() -> None:
    image = Image.merge("LA", [Image.new("L", (2, 1), 100), Image.fromarray(np.array([[0, 255]], np.uint8))])
    assert pixels(encoded(image))[0].tolist() == [[255] * 3, [100] * 3]


def test_a_transparent_palette_colour_becomes_white() -> None:
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "L").convert("P")
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    assert pixels(encoded(image))[0].tolist() == [[255, 0, 0], [0, 255, 0], [0, 0, 255]]
    for transparency in (1, bytes([255, 0, 255])):
        data = encoded(image, transparency=transparency)
        assert pixels(data)[0].tolist() == [[255, 0, 0], [255] * 3, [0, 0, 255]]


def test_cmyk_is_converted_by_pillow() -> None:
    image = noise().convert("CMYK")
    np.testing.assert_array_equal(pixels(encoded(image, "TIFF")), np.asarray(image.convert("RGB")))
    assert pixels(encoded(image, "JPEG")).shape == (16, 20, 3)


def test_sixteen_bit_grey_is_scaled_and_not_clipped() -> None:
    levels = np.array([[0, 128, 129, 257, 32768, 65407, 65535]], np.uint16)
    expected = [0, 0, 1, 1, 128, 255, 255]
    by_hand = png(7, 1, 16, 0, levels.astype(">u2").tobytes())
    for data in (by_hand, encoded(Image.fromarray(levels)), encoded(Image.fromarray(levels), "TIFF")):
        np.testing.assert_array_equal(pixels(data)[0], np.array(expected)[:, None].repeat(3, 1))


def test_sixteen_bit_colour_is_scaled_and_not_clipped() -> None:
    levels = np.array([[0, 300, 16000], [32768, 50000, 65535]], ">u2")
    found = pixels(png(2, 1, 16, 2, levels.tobytes()))[0]
    assert np.abs(found - levels.astype(float) / 257).max() < 1


def test_wide_grey_levels_are_read_if_their_white_is_known() -> None:
    assert pixels(Image.fromarray(np.array([[0, 65535]], np.int32)))[0, :, 0].tolist() == [0, 255]
    assert pixels(Image.fromarray(np.array([[0, 0.5, 1]], np.float32)))[0, :, 0].tolist() == [0, 128, 255]
    for levels in (np.array([[0, 70000]], np.int32), np.array([[-1, 5]], np.int32), np.array([[np.nan]], np.float32)):
        with pytest.raises(BrokenImageError, match="have no known white"):
            read_image(Image.fromarray(levels))


def test_one_bit_and_the_first_frame() -> None:
    assert pixels(Image.fromarray(np.array([[False, True]])))[0].tolist() == [[0] * 3, [255] * 3]
    frames = [Image.new("RGB", (2, 2), colour) for colour in ("red", "blue")]
    assert pixels(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]))[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("what", broken_pictures())
def test_a_broken_image_is_refused_in_one_line(what: str) -> None:
    reasons = {"truncated jpeg": "truncated", "empty": "empty", "text": "not an image of a known", "bomb": "limit"}
    with pytest.raises(BrokenImageError, match=reasons.get(what, ".")) as raised:
        read_image(broken_pictures()[what])
    assert "\n" not in str(raised.value)
    assert " at 0x" not in str(raised.value)  # the same text in every run
    with pytest.raises(BrokenImageError, match="^" + str(raised.value).translate({40: ".", 41: "."}) + "$"):
        read_image(broken_pictures()[what])


def test_a_missing_file_is_broken_too(tmp_path: Path) -> None:
    with pytest.raises(BrokenImageError, match=r"^No such file or directory$"):
        read_image(tmp_path / "gone.png")


def test_the_limits_are_explicit_and_pillows_warning_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    assert MAX_PIXELS == 89_478_485
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the outer filters must not matter
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)
        with pytest.raises(BrokenImageError, match="320 pixels"):
            read_image(encoded(noise()))
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
        monkeypatch.setattr(source, "MAX_PIXELS", 319)
        with pytest.raises(BrokenImageError, match="20 x 16 pixels are more than the limit of 319"):
            read_image(encoded(noise()))


def test_a_file_too_large_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.png").write_bytes(encoded(noise()))
    monkeypatch.setattr(source, "MAX_BYTES", 100)
    with pytest.raises(BrokenImageError, match="bytes are more than the limit of 100"):
        read_image(tmp_path / "a.png")


def test_damaged_pixels_of_a_png_are_refused_even_if_pillow_shows_them() -> None:
    smooth = noise(4, 4).resize((12, 12), Image.Resampling.BICUBIC)
    whole = encoded(smooth, "PNG")
    start = whole.index(b"IDAT") + 4
    stop = start + int.from_bytes(whole[start - 8 : start - 4])
    np.testing.assert_array_equal(pixels(whole), np.asarray(smooth))
    undetected = 0
    for offset in range(start, stop - 4):
        damaged = bytearray(whole)
        damaged[offset : offset + 4] = bytes(byte ^ 0x55 for byte in damaged[offset : offset + 4])
        with contextlib.suppress(Exception):
            undetected += not np.array_equal(np.asarray(Image.open(io.BytesIO(bytes(damaged)))), np.asarray(smooth))
        with pytest.raises(BrokenImageError):
            read_image(bytes(damaged))
    assert undetected  # by Pillow; otherwise our check is useless


POSITIONS = ["top-left", "top-right", "bottom-left", "bottom-right", "center"]


def slow_center_crop(image: Image.Image, size: int) -> np.ndarray:
    """guided-diffusion's center_crop_arr, and a crop that copies pixel by pixel."""
    while min(*image.size) >= 2 * size:
        image = image.resize(tuple(x // 2 for x in image.size), resample=Image.Resampling.BOX)
    scale = size / min(*image.size)
    image = image.resize(tuple(round(x * scale) for x in image.size), resample=Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    pixels = [[image.getpixel((left + x, top + y)) for x in range(size)] for y in range(size)]
    return np.array(pixels, np.uint8)


def noise_of(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def coordinates(side: int) -> np.ndarray:
    """An image [side, side, 3] whose pixels encode their row and column."""
    rows, columns = np.mgrid[:side, :side]
    return np.stack([rows % 256, columns % 256, 16 * (rows // 256) + columns // 256], axis=-1).astype(np.uint8)


@example(width=101, height=33, size=8, seed=0)
@given(width=st.integers(1, 70), height=st.integers(1, 70), size=st.integers(1, 24), seed=st.integers(0, 99))
def test_center_crop_is_guided_diffusions(width: int, height: int, size: int, seed: int) -> None:
    image = noise_of(width, height, seed)
    np.testing.assert_array_equal(center_crop(image, size), slow_center_crop(image, size))


def test_an_image_of_the_right_size_is_not_resampled() -> None:
    pixels = coordinates(33)
    np.testing.assert_array_equal(center_crop(Image.fromarray(pixels), 33), pixels)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_images_of_other_modes_become_rgb(mode: str) -> None:
    image = noise_of(12, 12).convert(mode)
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
    for crop, place in zip(five_crops(pixels, 4), POSITIONS, strict=True):
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
    expected = [cut_by_hand(image, 4, place) for image in (pixels, np.fliplr(pixels)) for place in POSITIONS]
    np.testing.assert_array_equal(cut, np.stack(expected))
    assert crops.names == POSITIONS + [f"mirrored-{place}" for place in POSITIONS]


def test_a_mirrored_left_crop_is_the_right_crop_mirrored() -> None:
    crops = Crops(kind="ten", size=5, range=1.4)
    cut = dict(zip(crops.names, crops.cut(Image.fromarray(coordinates(7))), strict=True))
    np.testing.assert_array_equal(cut["mirrored-top-left"], np.fliplr(cut["top-right"]))
    np.testing.assert_array_equal(cut["mirrored-bottom-right"], np.fliplr(cut["bottom-left"]))


def test_ten_crops_without_mirror_are_five() -> None:
    crops = Crops(kind="ten", size=4, range=1.5, mirror=False)
    assert crops.names == POSITIONS
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
def test_the_side_before_cropping_is_that_of_llamagen(size: int, wide: float, side: int) -> None:
    # LLAMAGEN.md: the short side becomes int(size * 1.1). An image of that side is cut without being resampled.
    cut = Crops(kind="ten", size=size, range=wide).cut(Image.fromarray(coordinates(side)))
    np.testing.assert_array_equal(cut[3], coordinates(side)[side - size :, side - size :])


@given(width=st.integers(2, 50), height=st.integers(2, 50), size=st.integers(1, 16), wide=st.floats(1, 2))
def test_every_crop_has_its_size_and_is_part_of_the_image(width: int, height: int, size: int, wide: float) -> None:
    crops = Crops(kind="ten", size=size, range=wide)
    cut = crops.cut(noise_of(width, height))
    assert cut.shape == (len(crops.names), size, size, 3)
    assert cut.dtype == np.uint8
    whole = slow_center_crop(noise_of(width, height), int(size * wide + 1e-6))
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
@pytest.mark.parametrize(("width", "height"), [(333, 251), (97, 211)])
def test_ten_crops_of_odd_sizes_at_llamagens_ranges(width: int, height: int, wide: float) -> None:
    whole = slow_center_crop(noise_of(width, height), int(64 * wide))
    cut = Crops(kind="ten", size=64, range=wide).cut(noise_of(width, height))
    expected = [cut_by_hand(image, 64, place) for image in (whole, np.fliplr(whole)) for place in POSITIONS[:4]]
    np.testing.assert_array_equal(cut[[0, 1, 2, 3, 5, 6, 7, 8]], np.stack(expected))
    start = round((len(whole) - 64) / 2)
    np.testing.assert_array_equal(cut[4], whole[start : start + 64, start : start + 64])


@pytest.mark.parametrize("kind", get_args(Kind))
@pytest.mark.parametrize("mirror", [True, False])
def test_a_batch_of_images_is_cropped_like_single_images(kind: Kind, mirror: bool) -> None:
    crops = Crops(kind=kind, size=7, range=1.5, mirror=mirror)
    images = [noise_of(10, 10, seed) for seed in range(3)]
    together = crops.cut_pixels(np.stack([np.asarray(image) for image in images]))
    np.testing.assert_array_equal(together, np.stack([crops.cut(image) for image in images]))
    assert together.shape[1] == len(crops.names)
