"""Files that are there whole or not at all: written under another name, flushed to the disk, then renamed."""

import contextlib
import csv
import hashlib
import io
import json
import os
import shutil
from collections.abc import Collection, Generator, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError

from st_ar.errors import UserError, cause


@contextlib.contextmanager
def written_aside(path: Path) -> Generator[Path]:
    """A temporary path beside `path` that takes its name when the block ends well and vanishes when it does not."""
    aside = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield aside
        with open(aside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot write {path}: {reason}; nothing there was changed") from error
    finally:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)


@contextlib.contextmanager
def folder_aside(path: Path) -> Generator[Path]:
    """The same for a folder: a new one beside `path`, which must be absent or empty; what a killed job left of it is cleared."""
    path = path.absolute()
    aside = path.with_name(f".{path.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        yield aside
        os.replace(aside, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; nothing there was changed") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, whole or not at all."""
    with written_aside(path) as aside:
        aside.write_text(json.dumps(value, indent=2) + "\n")


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a CSV file, whole or not at all; None is an empty cell."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(header)
    table.writerows(rows)
    with written_aside(path) as aside:
        aside.write_text(text.getvalue())


def printable(name: str) -> str:
    """A file's name as text: bytes of it that are no UTF-8 are escaped, so that it can be printed, and written as JSON."""
    return os.fsencode(name).decode(errors="backslashreplace")


def parse_json(text: str) -> Any:
    """A JSON value.

    Raises:
        ValueError: no JSON, a name that stands twice in an object, text that is no Unicode, or nested or long without end.
    """
    try:
        value = json.loads(text, object_pairs_hook=_without_repeats)
        json.dumps(value, ensure_ascii=False).encode()  # no lone surrogates, which could not be printed or written
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    return value


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError("a name stands twice in an object")
    return found


def read_json(path: Path, what: str) -> dict[str, Any]:
    """Read a JSON object; `what` says in the error what the file should have been."""
    try:
        value = parse_json(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} is missing: {path.parent} is not {what}") from None
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} is unreadable ({cause(error)}): {path.parent} is not {what}, or it is damaged: copy or make it again"
        ) from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object: {path.parent} is not {what}, or it is damaged")
    return value


def open_array(path: Path) -> np.ndarray:
    """A .npy file's array, memory-mapped: a header that promises more than the file holds takes no memory.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no .npy file, damaged, cut short, or of Python objects.
    """
    try:
        return _load_mapped(path)
    except FileNotFoundError:
        raise
    except Exception as error:  # NumPy evaluates the header: damaged ones raise nearly everything
        raise ValueError(cause(error)) from error


def _load_mapped(path: Path, tries: int = 5) -> np.ndarray:
    try:
        with np.errstate(over="raise"):  # of a shape's product
            return np.load(path, mmap_mode="r", allow_pickle=False)
    except SystemError:  # CPython 3.11's, when two threads parse headers at once (python/cpython#106905)
        if tries == 1:
            raise
        return _load_mapped(path, tries - 1)


def sha256(path: Path) -> str:
    """The file's SHA-256, as hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_array(path: Path, array: np.ndarray) -> None:
    """Write a .npy file, whole or not at all.

    Not by np.save: on a full disk it drops an array's last bytes without a word.
    """
    with written_aside(path) as aside, open(aside, "wb") as file:
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        file.write(np.ascontiguousarray(array).data)


def is_taken(path: Path, besides: Collection[str] = ()) -> bool:
    """Whether there is a file at `path`, or a folder with more in it than `besides` and what a killed write left."""
    if not path.is_dir():
        return path.exists()
    names = {entry.name for entry in path.iterdir()} - set(besides)
    return any(not (name.startswith(".") and name.endswith(".partial")) for name in names)


def require_absent(path: Path, what: str, besides: Collection[str] = (), *, flag: str = "--out") -> None:
    """Refuse to write over something that is there; `besides` may be, left by a killed job. `flag` named the path."""
    if is_taken(path, besides):
        raise UserError(
            f"{path} exists already and is not empty: {what} is never written over; choose another {flag} or remove it"
        )


def require_place(path: Path) -> None:
    """Refuse a path below a file or in a folder that may not be written to, before the work whose result it is for."""
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        reason = "may not be written to" if parent.is_dir() else "is no folder"
        raise UserError(f"cannot write {path}: {parent} {reason}; choose another place")


def cache_folder() -> Path:
    """Where downloads and features are kept: $ST_AR_CACHE, or st-ar below $XDG_CACHE_HOME or ~/.cache."""
    if own := os.environ.get("ST_AR_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "st-ar"
