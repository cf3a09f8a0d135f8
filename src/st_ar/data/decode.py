"""From an image file's bytes to RGB pixels, whatever the file holds; or a word on why not."""

import io
import warnings
import zlib
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

MAX_PIXELS = 89_478_485
"""Largest image that is decoded, in pixels: Pillow's own warning limit, 256 MiB of RGB."""
MAX_BYTES = 1 << 30
"""Largest file that is read."""
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF")
"""What is opened. Others, such as EPS, would start other programs."""
PNG = b"\x89PNG\r\n\x1a\n"
BIT_DEPTH_16 = ("I;16", "I;16L", "I;16B", "I;16N")


class BrokenImageError(Exception):
    """An image that cannot be used; the message is the reason. Never shown bare: jobs skip the image and list it."""


def read_image(picture: Image.Image | bytes | Path) -> Image.Image:
    """An image in mode RGB, upright as its EXIF orientation says.

    Transparent pixels are laid over white, 16-bit grey levels are scaled (not clipped) to 8 bits, CMYK is converted by
    Pillow, and of several frames the first is taken.

    Args:
        picture: an image, a file's content, or its path.

    Raises:
        BrokenImageError: missing, truncated, no image, of a format or mode that is not known, or above MAX_PIXELS.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # such as Pillow's on corrupt EXIF
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            return _to_rgb(picture if isinstance(picture, Image.Image) else _open(picture))
        except BrokenImageError:
            raise
        except Exception as error:  # Pillow's plugins raise nearly everything on damaged files
            raise BrokenImageError(_reason(error)) from error


def check_pixels(width: float, height: float) -> None:
    """Refuse an image, or an enlarged one, of more than MAX_PIXELS."""
    if width * height > MAX_PIXELS:
        raise BrokenImageError(f"{width:.0f} x {height:.0f} pixels are more than the limit of {MAX_PIXELS:,}")


@cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _open(file: bytes | Path) -> Image.Image:
    if isinstance(file, Path) and file.stat().st_size > MAX_BYTES:
        raise BrokenImageError(f"{file.stat().st_size:,} bytes are more than the limit of {MAX_BYTES:,}")
    data = file if isinstance(file, bytes) else file.read_bytes()
    if not data:
        raise BrokenImageError("empty")
    if data.startswith(PNG):
        _check_png(data)
    return Image.open(io.BytesIO(data), formats=_formats())


def _check_png(data: bytes) -> None:
    """Compare the checksums of a PNG's pixels: Pillow does not, and gives other pixels for damaged ones now and then."""
    place = len(PNG)
    while len(header := data[place : place + 8]) == 8:
        end = place + 8 + int.from_bytes(header[:4])
        if header[4:] == b"IDAT" and zlib.crc32(memoryview(data)[place + 4 : end]) != int.from_bytes(
            data[end : end + 4]
        ):
            raise BrokenImageError("damaged: its pixels do not match their checksum")
        place = end + 4


def _to_rgb(image: Image.Image) -> Image.Image:
    check_pixels(*image.size)
    image.load()
    image = _upright(image)
    if image.mode in BIT_DEPTH_16 or image.mode in ("I", "F"):
        return _to_grey(image).convert("RGB")
    if image.has_transparency_data:
        over = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", over.size, "white"), over).convert("RGB")
    return image.convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF says nothing on the pixels, which are whole
        return image


def _to_grey(image: Image.Image) -> Image.Image:
    """Grey levels of more than 8 bits, scaled to 8."""
    levels = np.asarray(image)
    low, high = float(levels.min()), float(levels.max())
    white = 1.0 if image.mode == "F" else 65535.0
    if not (low >= 0 and high <= white):  # also if they are not numbers
        raise BrokenImageError(f"grey levels from {low:g} to {high:g}, of mode {image.mode}, have no known white")
    return Image.fromarray((levels.astype(np.float64) * (255 / white)).round().astype(np.uint8))


def _reason(error: Exception) -> str:
    """One line; Pillow's message for unknown files holds an address that differs from run to run."""
    if type(error).__name__ == "UnidentifiedImageError":
        return f"no image of a known format ({', '.join(_formats())})"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split())[:200] or type(error).__name__
