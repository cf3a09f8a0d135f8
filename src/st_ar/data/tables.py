"""Parquet files and data sets of the Hugging Face hub as image sources.

Images stay encoded here, so that a broken one is skipped later instead of ending the job.
"""

import glob
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from st_ar.data.source import MAX_CLASSES, Example, ImageSource
from st_ar.errors import UserError, cause, damaged, require
from st_ar.files import printable

ROWS = 64
"""Rows read at once."""


def open_parquet(spec: str) -> ImageSource:
    """The rows of the parquet files that match a glob, sorted by file name.

    `GLOB#image=COLUMN,label=COLUMN` names ambiguous columns; `label=none` makes one class.
    """
    datasets = require("datasets")
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    pattern, options = split_options(spec, ("image", "label"))
    literal = str(Path(pattern).expanduser())
    if not pattern:
        paths = []
    elif Path(literal).exists():  # a name may hold the characters of a pattern
        paths = [literal]
    else:
        paths = sorted(glob.glob(literal, recursive=True))  # noqa: PTH207
    if not paths:
        raise UserError(f"parquet:{pattern} matches no file here ({Path.cwd()}); give a path or a quoted glob")
    columns: Columns | None = None
    counts: list[int] = []
    digest = hashlib.sha256()
    highest = 0
    for path in paths:
        if Path(path).is_dir():
            raise UserError(
                f"parquet:{pattern}: {path} is a folder; give its files in quotes: 'parquet:{path}/*.parquet'"
            )
        try:
            with parquet.ParquetFile(path) as file:
                found = find_columns(datasets.Features.from_arrow_schema(file.schema_arrow), options, f"parquet:{path}")
                counts.append(file.metadata.num_rows)
                if found.label and not found.class_names:
                    batches = file.iter_batches(columns=[found.label])
                    highest = max([highest, *(max(batch[0].drop_null().to_pylist(), default=0) for batch in batches)])
        except (arrow.ArrowException, OSError) as error:
            raise UserError(f"{path} is not a parquet file, or damaged: {cause(error)}; fetch it again") from error
        if columns is not None and found != columns:
            raise UserError(
                f"{path} and {paths[0]} have different columns or class names: give a glob for one data set"
            )
        columns = found
        digest.update(f"{Path(path).name} {counts[-1]}\n".encode(errors="surrogateescape"))
    assert columns is not None
    if not sum(counts):
        raise UserError(f"parquet:{pattern} has no rows in {len(paths)} files")
    known = "label" in options or columns.label in LABEL_NAMES  # of other columns, such as ids, only the numbers tell
    if highest >= (MAX_CLASSES if known else min(sum(counts), MAX_CLASSES)):
        raise UserError(
            f"parquet:{pattern} has numbers up to {highest} in {columns.label!r} for {sum(counts)} rows: these are not class "
            "indices; name another column by #label=COLUMN, or #label=none"
        )

    def examples(start: int) -> Iterator[Example]:
        for path, count in zip(paths, counts, strict=True):
            if start >= count:
                start -= count
                continue
            try:
                for row, values in _rows(parquet, path, columns.names, start):
                    yield _to_example(values, columns, printable(f"{Path(path).name}:{row}"), Path(path).parent)
            except (arrow.ArrowException, OSError) as error:
                raise damaged(path, error, "fetch it again, then give the same command to continue") from error
            start = 0

    return ImageSource(
        name=printable(f"parquet:{spec}"),
        class_names=columns.class_names or [str(label) for label in range(highest + 1)],
        count=sum(counts),
        examples=examples,
        center_range=1.0,
        content=digest.hexdigest(),
    )


