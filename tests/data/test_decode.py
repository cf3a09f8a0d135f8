"""Reading images: every kind becomes upright 8-bit RGB, or says why it cannot."""

import contextlib
import io
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from st_ar.data import source as decode
from st_ar.data.source import MAX_PIXELS, BrokenImageError, read_image
from tests.data.pictures import broken_pictures, encoded, noise, png


def pixels(picture: Image.Image | bytes | Path) -> np.ndarray:
    image = read_image(picture)
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "GIF", "WEBP", "JPEG"])
def test_bytes_paths_and_images_give_the_same_pixels(kind: str, tmp_path: Path) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(noise(), kind, **options)
    (tmp_path / "image").write_bytes(data)  # the suffix plays no part
    np.testing.assert_array_equal(pixels(data), pixels(tmp_path / "image"))
    if kind not in ("JPEG", "GIF"):
        np.testing.assert_array_equal(pixels(data), np.asarray(noise()))
        np.testing.assert_array_equal(pixels(noise()), np.asarray(noise()))


def test_a_photo_taken_sideways_is_put_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise
    np.testing.assert_array_equal(pixels(encoded(noise(), exif=exif)), np.rot90(np.asarray(noise()), -1))


def test_damaged_exif_does_not_lose_the_image() -> None:
    data = encoded(noise(), "PNG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    np.testing.assert_array_equal(pixels(data), np.asarray(noise()))


def test_transparent_pixels_lie_over_white() -> None:
    colours = np.zeros((1, 3, 4), np.uint8)
    colours[0, :, 0] = 200
    colours[0, :, 3] = [0, 51, 255]
    expected = np.array([[[255] * 3, [244, 204, 204], [200, 0, 0]]])
    np.testing.assert_array_equal(pixels(encoded(Image.fromarray(colours))), expected)


def test_grey_with_alpha_lies_over_white() -> None:
    image = Image.merge("LA", [Image.new("L", (2, 1), 100), Image.fromarray(np.array([[0, 255]], np.uint8))])
    assert pixels(encoded(image))[0].tolist() == [[255] * 3, [100] * 3]


def test_a_palette_with_a_transparent_colour_lies_over_white() -> None:
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


def test_wide_grey_levels_are_taken_where_their_white_is_known() -> None:
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
def test_what_is_broken_says_why_in_one_line(what: str) -> None:
    reasons = {"truncated jpeg": "truncated", "empty": "empty", "text": "no image of a known", "bomb": "limit"}
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
        warnings.simplefilter("ignore")  # whatever the surroundings think of it
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)
        with pytest.raises(BrokenImageError, match="320 pixels"):
            read_image(encoded(noise()))
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
        monkeypatch.setattr(decode, "MAX_PIXELS", 319)
        with pytest.raises(BrokenImageError, match="20 x 16 pixels are more than the limit of 319"):
            read_image(encoded(noise()))


def test_a_file_too_large_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.png").write_bytes(encoded(noise()))
    monkeypatch.setattr(decode, "MAX_BYTES", 100)
    with pytest.raises(BrokenImageError, match="bytes are more than the limit of 100"):
        read_image(tmp_path / "a.png")


def test_a_png_whose_pixels_are_damaged_is_refused_even_where_pillow_shows_others() -> None:
    smooth = noise(4, 4).resize((12, 12), Image.Resampling.BICUBIC)
    whole = encoded(smooth, "PNG")
    start = whole.index(b"IDAT") + 4
    stop = start + int.from_bytes(whole[start - 8 : start - 4])
    np.testing.assert_array_equal(pixels(whole), np.asarray(smooth))
    others = 0
    for place in range(start, stop - 4):
        damaged = bytearray(whole)
        damaged[place : place + 4] = bytes(byte ^ 0x55 for byte in damaged[place : place + 4])
        with contextlib.suppress(Exception):
            others += not np.array_equal(np.asarray(Image.open(io.BytesIO(bytes(damaged)))), np.asarray(smooth))
        with pytest.raises(BrokenImageError):
            read_image(bytes(damaged))
    assert others  # or our own comparison of checksums could go
