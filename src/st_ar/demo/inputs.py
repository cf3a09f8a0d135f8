"""Checks of what a browser sends: it can send anything."""

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from st_ar.config import SampleSettings
from st_ar.data.source import BrokenImageError, center_crop, read_image
from st_ar.errors import UserError, cause

MAX_SEED = 2**53 - 1
"""The largest integer that JavaScript represents exactly."""


def check_number(value: Any, name: str, kind: str = "a number") -> float:
    """Return a finite number; UserError if it is not one."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{name} must be {kind}, not {value!r}")
    return float(value)


def check_int(value: Any, name: str, low: int, high: int) -> int:
    """Return a whole number from `low` to `high`; UserError if it is not one."""
    kind = f"a whole number from {low} to {high}"
    number = check_number(value, name, kind)
    if not low <= number <= high or not number.is_integer():
        raise UserError(f"{name} must be {kind}, not {value}")
    return int(number)


def read_settings(
    scale: Any, schedule: Any, power: Any, temperature: Any, top_k: Any, top_p: Any, seed: Any, vocab_size: int
) -> SampleSettings:
    """Return the settings in the sampling fields; UserError if a field is missing, of another type or out of range."""
    return SampleSettings(
        cfg_scale=check_number(scale, "the guidance scale"),
        cfg_schedule=schedule,
        cfg_power=check_number(power, "the guidance power"),
        temperature=check_number(temperature, "the temperature"),
        top_k=check_int(top_k, "top-k", 0, vocab_size),
        top_p=check_number(top_p, "top-p"),
        seed=check_int(seed, "the seed", 0, MAX_SEED),
    )


MAX_BYTES = 16 << 20
"""Largest size of an uploaded file. Gradio enforces it during the upload."""
MAX_PIXELS = 1 << 24
"""Largest number of pixels of an uploaded image: 4,096 x 4,096."""
MIN_SIDE = 8
"""Smallest shorter side of an uploaded image in pixels."""
MAX_ASPECT = 8
"""Largest ratio of the sides. It bounds the size of an image after it is enlarged."""
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")


def read_upload(path: object) -> bytes:
    """Return the content of an uploaded file; UserError if there is none."""
    if not isinstance(path, str | Path):
        raise UserError("there is no file: drop one, or choose it")
    return Path(path).read_bytes()


def decode_upload(data: bytes) -> Image.Image:
    """Return an uploaded image in RGB; UserError if it is damaged, too large or of another format.

    The size is checked before decoding, since a small file can have many pixels.
    """
    try:
        width, height = Image.open(io.BytesIO(data), formats=FORMATS).size
    except Exception as error:  # Pillow raises many types on damaged files
        raise UserError(f"the file is not an image, or it is too large: give one of {', '.join(FORMATS)}") from error
    if width * height > MAX_PIXELS:
        raise UserError(f"the image has {width:,} x {height:,} pixels: give one of at most {MAX_PIXELS:,} pixels")
    try:
        return read_image(data)
    except BrokenImageError as error:
        raise UserError(f"the image cannot be read ({cause(error)}): give another") from error


def crop_upload(image: Image.Image, size: int) -> np.ndarray:
    """Return the centre crop of an image, uint8 [size, size, 3], like `st-ar tokenize --crops center`.

    UserError if the image is tiny, or so long that resizing would take much memory.
    """
    width, height = image.size
    if min(width, height) < MIN_SIDE or max(width, height) > MAX_ASPECT * min(width, height):
        raise UserError(
            f"the image has {width:,} x {height:,} pixels: give one with sides of at least {MIN_SIDE} pixels, "
            f"the longer at most {MAX_ASPECT} times the shorter"
        )
    return center_crop(image, size)