def open_hub(spec: str) -> ImageSource:
    """Stream a data set of the Hugging Face hub, or a folder in its layout: `NAME[:SPLIT]`.

    `NAME:SPLIT#config=NAME,image=COLUMN,label=COLUMN` resolves what is ambiguous.
    """
    datasets = require("datasets")
    location, options = split_options(spec, ("image", "label", "config"))
    name, _, split = location.partition(":")
    split = split or "train"
    if not name:
        raise UserError("hub: needs the name of a data set, such as hub:uoft-cs/cifar10:train")
    try:
        stream = datasets.load_dataset(name, options.get("config"), split=split, streaming=True)
        features = stream.features or stream._resolve_features().features
    except Exception as error:  # errors of the hub, HTTP and the file system
        raise UserError(
            f"hub:{name}: cannot open split {split!r}: {cause(error)}. Check the name, the split (hub:NAME:SPLIT), "
            "#config=NAME and the network; a gated data set needs `hf auth login`; give parquet: or folder: for local files"
        ) from error
    columns = find_columns(features, options, f"hub:{name}")
    if isinstance(features[columns.image], datasets.Image):
        stream = stream.cast_column(columns.image, datasets.Image(decode=False))
    stream = stream.select_columns(columns.names)
    info: Any = (stream.info.splits or {}).get(split)

    def examples(start: int) -> Iterator[Example]:
        row = start
        try:
            for values in stream.skip(start) if start else stream:
                yield _to_example(values, columns, f"{name}:{split}:{row}")
                row += 1
        except UserError:
            raise
        except Exception as error:  # as above
            raise UserError(
                f"hub:{name}: cannot read image {row}: {cause(error)}; give the same command to continue"
            ) from error

    return ImageSource(
        name=f"hub:{spec}",
        class_names=columns.class_names,
        count=None,
        examples=examples,
        center_range=1.0,
        streaming=True,
        expected=info.num_examples if info else None,
    )


def _rows(parquet: Any, path: str, columns: list[str], start: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """Numbered rows of a file from `start` on; earlier row groups are not read."""
    with parquet.ParquetFile(path) as file:
        row = 0
        for group in range(file.metadata.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if row + rows <= start:
                row += rows
                continue
            for batch in file.iter_batches(ROWS, row_groups=[group], columns=columns):
                if row + batch.num_rows > start:
                    first = max(0, start - row)
                    yield from enumerate(batch.slice(first).to_pylist(), row + first)
                row += batch.num_rows


IMAGE_NAMES = ("image", "img", "jpg", "jpeg", "png", "webp", "picture", "pixel_values")
LABEL_NAMES = ("label", "labels", "fine_label", "class", "target", "cls", "y")
"""If several columns are possible, the first of these names wins."""


@dataclass(frozen=True)
class Columns:
    """The columns of a table's images and labels."""

    image: str
    label: str | None
    """None if all images are of one class."""
    class_names: Sequence[str]
    """Empty if labels are bare numbers."""

    @property
    def names(self) -> list[str]:
        """Both columns, or one if there are no labels."""
        return [name for name in (self.image, self.label) if name]


def find_columns(features: Any, options: dict[str, str], where: str) -> Columns:
    """The columns of images and labels: those in `options`, or else chosen by type, then by name.

    Args:
        features: `datasets.Features`, column -> type.
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
                    f"{where}: column {name!r} is {_kind(features[name])}, but a {what} column holds {kinds}: {remedy}"
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
    """`LOCATION#key=value,key=value` -> the location and the options."""
    location, mark, text = spec.rpartition("#")
    if not mark or "=" not in text:
        return spec, {}
    options = dict(part.split("=", 1) for part in text.split(",") if "=" in part)
    if unknown := [key for key in options if key not in known] or [p for p in text.split(",") if "=" not in p]:
        raise UserError(f"unknown option {unknown[0]!r} after the # of {spec}: give {', '.join(known)}")
    return location, options


def _to_example(values: dict[str, Any], columns: Columns, name: str, folder: Path | None = None) -> Example:
    """A row as an example. A missing image becomes empty bytes, to be skipped; a missing label becomes -1.

    Paths in a table are relative to `folder`; None for a data set that the datasets library opens.
    """
    picture = values[columns.image]
    if isinstance(picture, dict):
        picture = picture["bytes"] or _file(picture.get("path"), name, folder)
    label = values[columns.label] if columns.label else 0
    return Example(b"" if picture is None else picture, -1 if label is None else int(label), name)


def _file(path: str | None, name: str, folder: Path | None) -> bytes | Path | None:
    """An image that the table refers to: a local file, or one of the data set on the hub."""
    if not path:
        return None
    if path.startswith("file://"):
        path = unquote(urlsplit(path).path)
    if "://" not in path:
        return Path(path) if folder is None else folder / path
    if folder is not None:
        raise UserError(
            f"{name} refers to {path}, which is not on this disk: download the images, or embed their bytes"
        )
    from datasets.utils.file_utils import xopen

    with xopen(path, "rb") as file:
        return file.read()


def _kind(kind: Any) -> str:
    return getattr(kind, "dtype", None) or type(kind).__name__
