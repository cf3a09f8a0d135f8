"""Which columns of a table hold the images and their labels, and what a row of them is."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from st_ar.data.images import Example
from st_ar.errors import UserError

IMAGE_NAMES = ("image", "img", "jpg", "jpeg", "png", "webp", "picture", "pixel_values")
LABEL_NAMES = ("label", "labels", "fine_label", "class", "target", "cls", "y")
"""Which column is taken if several could be: the first of these."""


@dataclass(frozen=True)
class Columns:
    """Where a table has its images and labels."""

    image: str
    label: str | None
    """None: all images are of one class."""
    class_names: Sequence[str]
    """None of them if labels are bare numbers."""


def find_columns(features: Any, options: dict[str, str], where: str) -> Columns:
    """The columns of a table's images and labels: as the user says, or else by their types, then by their names.

    Args:
        features: `datasets.Features`, column -> type.

    Raises:
        UserError: none, several that cannot be told apart, or not the one that was named.
    """
    import datasets

    def is_image(kind: Any) -> bool:
        encoded = getattr(kind, "dtype", "") in ("binary", "large_binary")
        return isinstance(kind, datasets.Image) or encoded or (isinstance(kind, dict) and "bytes" in kind)

    def is_label(kind: Any) -> bool:
        return isinstance(kind, datasets.ClassLabel) or getattr(kind, "dtype", "").startswith(("int", "uint"))

    def choose(what: str, candidates: list[str], names: Sequence[str]) -> str:
        listed = ", ".join(f"{column} ({_kind(kind)})" for column, kind in features.items())
        none = ", or #label=none to take all images as one class" if what == "label" else ""
        remedy = f"name one by {where}#{what}=COLUMN{none}; it has {listed}"
        if what in options:
            name = options[what]
            if name not in features:
                raise UserError(f"{where} has no column {name!r}: {remedy}")
            if name not in candidates:
                kinds = {"image": "images or the bytes of files", "label": "whole numbers (a ClassLabel or int)"}[what]
                raise UserError(
                    f"{where}: column {name!r} is {_kind(features[name])}, a {what} column holds {kinds}: {remedy}"
                )
            return name
        if len(candidates) == 1:
            return candidates[0]
        named = [name for name in names if name in candidates]
        if not named:
            raise UserError(f"{where} has {len(candidates) or 'no'} columns that could be its {what}: {remedy}")
        return named[0]

    image = choose("image", [column for column, kind in features.items() if is_image(kind)], IMAGE_NAMES)
    if options.get("label") == "none":
        return Columns(image, None, ["all"])
    labels = [column for column, kind in features.items() if is_label(kind)]
    classes = [column for column in labels if isinstance(features[column], datasets.ClassLabel)]
    label = choose("label", labels if "label" in options or not classes else classes, LABEL_NAMES)
    return Columns(image, label, list(getattr(features[label], "names", None) or []))


def split_options(spec: str, known: Sequence[str]) -> tuple[str, dict[str, str]]:
    """`PLACE#key=value,key=value` -> the place and the options."""
    place, mark, text = spec.rpartition("#")
    if not mark or "=" not in text:
        return spec, {}
    options = dict(part.split("=", 1) for part in text.split(",") if "=" in part)
    if unknown := [key for key in options if key not in known] or [p for p in text.split(",") if "=" not in p]:
        raise UserError(f"unknown option {unknown[0]!r} after the # of {spec}: give {', '.join(known)}")
    return place, options


def to_example(values: dict[str, Any], columns: Columns, name: str) -> Example:
    """A row as an example. Without an image it gets an empty one, to be skipped; without a label, -1."""
    picture = values[columns.image]
    if isinstance(picture, dict):
        picture = picture["bytes"] or _file(picture.get("path"))
    label = values[columns.label] if columns.label else 0
    return Example(b"" if picture is None else picture, -1 if label is None else int(label), name)


def _file(path: str | None) -> bytes | Path | None:
    """An image that the table only points to: on this disk, or within the data set on the hub."""
    if not path or "://" not in path:
        return Path(path) if path else None
    from datasets.utils.file_utils import xopen

    with xopen(path, "rb") as file:
        return file.read()


def _kind(kind: Any) -> str:
    return getattr(kind, "dtype", None) or type(kind).__name__
