"""What a browser may send in place of numbers."""

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from st_ar.config import SampleSettings
from st_ar.data.source import Crops
from st_ar.demo.inputs import (
    MAX_SEED,
    MIN_SIDE,
    check_int,
    crop_upload,
    decode_upload,
    read_settings,
    read_upload,
)
from st_ar.errors import UserError

GOOD: dict[str, Any] = {
    "scale": 2,
    "schedule": "linear",
    "power": 1.5,
    "temperature": 0.9,
    "top_k": 3.0,
    "top_p": 1,
    "seed": MAX_SEED,
    "vocab_size": 11,
}


def test_good_fields_are_settings() -> None:
    expected = SampleSettings(
        cfg_scale=2.0, cfg_schedule="linear", cfg_power=1.5, temperature=0.9, top_k=3, top_p=1.0, seed=MAX_SEED
    )
    assert read_settings(**GOOD) == expected


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("scale", None, "the guidance scale must be a number, not None"),
        ("scale", "2", "the guidance scale must be a number"),
        ("scale", float("nan"), "the guidance scale must be a number"),
        ("scale", 0.5, r"--cfg-scale must lie in \[1, 1000\]"),
        ("schedule", "cosine", "cfg-schedule must be one of constant, linear, power-cosine"),
        ("schedule", ["linear"], "cfg-schedule must be one of"),
        ("power", 0, r"--cfg-power must lie in \(0, 1000\]"),
        ("temperature", 0, r"--temperature must lie in \[0.001, 1000\]"),
        ("top_k", 12, "top-k must be a whole number from 0 to 11, not 12"),
        ("top_k", 1.5, "top-k must be a whole number from 0 to 11"),
        ("top_p", 0, r"--top-p must lie in \(0, 1\]"),
        ("seed", -1, "the seed must be a whole number from 0 to"),
        ("seed", 2**53, "the seed must be a whole number from 0 to"),
        ("seed", True, "the seed must be a whole number"),
        ("seed", float("inf"), "the seed must be a whole number"),
        ("seed", {}, "the seed must be a whole number"),
    ],
)
def test_bad_fields_are_refused_by_name(name: str, value: Any, match: str) -> None:
    with pytest.raises(UserError, match=match):
        read_settings(**GOOD | {name: value})


def test_whole_numbers_may_come_as_floats() -> None:
    assert check_int(4.0, "x", 0, 4) == 4
    assert isinstance(check_int(4.0, "x", 0, 4), int)


def encoded(size: tuple[int, int], kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (200, 100, 50)).save(file, format=kind)
    return file.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that says it is large."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = b""
    for name, body in ((b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 100)), (b"IEND", b"")):
        chunks += struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    return b"\x89PNG\r\n\x1a\n" + chunks


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF"])
def test_images_of_known_formats_are_read(kind: str) -> None:
    image = decode_upload(encoded((20, 30), kind))
    assert (image.size, image.mode) == ((20, 30), "RGB")
    np.testing.assert_allclose(np.asarray(image)[10, 10], (200, 100, 50), atol=4)


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", "not an image, or it is too large"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image, or it is too large"),
        (encoded((20, 20), "TIFF"), "give one of PNG, JPEG"),
        (encoded((40, 40))[:60], "cannot be read"),
        (bomb(5000, 5000), "5,000 x 5,000 pixels: give one of at most 16,777,216"),
        (bomb(1 << 20, 1 << 20), "not an image, or it is too large"),
    ],
)
def test_bad_images_are_refused_in_words(data: bytes, match: str) -> None:
    with pytest.raises(UserError, match=match):
        decode_upload(data)


def test_a_file_is_read_and_a_missing_one_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no file"):
        read_upload(None)
    (tmp_path / "small.png").write_bytes(b"abc")
    assert read_upload(str(tmp_path / "small.png")) == b"abc"


def test_an_upload_is_cut_as_tokenize_cuts_it() -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3)).astype(np.uint8))
    expected = Crops(kind="center", size=12, range=1.0).cut(picture)[0]
    np.testing.assert_array_equal(crop_upload(picture, 12), expected)


@pytest.mark.parametrize(
    ("size", "match"),
    [((MIN_SIDE - 1, 20), "7 x 20 pixels: give one with sides of at least 8 pixels"), ((20, 180), "at most 8 times")],
)
def test_shapes_that_would_grow_without_end_are_not_resized(size: tuple[int, int], match: str) -> None:
    with pytest.raises(UserError, match=match):
        crop_upload(decode_upload(encoded(size)), 256)
