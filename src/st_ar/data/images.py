"""Folders of images, and the `photos` and `digits` inside the wheels of scikit-image and scikit-learn."""

import hashlib
import os
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from importlib.resources import files
from pathlib import Path

import numpy as np
from PIL import Image

from st_ar.data.source import Example, ImageSource
from st_ar.distributed import Ranks
from st_ar.errors import UserError, listed, note
from st_ar.files import printable

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
SHORT_SIDE, BLOCK, PATCH = 320, 80, 36
SOURCES = "folder:PATH, parquet:GLOB, hub:NAME[:SPLIT], photos[:train|:test] or digits[:train|:test]"


def open_images(spec: str) -> ImageSource:
    """Open `folder:PATH`, `parquet:GLOB`, `hub:NAME[:SPLIT]`, `photos[:SPLIT]` or `digits[:SPLIT]`. The default split is train.

    Raises:
        UserError: an unknown source or split, no images or labels, or a package that is not installed.
    """
    kind, _, rest = spec.partition(":")
    if kind == "folder":
        source = open_folder(rest)
    elif kind in ("parquet", "hub"):
        from st_ar.data.tables import open_hub, open_parquet

        source = open_parquet(rest) if kind == "parquet" else open_hub(rest)
    else:
        source = _open_embedded(spec)
    if Ranks.from_environment().rank == 0:
        for text in source.notes:
            note(text)
    return source


def with_num_classes(source: ImageSource, num_classes: int) -> ImageSource:
    """A source whose classes are numbers from 0, with `num_classes` of them: a part of a data set may lack the last ones.

    Raises:
        UserError: its classes have names, or there are more of them.
    """
    names = [str(label) for label in range(num_classes)]
    if list(source.class_names) != names[: len(source.class_names)]:
        raise UserError(
            f"--num-classes {num_classes} is for classes that are numbers from 0 to at most {num_classes - 1}; those of "
            f"{source.name} are {listed(source.class_names)}: leave --num-classes out"
        )
    return replace(source, class_names=names)


