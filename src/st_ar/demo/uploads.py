"""Files that come from the page: small enough to be read, and images."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from st_ar.data.crops import center_crop
from st_ar.data.decode import BrokenImageError, read_image
from st_ar.errors import UserError, cause

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
