"""What comes from the page, checked before anything is done with it: a browser can send what it likes."""

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from st_ar.config import SampleSettings
from st_ar.data.source import BrokenImageError, center_crop, read_image
from st_ar.errors import UserError, cause

MOST_SEED = 2**53 - 1
"""The largest whole number that a browser keeps exactly."""


def whole(value: Any, what: str, least: int, most: int) -> int:
    """A whole number between two others; UserError: it is none, or lies outside."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value != int(value):
        raise UserError(f"{what} must be a whole number from {least} to {most}, not {value!r}")
    if not least <= value <= most:
        raise UserError(f"{what} must lie between {least} and {most}, not {int(value)}")
    return int(value)


def number(value: Any, what: str) -> float:
    """A number; UserError: it is none."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{what} must be a number, not {value!r}")
    return float(value)


def settings_from(
    scale: Any, schedule: Any, power: Any, temperature: Any, top_k: Any, top_p: Any, seed: Any, vocab_size: int
) -> SampleSettings:
    """How to draw, by the page's fields.

    Raises:
        UserError: one of them is missing, of another type or out of range.
    """
    return SampleSettings(
        cfg_scale=number(scale, "the guidance scale"),
        cfg_schedule=schedule,
        cfg_power=number(power, "the guidance's power"),
        temperature=number(temperature, "the temperature"),
        top_k=whole(top_k, "top-k", 0, vocab_size),
        top_p=number(top_p, "top-p"),
        seed=whole(seed, "the seed", 0, MOST_SEED),
    )


MOST_BYTES = 16 << 20
"""Of an upload."""
MOST_PIXELS = 1 << 24
"""Of an uploaded image: 4,096 x 4,096."""
LEAST_SIDE = 8
"""Pixels of the shorter side of an uploaded image."""
LONGEST_SHAPE = 8
"""The longer side over the shorter one at most: what is enlarged to fit stays small."""
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")


def read_upload(path: object) -> bytes:
    """An uploaded file's content.

    Raises:
        UserError: none was given, or it is too large.
    """
    if not isinstance(path, str | Path):
        raise UserError("no file is given: drop one, or choose it")
    file = Path(path)
    if (size := file.stat().st_size) > MOST_BYTES:
        raise UserError(f"the file has {size / 2**20:.1f} MiB: give one of at most {MOST_BYTES >> 20} MiB")
    return file.read_bytes()


def decode_upload(data: bytes) -> Image.Image:
    """An uploaded image in RGB. Its size is read before any pixel is, so that a small file cannot ask for much memory.

    Raises:
        UserError: no image, of a format that is not known, damaged or too large.
    """
    try:
        width, height = Image.open(io.BytesIO(data), formats=FORMATS).size
    except Exception as error:  # Pillow raises nearly everything on damaged files
        known = ", ".join(FORMATS)
        raise UserError(f"the file is no image of a known format, or too large: give one of {known}") from error
    if width * height > MOST_PIXELS:
        raise UserError(
            f"the image has {width:,} x {height:,} pixels, more than the {MOST_PIXELS:,} that the page reads: make it smaller"
        )
    try:
        return read_image(data)
    except BrokenImageError as error:
        raise UserError(f"the image cannot be read ({cause(error)}): give another") from error


def cut_upload(image: Image.Image, size: int) -> np.ndarray:
    """The centre of an image, resized as `st-ar tokenize --crops center` does: uint8 [size, size, 3].

    Raises:
        UserError: it is tiny, or so long that it would take much memory when it is resized.
    """
    width, height = image.size
    if min(width, height) < LEAST_SIDE or max(width, height) > LONGEST_SHAPE * min(width, height):
        raise UserError(
            f"the image has {width:,} x {height:,} pixels: give one of at least {LEAST_SIDE} a side, the longer side at most "
            f"{LONGEST_SHAPE} times the shorter"
        )
    return center_crop(image, size)
