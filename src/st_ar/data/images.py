"""Image sources: labelled images under one interface, whatever they are stored in.

`photos` and `digits` travel inside the wheels of scikit-image and scikit-learn and need no network; folders are read by
folders.py, parquet files and data sets of the hub by tables.py. Images are decoded by decode.py only, so that a broken
one is skipped wherever it comes from.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from st_ar.data.crops import Kind
from st_ar.data.decode import read_image
from st_ar.errors import UserError

PHOTOGRAPHS = {
    "astronaut": "skimage/data/astronaut.png",
    "brick": "skimage/data/brick.png",
    "camera": "skimage/data/camera.png",
    "cat": "skimage/data/chelsea.png",
    "china": "sklearn.datasets/images/china.jpg",
    "coffee": "skimage/data/coffee.png",
    "coins": "skimage/data/coins.png",
    "flower": "sklearn.datasets/images/flower.jpg",
    "grass": "skimage/data/grass.png",
    "gravel": "skimage/data/gravel.png",
    "hubble": "skimage/data/hubble_deep_field.jpg",
    "tissue": "skimage/data/ihc.png",
    "moon": "skimage/data/moon.png",
    "motorcycle": "skimage/data/motorcycle_left.png",
    "retina": "skimage/data/retina.jpg",
    "rocket": "skimage/data/rocket.jpg",
}
"""Class name -> package and file."""

MAX_CLASSES = 1_000_000
"""More are no classes: the numbers mean something else."""
SHORT_SIDE, BLOCK, PATCH = 320, 80, 36


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

    def range_for(self, kind: Kind) -> float:
        """The crop range that suits the source, for the centre crop alone or for ten."""
        return self.center_range if kind != "ten" and self.center_range is not None else self.crop_range


SOURCES = "folder:PATH, parquet:GLOB, hub:NAME[:SPLIT], photos[:train|:test] or digits[:train|:test]"


def open_images(spec: str) -> ImageSource:
    """Open `folder:PATH`, `parquet:GLOB`, `hub:NAME[:SPLIT]`, `photos`, `photos:test`, `digits:train`, ..

    Without a split it is the training split.

    Raises:
        UserError: an unknown source or split, no images or labels there, or a package that is not installed.
    """
    kind, _, rest = spec.partition(":")
    if kind == "folder":
        from st_ar.data.folders import open_folder

        return open_folder(rest)
    if kind in ("parquet", "hub"):
        from st_ar.data.tables import open_hub, open_parquet

        return open_parquet(rest) if kind == "parquet" else open_hub(rest)
    return _open_embedded(spec)


def _open_embedded(spec: str) -> ImageSource:
    kind, _, split = spec.partition(":")
    split = split or "train"
    readers = {"photos": _photos, "digits": _digits}
    if kind not in readers:
        raise UserError(f"unknown image source {spec!r}: give {SOURCES}")
    if split not in ("train", "test"):
        raise UserError(f"{kind} has no split {split!r}: give {kind}:train or {kind}:test")
    try:
        images, labels, names = readers[kind](split)
    except (ModuleNotFoundError, FileNotFoundError) as error:
        raise UserError(
            f"the images of {kind} come inside other packages ({error}): pip install 'st-ar[quickstart]'"
        ) from error

    def examples(start: int) -> Iterator[Example]:
        for index in range(start, len(images)):
            yield Example(Image.fromarray(images[index]), int(labels[index]), f"{kind}:{split}/{index}")

    return ImageSource(
        name=f"{kind}:{split}",
        class_names=names,
        count=len(images),
        examples=examples,
        size=32,
        crop_range=PATCH / 32,
        mirror=kind != "digits",
    )


Labelled = tuple[np.ndarray, np.ndarray, Sequence[str]]


@cache
def _photos(split: str) -> Labelled:
    """36-pixel patches of 16 photographs, class = photograph, in a fixed shuffled order.

    Each photograph is resized to 320 pixels on its short side and cut into blocks of 80; every fourth block (along the
    diagonals) is for testing. Patches never cross a block's border, so no test pixel is ever trained on.
    """
    offsets = np.linspace(0, BLOCK - PATCH, 6 if split == "train" else 5).round().astype(int)
    patches: list[np.ndarray] = []
    labels: list[int] = []
    for label, place in enumerate(PHOTOGRAPHS.values()):
        package, _, path = place.partition("/")
        with files(package).joinpath(path).open("rb") as file:
            photo = Image.open(file).convert("RGB")
        scale = SHORT_SIDE / min(photo.size)
        pixels = np.asarray(
            photo.resize((round(photo.width * scale), round(photo.height * scale)), Image.Resampling.BICUBIC)
        )
        for row in range(pixels.shape[0] // BLOCK):
            for column in range(pixels.shape[1] // BLOCK):
                if ((row + column) % 4 == 3) != (split == "test"):
                    continue
                for top in row * BLOCK + offsets:
                    for left in column * BLOCK + offsets:
                        patches.append(pixels[top : top + PATCH, left : left + PATCH])
                        labels.append(label)
    order = np.random.default_rng(0).permutation(len(patches))
    return np.stack(patches)[order], np.array(labels)[order], list(PHOTOGRAPHS)


@cache
def _digits(split: str) -> Labelled:
    """Handwritten digits, 8 x 8 grey levels enlarged to 32 x 32 with a border of 2; the last 500 are for testing."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    chosen = slice(0, -500) if split == "train" else slice(-500, None)
    grey = np.asarray(pixels)[chosen].reshape(-1, 8, 8)
    small = (255 - grey * (255 / 16)).round().astype(np.uint8)  # dark ink on white
    large = [np.asarray(Image.fromarray(s).resize((32, 32), Image.Resampling.BICUBIC)) for s in small]
    framed = np.pad(np.stack(large), ((0, 0), (2, 2), (2, 2)), constant_values=255)
    return np.repeat(framed[..., None], 3, axis=-1), np.asarray(labels)[chosen], [str(d) for d in range(10)]
