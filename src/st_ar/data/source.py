"""What an image source is, how an image is decoded, and which crops are cut from it."""

import io
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from st_ar.errors import UserError

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


LARGEST = 4096
"""Pixels of a crop's side; whole images are no larger than decode.py's limit either."""
Kind = Literal["center", "center-mirror", "ten"]
PLACES = ("top-left", "top-right", "bottom-left", "bottom-right", "center")


def center_crop(image: Image.Image, size: int) -> np.ndarray:
    """ADM's (openai/guided-diffusion) resize and centre crop: uint8 [size, size, 3].

    The image is halved with a box filter while its short side is at least twice `size`, resized bicubically to `size`
    on the short side, and cropped in the middle.
    """
    image = image.convert("RGB")
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    pixels = np.asarray(
        image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    )
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]


def five_crops(pixels: np.ndarray, size: int) -> np.ndarray:
    """The corners and the centre of [.., H, W, 3], in the order of PLACES: [.., 5, size, size, 3].

    The centre's offset is half the margin, rounded to even as torchvision does it.
    """
    bottom, right = pixels.shape[-3] - size, pixels.shape[-2] - size
    corners = [(0, 0), (0, right), (bottom, 0), (bottom, right), (round(bottom / 2), round(right / 2))]
    return np.stack([pixels[..., top : top + size, left : left + size, :] for top, left in corners], axis=-4)


@dataclass(frozen=True, kw_only=True)
class Crops:
    """How an image is cropped: resized and centre-cropped to int(size * range), then cut."""

    kind: Kind
    """The centre alone, of the image or also of its mirror image; or corners and centre of both."""
    size: int
    """Side of a crop in pixels."""
    range: float
    """Side of the image before cropping, as a multiple of `size`."""
    mirror: bool = True
    """Whether mirror images are taken at all; without them ten crops are five."""

    def __post_init__(self) -> None:
        if self.size < 1:
            raise UserError(f"--size must be at least 1 pixel, not {self.size}")
        if self.size > LARGEST:
            raise UserError(f"--size must be at most {LARGEST} pixels, not {self.size}")
        if not 1 <= self.range <= 2:
            raise UserError(f"--crop-range must lie in [1, 2], not {self.range}")

    @property
    def names(self) -> list[str]:
        """The crops' names, in the order of `cut`."""
        places = PLACES[self._places]
        return [*places, *(f"mirrored-{place}" for place in places if self._mirrored)]

    @property
    def _places(self) -> slice:
        return slice(0 if self.kind == "ten" else PLACES.index("center"), None)

    @property
    def _mirrored(self) -> bool:
        return self.mirror and self.kind != "center"

    @property
    def side(self) -> int:
        """Side in pixels before cropping: int(size * range), as LlamaGen has it."""
        return int(self.size * self.range + 1e-6)  # so that 10 * 1.1 is 11 however it is rounded

    def cut(self, image: Image.Image) -> np.ndarray:
        """uint8 [crops, size, size, 3]."""
        return self.cut_pixels(center_crop(image, self.side))

    def cut_pixels(self, pixels: np.ndarray) -> np.ndarray:
        """The crops of images that are resized already: [.., side, side, 3] -> [.., crops, size, size, 3]."""
        images = [pixels, pixels[..., ::-1, :]] if self._mirrored else [pixels]
        return np.concatenate([five_crops(image, self.size)[..., self._places, :, :, :] for image in images], axis=-4)


MAX_CLASSES = 1_000_000
"""More are no classes: the numbers mean something else."""


class Example(NamedTuple):
    """One labelled image, perhaps still as a file's content or path."""

    image: Image.Image | bytes | Path
    label: int
    name: str = ""
    """Where it comes from, for the list of those that were skipped."""

    def read(self) -> Image.Image:
        """The image in mode RGB; a BrokenImageError if it cannot be had."""
        return read_image(self.image)


@dataclass(frozen=True, kw_only=True)
class ImageSource:
    """Labelled images in a fixed order."""

    name: str
    """What the user asked for, such as photos:train."""
    class_names: Sequence[str]
    """Names of the classes 0, 1, ..; none if they are unnamed and their number is not known before the end."""
    count: int | None
    """Number of images; None if that is known only at the end."""
    examples: Callable[[int], Iterator[Example]]
    """The examples from the given index on."""
    size: int
    """Side of a crop, in pixels, if the user names none."""
    crop_range: float
    """Short side before cropping, as a multiple of the crop's, if the user names none."""
    mirror: bool
    """Whether a mirror image shows the same thing."""
    center_range: float | None = None
    """The same as `crop_range` where only the centre is cut; None if it does not differ."""
    streaming: bool = False
    """Whether examples from an index on are found only by reading all that come before."""
    expected: int | None = None
    """Number of images that a source without `count` is said to have: for progress and disk space."""
    content: str = ""
    """Differs if the images or their order do, as far as that is known without reading them."""
    notes: tuple[str, ...] = ()
    """What the user should know about how the images were read."""

    def range_for(self, kind: Kind) -> float:
        """The crop range that suits the source, for the centre crop alone or for ten."""
        return self.center_range if kind != "ten" and self.center_range is not None else self.crop_range


LARGE_SIZE, TEN_RANGE, CENTER_RANGE = 256, 1.1, 1.0
"""LlamaGen's: ten crops are cut from 281 pixels, the centre crop alone is the whole of 256."""
