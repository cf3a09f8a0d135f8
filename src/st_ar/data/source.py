"""Image sources, image decoding, and crops."""

import contextlib
import io
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from st_ar.errors import UserError, cause, note

MAX_PIXELS = 89_478_485
"""Limit of Pillow's warning: 256 MiB of RGB."""
MAX_BYTES = 1 << 30
"""Largest file that is read."""
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF")
"""Accepted formats. Some others, such as EPS, start other programs."""
PNG = b"\x89PNG\r\n\x1a\n"


class BrokenImageError(Exception):
    """An unusable image; the message is the reason. Jobs skip such images and list them."""


def read_image(picture: Image.Image | bytes | Path) -> Image.Image:
    """Decode an image, a file's content or a path to mode RGB, upright according to EXIF.

    Transparent pixels are blended with white, 16-bit grey levels are scaled to 8 bits, CMYK is converted by Pillow, and only the
    first frame is read.

    Raises:
        BrokenImageError: missing, truncated, not an image, an unknown format or mode, or above MAX_PIXELS.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # such as Pillow's about corrupt EXIF
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            return _to_rgb(picture if isinstance(picture, Image.Image) else _open(picture))
        except BrokenImageError:
            raise
        except UnidentifiedImageError as error:  # whose message has an address that differs from run to run
            raise BrokenImageError(f"not an image of a known format ({', '.join(_formats())})") from error
        except Exception as error:  # Pillow's plugins can raise almost anything on damaged files
            raise BrokenImageError(cause(error)) from error


def check_pixels(width: float, height: float) -> None:
    """Refuse an image of more than MAX_PIXELS."""
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
    """Check the checksums of a PNG's pixels, which Pillow ignores."""
    start = len(PNG)
    while len(header := data[start : start + 8]) == 8:
        end = start + 8 + int.from_bytes(header[:4])
        checksum = int.from_bytes(data[end : end + 4])
        if header[4:] == b"IDAT" and zlib.crc32(memoryview(data)[start + 4 : end]) != checksum:
            raise BrokenImageError("damaged: its pixels do not match their checksum")
        start = end + 4


def _to_rgb(image: Image.Image) -> Image.Image:
    check_pixels(*image.size)
    image.load()
    with contextlib.suppress(Exception):  # damaged EXIF leaves the pixels intact
        image = ImageOps.exif_transpose(image)
    if image.mode in ("I;16", "I;16L", "I;16B", "I;16N", "I", "F"):
        return _to_grey(image).convert("RGB")
    if image.has_transparency_data:
        foreground = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", foreground.size, "white"), foreground).convert("RGB")
    return image.convert("RGB")


def _to_grey(image: Image.Image) -> Image.Image:
    """Scale grey levels of more than 8 bits to 8 bits."""
    levels = np.asarray(image)
    low, high = float(levels.min()), float(levels.max())
    white = 1.0 if image.mode == "F" else 65535.0
    if not (low >= 0 and high <= white):  # also true of NaN
        raise BrokenImageError(f"grey levels from {low:g} to {high:g}, of mode {image.mode}, have no known white")
    return Image.fromarray((levels.astype(np.float64) * (255 / white)).round().astype(np.uint8))


LARGEST = 4096
"""Largest side of a crop, in pixels."""
Kind = Literal["center", "center-mirror", "ten"]
POSITIONS = ("top-left", "top-right", "bottom-left", "bottom-right", "center")