def _open_embedded(spec: str) -> ImageSource:
    kind, _, split = spec.partition(":")
    split = split or "train"
    readers = {"photos": _photos, "digits": _digits}
    if kind not in readers:
        meant = f"did you mean folder:{spec}? Give" if Path(spec).is_dir() else "give"
        raise UserError(f"unknown image source {spec!r}: {meant} {SOURCES}")
    if split not in ("train", "test"):
        raise UserError(f"{kind} has no split {split!r}: give {kind}:train or {kind}:test")
    try:
        images, labels, names = readers[kind](split)
    except (ModuleNotFoundError, FileNotFoundError) as error:
        raise UserError(
            f"the images of {kind} are part of other packages ({error}): pip install 'st-ar[quickstart]'"
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
    """36-pixel patches of 16 photographs, one class each, in a fixed shuffled order.

    The short side is resized to 320 pixels. Every fourth block of 80 pixels, along the diagonals, belongs to the test split.
    Patches do not cross blocks, so no test pixel is trained on.
    """
    offsets = np.linspace(0, BLOCK - PATCH, 6 if split == "train" else 5).round().astype(int)
    patches: list[np.ndarray] = []
    labels: list[int] = []
    for label, location in enumerate(PHOTOGRAPHS.values()):
        package, _, path = location.partition("/")
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
    """Handwritten digits of 8 x 8 grey levels, enlarged to 32 x 32, with a border of 2; the last 500 are the test split."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    chosen = slice(0, -500) if split == "train" else slice(-500, None)
    grey = np.asarray(pixels)[chosen].reshape(-1, 8, 8)
    small = (255 - grey * (255 / 16)).round().astype(np.uint8)  # dark ink on white
    large = [np.asarray(Image.fromarray(s).resize((32, 32), Image.Resampling.BICUBIC)) for s in small]
    framed = np.pad(np.stack(large), ((0, 0), (2, 2), (2, 2)), constant_values=255)
    return np.repeat(framed[..., None], 3, axis=-1), np.asarray(labels)[chosen], [str(d) for d in range(10)]


SUFFIXES = frozenset(
    f".{name}"
    for name in ("jpg", "jpeg", "jpe", "jfif", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm", "jp2", "avif")
)


IGNORED = frozenset(
    (
        *("__macosx", "@eadir", "@tmp", "@recycle", "#recycle", "#snapshot", "$recycle.bin", "recycler", "lost+found"),
        *("found.000", "system volume information", "network trash folder", "temporary items", "__pycache__"),
    )
)
"""Folders that operating systems, NAS devices and archivers make, in lower case."""


def open_folder(path: str) -> ImageSource:
    """The images in `path`; its sub-folders are the classes.

    Classes are sorted by name: as numbers if all names are numbers, otherwise as text in Unicode's composed form (NFC), by code
    point. Class folders may be nested. Hidden files, other files and IGNORED folders are skipped. A class without images keeps
    its index. A folder of images without sub-folders is one class.
    """
    if not path:
        raise UserError("folder: needs a path, such as folder:imagenet/train")
    root = Path(path).expanduser()
    if not root.is_dir():
        raise UserError(f"folder:{path}: no such folder; give the one with a sub-folder for each class")
    ignored: list[str] = []
    try:
        loose, classes = _children(root, "", ignored)
        numbered = all(name.isascii() and name.isdecimal() for name in classes)
        if numbered:
            classes.sort(key=lambda name: (int(name), name))
        files = [_images_below(root, name, set(), ignored) for name in classes] if classes else [loose]
    except OSError as error:
        raise UserError(f"folder:{path}: cannot read {error.filename}: {error.strerror}") from error
    names = [unicodedata.normalize("NFC", printable(name)) for name in classes or [root.resolve().name]]
    if twins := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(
            f"folder:{path} has two folders called {twins[0]!r}, in composed and decomposed Unicode: rename or merge them"
        )
    if classes and loose:
        raise UserError(
            f"folder:{path} has {len(loose)} images beside its {len(classes)} sub-folders, such as {loose[0]}: "
            "move them into the sub-folder of their class"
        )
    if not any(files):
        raise UserError(
            f"folder:{path} has no images in {len(classes)} sub-folders: looked for {' '.join(sorted(SUFFIXES))}"
        )
    filled = [name for name, folder in zip(classes, files, strict=False) if folder]
    if filled and not any(file.count("/") == 1 for folder in files for file in folder):
        meant = next((name for name in filled if name.lower() in ("train", "training")), filled[0])
        raise UserError(
            f"folder:{path} has no images directly in its sub-folders {listed(filled, 3)}, only in folders below them: give "
            f"folder:{Path(path) / meant} if the classes are there, or move the images up"
        )
    paths = [file for folder in files for file in folder]
    labels = [label for label, folder in enumerate(files) for _ in folder]

    def examples(start: int) -> Iterator[Example]:
        for index in range(start, len(paths)):
            yield Example(root / paths[index], labels[index], printable(paths[index]))

    return ImageSource(
        name=printable(f"folder:{path}"),
        class_names=names,
        count=len(paths),
        examples=examples,
        center_range=1.0,
        content=hashlib.sha256(os.fsencode("\n".join(paths))).hexdigest(),
        notes=_notes(f"folder:{path}", names, files, numbered, ignored),
    )


def images_in(root: Path) -> tuple[list[str], list[str]]:
    """The images directly in a folder, and those in its sub-folders, as paths relative to it."""
    loose, folders = _children(root, "", [])
    seen = {os.path.realpath(root)}
    return loose, [file for name in folders for file in _images_below(root, name, seen, [])]


def _notes(
    source: str, names: list[str], files: list[list[str]], numbered: bool, ignored: list[str]
) -> tuple[str, ...]:
    notes: list[str] = []
    if numbered and names != sorted(names):
        notes.append(f"{source}: all classes are numbers and are sorted as numbers, from {names[0]} to {names[-1]}")
    if ignored:
        notes.append(f"{source}: skipped folders that are not classes: {listed(sorted(map(printable, ignored)))}")
    if empty := [name for name, folder in zip(names, files, strict=True) if not folder]:
        notes.append(f"{source}: {len(empty)} of {len(names)} classes have no images: {listed(empty)}")
    return tuple(notes)


def _order(name: str) -> tuple[str, str]:
    """The key of a sort that ignores whether Unicode is composed or decomposed."""
    return unicodedata.normalize("NFC", name), name


def _children(root: Path, folder: str, ignored: list[str]) -> tuple[list[str], list[str]]:
    """The image files and the sub-folders of root / folder, as sorted paths relative to the root; adds to `ignored` folders."""
    files: list[str] = []
    folders: list[str] = []
    with os.scandir(root / folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            name = f"{folder}/{entry.name}" if folder else entry.name
            if entry.name.lower() in IGNORED:
                ignored.append(name)
            elif entry.is_dir():
                folders.append(name)
            elif f".{entry.name.rpartition('.')[2]}".lower() in SUFFIXES:
                files.append(name)
    return sorted(files, key=_order), sorted(folders, key=_order)


def _images_below(root: Path, folder: str, seen: set[str], ignored: list[str]) -> list[str]:
    """All images below a folder, its own first. `seen` ends cycles of links."""
    real = os.path.realpath(root / folder)
    if real in seen:
        return []
    seen.add(real)
    files, folders = _children(root, folder, ignored)
    return files + [file for name in folders for file in _images_below(root, name, seen, ignored)]
