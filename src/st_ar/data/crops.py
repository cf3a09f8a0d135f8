"""Crops of an image: ADM's resize and centre crop, and the ten crops whose tokens are computed ahead of training."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from st_ar.errors import UserError

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