def center_crop(image: Image.Image, size: int) -> np.ndarray:
    """ADM's (openai/guided-diffusion) resize and centre crop: uint8 [size, size, 3].

    Halve with a box filter while the short side is at least 2 * `size`, resize the short side bicubically to `size`, crop the
    centre.
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
    """The corners and the centre of [.., H, W, 3], in the order of POSITIONS: [.., 5, size, size, 3].

    Like torchvision, the centre's offset is half the margin, rounded to even.
    """
    bottom, right = pixels.shape[-3] - size, pixels.shape[-2] - size
    corners = [(0, 0), (0, right), (bottom, 0), (bottom, right), (round(bottom / 2), round(right / 2))]
    return np.stack([pixels[..., top : top + size, left : left + size, :] for top, left in corners], axis=-4)


@dataclass(frozen=True, kw_only=True)
class Crops:
    """How an image is cropped: resized and centre-cropped to int(size * range), then cut to `size`."""

    kind: Kind
    """The centre, the centre and its mirror image, or corners and centre of image and mirror image."""
    size: int
    """Side of a crop in pixels."""
    range: float
    """Side of the image before cropping, as a multiple of `size`."""
    mirror: bool = True
    """False leaves mirror images out; ten crops are then five."""

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
        names = POSITIONS[self._positions]
        return [*names, *(f"mirrored-{name}" for name in names if self._mirrored)]

    @property
    def _positions(self) -> slice:
        return slice(0 if self.kind == "ten" else POSITIONS.index("center"), None)

    @property
    def _mirrored(self) -> bool:
        return self.mirror and self.kind != "center"

    @property
    def side(self) -> int:
        """Side in pixels before cropping, as in LlamaGen."""
        return int(self.size * self.range + 1e-6)  # 10 * 1.1 is 11 despite rounding

    def cut(self, image: Image.Image) -> np.ndarray:
        """uint8 [crops, size, size, 3]."""
        return self.cut_pixels(center_crop(image, self.side))

    def cut_pixels(self, pixels: np.ndarray) -> np.ndarray:
        """Crop resized images: [.., side, side, 3] -> [.., crops, size, size, 3]."""
        images = [pixels, pixels[..., ::-1, :]] if self._mirrored else [pixels]
        return np.concatenate(
            [five_crops(image, self.size)[..., self._positions, :, :, :] for image in images], axis=-4
        )


MAX_CLASSES = 1_000_000
"""Numbers above are not class indices."""


class Example(NamedTuple):
    """A labelled image: decoded, a file's content or a path."""

    image: Image.Image | bytes | Path
    label: int
    name: str = ""
    """Its origin, for the list of skipped images."""

    def read(self) -> Image.Image:
        """Decode the image to mode RGB; raises BrokenImageError."""
        return read_image(self.image)

    def read_cropped(self, side: int) -> np.ndarray:
        """Decode the image, resize it and crop its centre: uint8 [side, side, 3]; raises BrokenImageError."""
        image = self.read()
        scale = side / min(image.size)
        check_pixels(image.width * scale, image.height * scale)  # a narrow image grows
        return center_crop(image, side)


@dataclass(frozen=True, kw_only=True)
class ImageSource:
    """Labelled images in a fixed order."""

    name: str
    """The specification, such as photos:train."""
    class_names: Sequence[str]
    """Names of the classes 0, 1, ..; empty if the classes are unnamed and their number is unknown."""
    count: int | None
    """Number of images; None if unknown before the end."""
    examples: Callable[[int], Iterator[Example]]
    """The examples from an index on."""
    size: int = 256
    """Default side of a crop, in pixels."""
    crop_range: float = 1.1
    """Default short side before cropping, as a multiple of `size`: 281 pixels in LlamaGen."""
    mirror: bool = True
    """Whether mirrored images keep their meaning."""
    center_range: float | None = None
    """`crop_range` for the centre crop only; None if the same."""
    streaming: bool = False
    """Whether reaching an index requires reading all earlier examples."""
    expected: int | None = None
    """Announced number of images of a source without `count`, for progress and disk space."""
    content: str = ""
    """A hash of what identifies the images without reading them, such as their names."""
    notes: tuple[str, ...] = ()
    """Notes for the user on how the images were found."""

    def range_for(self, kind: Kind) -> float:
        """The default crop range for a kind of crops."""
        return self.center_range if kind != "ten" and self.center_range is not None else self.crop_range


def note_enlarged(source: ImageSource) -> None:
    """Note that the default crop size at least doubles the images of a source; only the first image is read."""
    if source.streaming or source.size != ImageSource.size:  # the embedded images have a size of their own
        return
    with contextlib.suppress(BrokenImageError):
        if example := next(source.examples(0), None):
            side = min(example.read().size)
            if 2 * side <= source.size:
                note(
                    f"the first image has a shorter side of {side} pixels, enlarged to {source.size} by default: --size {side} keeps it"
                )
