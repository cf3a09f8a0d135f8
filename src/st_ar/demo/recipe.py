"""How an image was drawn, as it is kept inside the image's own file, and the way back (docs/formats.md)."""

import io
import json
from dataclasses import dataclass
from typing import cast

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngImageFile, PngInfo

from st_ar.errors import UserError, cause
from st_ar.files import parse_json
from st_ar.sample_config import SampleSettings
from st_ar.settings import from_dict, require, require_types, to_dict

FORMAT_VERSION = 1
KEY = "st-ar"
"""Of the text chunk."""
MOST_IMAGES = 16
"""Images that the page draws at once."""


@dataclass(frozen=True, kw_only=True)
class WeightsRecord:
    """Which weights."""

    file: str
    sha256: str
    ema: bool
    step: int

    def __post_init__(self) -> None:
        require_types(self, "weights.")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All that an image depends on."""

    weights: WeightsRecord
    tokenizer: str
    """Its fingerprint."""
    settings: SampleSettings
    labels: tuple[int, ...]
    """Of all images that were drawn at once: another number of them may change a rounding."""
    number: int
    """Which of them this is."""
    class_name: str
    dtype: str
    device: str
    threads: int
    torch: str
    """Version; it, the device and the threads may change a rounding too."""
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        require_types(self, "")
        require(self.format_version == FORMAT_VERSION, f"format_version {self.format_version} is not {FORMAT_VERSION}")
        require(1 <= len(self.labels) <= MOST_IMAGES, f"there are {len(self.labels)} labels, not 1 to {MOST_IMAGES}")
        require(min(self.labels) >= 0, f"label {min(self.labels)} is below 0")
        require(0 <= self.number < len(self.labels), f"number {self.number} is none of the {len(self.labels)} images")


def to_png(picture: np.ndarray, recipe: Recipe) -> bytes:
    """A picture uint8 [H, W, 3] as a PNG file with its recipe in it."""
    info = PngInfo()
    info.add_text(KEY, json.dumps(to_dict(recipe)))  # ASCII
    file = io.BytesIO()
    Image.fromarray(picture).save(file, format="PNG", pnginfo=info)
    return file.getvalue()


def read_recipe(data: bytes) -> Recipe:
    """The recipe in a PNG file.

    Raises:
        UserError: no PNG, none of the page's, or with a damaged recipe.
    """
    try:
        image = cast(PngImageFile, Image.open(io.BytesIO(data), formats=("PNG",)))
        said = image.info.get(KEY)
    except Exception as error:  # Pillow raises nearly everything on damaged files
        raise UserError("this is no PNG file, or a damaged one: give one that was saved from the page") from error
    if not isinstance(said, str):
        raise UserError("this PNG does not say how it was drawn: give one that was saved from the page, unchanged")
    try:
        values = parse_json(said)
    except ValueError as error:
        raise UserError(
            f"what this PNG says of itself is damaged ({cause(error)}): give one saved from the page"
        ) from error
    return from_dict(Recipe, values, "this PNG")
