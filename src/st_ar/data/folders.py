"""A folder of images: one sub-folder for each class."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from st_ar.data.images import Example, ImageSource
from st_ar.errors import UserError
from st_ar.files import printable

SUFFIXES = frozenset(
    (
        ".jpg",
        ".jpeg",
        ".jpe",
        ".jfif",
        ".png",
        ".webp",
        ".bmp",
        ".gif",
        ".tif",
        ".tiff",
        ".ppm",
        ".pgm",
        ".jp2",
        ".avif",
    )
)
LARGE_SIZE, TEN_RANGE, CENTER_RANGE = 256, 1.1, 1.0
"""LlamaGen's: ten crops are cut from 281 pixels, the centre crop alone is the whole of 256."""


def open_folder(path: str) -> ImageSource:
    """The images below `path`; classes are its sub-folders in the order of their names (as text, by code point).

    Images may lie deeper within a class's folder; names that begin with a dot and files that are no images are passed
    over. A class without images keeps its index. A folder with images and no sub-folders is one class.

    Raises:
        UserError: no such folder, no images, images beside the class folders, or a folder that cannot be read.
    """
    if not path:
        raise UserError("folder: needs a path, such as folder:imagenet/train")
    root = Path(path).expanduser()
    if not root.is_dir():
        raise UserError(f"folder:{path}: no such folder; give the one that holds a sub-folder for each class")
    try:
        loose, classes = _children(root, "")
        names = classes if classes else [root.resolve().name]
        files = [_images_below(root, name, set()) for name in classes] if classes else [loose]
    except OSError as error:
        raise UserError(f"folder:{path}: cannot read {error.filename}: {error.strerror}") from error
    if classes and loose:
        raise UserError(
            f"folder:{path} has {len(loose)} images beside its {len(classes)} sub-folders, such as {loose[0]}: "
            "move them into the sub-folder of their class"
        )
    if not any(files):
        raise UserError(
            f"folder:{path} holds no images in {len(classes)} sub-folders: looked for {' '.join(sorted(SUFFIXES))}"
        )
    paths = [file for some in files for file in some]
    labels = [label for label, some in enumerate(files) for _ in some]

    def examples(start: int) -> Iterator[Example]:
        for index in range(start, len(paths)):
            yield Example(root / paths[index], labels[index], printable(paths[index]))

    return ImageSource(
        name=printable(f"folder:{path}"),
        class_names=list(map(printable, names)),
        count=len(paths),
        examples=examples,
        size=LARGE_SIZE,
        crop_range=TEN_RANGE,
        center_range=CENTER_RANGE,
        mirror=True,
        content=hashlib.sha256(os.fsencode("\n".join(paths))).hexdigest(),
    )


def _children(root: Path, folder: str) -> tuple[list[str], list[str]]:
    """Image files and sub-folders of root / folder, each in order, as paths from the root."""
    files: list[str] = []
    folders: list[str] = []
    with os.scandir(root / folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            name = f"{folder}/{entry.name}" if folder else entry.name
            if entry.is_dir():
                folders.append(name)
            elif f".{entry.name.rpartition('.')[2]}".lower() in SUFFIXES:
                files.append(name)
    return sorted(files), sorted(folders)


def _images_below(root: Path, folder: str, seen: set[str]) -> list[str]:
    """All images below a folder, its own first; a folder that links lead back to is read once."""
    real = os.path.realpath(root / folder)
    if real in seen:
        return []
    seen.add(real)
    files, folders = _children(root, folder)
    return files + [file for name in folders for file in _images_below(root, name, seen)]
