"""Atomic writes (a temporary file, then a rename), JSON, CSV, arrays, and tensors with checksums."""

import argparse
import contextlib
import csv
import errno
import hashlib
import io
import json
import os
import pickle
import shutil
import warnings
import zipfile
from collections.abc import Collection, Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from st_ar.errors import UserError, cause, damaged, note
from st_ar.settings import differences


def is_forbidden(error: BaseException) -> bool:
    """Whether an error is of a read-only file system or of missing permission."""
    return getattr(error, "errno", None) in (errno.EROFS, errno.EACCES, errno.EPERM)


def unwritable(path: Path, error: Exception) -> UserError:
    """The error for a path that cannot be written."""
    cached = path.absolute().is_relative_to(cache_folder().absolute())
    other = "a folder that you can write to"
    other = f"set ST_AR_CACHE to {other}" if cached else f"give {other}, and copy this one there to continue its job"
    remedy = f"; {other}" if is_forbidden(error) else ""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else error
    return UserError(f"cannot write {path}: {reason}; nothing there was changed{remedy}")


@contextlib.contextmanager
def atomic_write(path: Path) -> Generator[Path]:
    """A temporary path beside `path`: renamed to `path` if the block succeeds, removed if it raises."""
    temporary = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise unwritable(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Generator[Path]:
    """The same for a folder; `path` must be absent or empty."""
    path = path.absolute()
    temporary = path.with_name(f".{path.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)  # left by a killed job
    try:
        temporary.mkdir(parents=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise unwritable(path, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, as UTF-8 in every locale. File names that are not UTF-8 are escaped."""
    with atomic_write(path) as temporary:
        temporary.write_bytes(printable(text).encode())


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_json_lines(path: Path, values: Iterable[Any]) -> None:
    """Write a JSON Lines file atomically."""
    write_text(path, "".join(json.dumps(value) + "\n" for value in values))


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a CSV file atomically; None is an empty cell."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    write_text(path, text.getvalue())


def printable(name: str) -> str:
    """A file name with bytes that are not UTF-8 escaped, so that it can be printed and written as JSON."""
    return name.encode(errors="surrogateescape").decode(errors="backslashreplace")


def parse_json(text: str) -> Any:
    """Parse JSON.

    Raises:
        ValueError: not JSON, a repeated name in an object, a lone surrogate, or nested too deeply.
    """
    try:
        value = json.loads(text, object_pairs_hook=_without_repeats)
        json.dumps(value, ensure_ascii=False).encode()  # refuses lone surrogates, which cannot be printed
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    return value


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError("an object repeats a name")
    return found


def read_json(path: Path, what: str) -> dict[str, Any]:
    """Read a JSON object. In errors, `what` names the folder that the file should belong to."""
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing: {path.parent} is not {what}") from None
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} is unreadable ({cause(error)}): {path.parent} is not {what}, or it is damaged: copy or make it again"
        ) from error
    if not isinstance(value, dict):
        raise UserError(f"{path} is not a JSON object: {path.parent} is not {what}, or it is damaged")
    return value


def open_array(path: Path) -> np.ndarray:
    """Memory-map a .npy file, so that a false shape in its header allocates nothing.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a .npy file, damaged, truncated, or of Python objects.
    """
    try:
        return _load_mapped(path)
    except FileNotFoundError:
        raise
    except Exception as error:  # NumPy evaluates the header: a damaged one can raise almost anything
        raise ValueError(cause(error)) from error


def _load_mapped(path: Path, tries: int = 5) -> np.ndarray:
    try:
        with np.errstate(over="raise"):  # in the product of the shape
            return np.load(path, mmap_mode="r", allow_pickle=False)
    except SystemError:  # CPython 3.11, when two threads parse headers at once (python/cpython#106905)
        if tries == 1:
            raise
        return _load_mapped(path, tries - 1)


def sha256(path: Path) -> str:
    """The file's SHA-256 in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_array(path: Path, array: np.ndarray) -> None:
    """Write a .npy file atomically. On a full disk np.save silently drops the last bytes; this raises."""
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        file.write(np.ascontiguousarray(array).data)


def is_nonempty(path: Path, besides: Collection[str] = ()) -> bool:
    """Whether `path` is a file, or a folder that holds more than `besides` and temporary files of killed writes."""
    if not path.is_dir():
        return path.exists()
    names = {entry.name for entry in path.iterdir()} - set(besides)
    return any(not (name.startswith(".") and name.endswith(".partial")) for name in names)


def require_absent(path: Path, what: str, besides: Collection[str] = (), *, flag: str = "--out") -> None:
    """Refuse to overwrite `path`. The files `besides` may exist, left by a killed job; `flag` is the option that gave the path."""
    if is_nonempty(path, besides):
        raise UserError(
            f"{path} exists already and is not empty: {what} is never overwritten; choose another {flag} or remove it"
        )


def claim(file: Path, settings: dict[str, Any], what: str, *, taken: Iterable[Path] = ()) -> bool:
    """Start a job in the folder of `file`, or continue it if the settings in `file` are the same.

    Args:
        file: the job's settings, such as job.json.
        settings: JSON values that must not change.
        what: the job's result, such as "a token store".
        taken: further paths that must be absent at the start.

    Returns:
        Whether the job is continued.

    Raises:
        UserError: the folder holds something else, or a job with other settings.
    """
    if file.exists():
        require_same(file.parent, differences(read_json(file, f"an unfinished job ({what})"), settings))
        return True
    for path in (*taken, file.parent):
        require_absent(path, what)
    write_json(file, settings)
    return False


def require_same(folder: Path, changed: Mapping[str, tuple[Any, Any]]) -> None:
    """Refuse to continue a job if settings have changed: name -> (old, new)."""
    if changed:
        listed = "; ".join(f"{name} was {_short(old)}, now {_short(new)}" for name, (old, new) in changed.items())
        raise UserError(
            f"{folder} was begun with other settings: {listed}. Give the old ones to resume it, or choose another --out"
        )


def _short(value: Any) -> str:
    return text if len(text := str(value)) <= 80 else f"{text[:80]} .."


def require_place(path: Path) -> None:
    """Refuse, before long work, a path whose folder is not writable."""
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        reason = "is not writable" if parent.is_dir() else "is not a folder"
        raise UserError(f"cannot write {path}: {parent} {reason}; choose another folder")


def cache_folder() -> Path:
    """The folder of downloads and features: $ST_AR_CACHE, or st-ar in $XDG_CACHE_HOME or ~/.cache."""
    if own := os.environ.get("ST_AR_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "st-ar"


OURS, DIGEST = "st_ar", "sha256"
"""The keys of our metadata and of the checksum in a .safetensors file."""
ROWS = 4096
"""Rows of a tensor that are hashed at once."""


def digest(metadata: Mapping[str, Any], pieces: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 of a file's metadata and of its tensors by name, each in pieces of ROWS."""
    checksum = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name, piece in pieces:
        checksum.update(f" {name} {piece.dtype} {list(piece.shape)} ".encode())
        checksum.update(piece.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return checksum.hexdigest()


def in_pieces(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The pieces of tensors, as `digest` takes them."""
    return ((name, piece) for name in sorted(tensors) for piece in torch.atleast_1d(tensors[name]).split(ROWS))


def save_tensors(path: Path, tensors: Mapping[str, Tensor], **metadata: Any) -> None:
    """Write a .safetensors file atomically, with JSON values and a checksum in its metadata."""
    copies = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata |= {DIGEST: digest(metadata, in_pieces(copies))}
    # safetensors writes a temporary file of its own beside the target: a scratch folder lets the next write clean up after a kill.
    scratch = path.with_name(f".{path.name}.folder.partial")
    with atomic_write(path) as temporary:
        shutil.rmtree(scratch, ignore_errors=True)
        try:
            scratch.mkdir()
            save_file(
                copies, scratch / path.name, metadata={OURS: json.dumps(metadata, sort_keys=True), "format": "pt"}
            )
            _sort_metadata(scratch / path.name)
            (scratch / "mode").touch()  # with the umask's permissions; safetensors gives none to others
            (scratch / path.name).chmod((scratch / "mode").stat().st_mode)
            os.replace(scratch / path.name, temporary)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def _sort_metadata(path: Path) -> None:
    """Put a .safetensors file's metadata in order, which the library writes at random: equal weights give equal bytes."""
    with open(path, "r+b") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        end = file.tell()
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        file.seek(8)
        file.write(text.ljust(end - 8))
        assert file.tell() == end, "the header has another length"


@contextlib.contextmanager
def opened_safetensors(path: Path) -> Generator[tuple[Any, dict[str, Any]]]:
    """An open .safetensors file and the metadata of `save_tensors`; other programs' files have none."""
    try:
        open(path, "rb").close()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    try:
        with safe_open(path, framework="pt") as file:
            metadata = parse_json((file.metadata() or {}).get(OURS, "{}"))
            if not isinstance(metadata, dict):
                raise ValueError(f"its metadata {OURS} is not an object")
            yield file, metadata
    except UserError:
        raise
    except Exception as error:  # safetensors' own errors, and torch's for unknown types
        raise damaged(path, error, "copy it again, or export it again from its run") from error


def require_digest(path: Path, metadata: dict[str, Any], pieces: Iterable[tuple[str, Tensor]]) -> None:
    """Remove the checksum from `metadata` and refuse a file that does not match it."""
    checksum = metadata.pop(DIGEST, None)
    if checksum is not None and checksum != digest(metadata, pieces):
        raise damaged(path, "its content does not match its checksum", "copy it again, or export it again from its run")


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and metadata of a .safetensors file, checked if it has a checksum."""
    with opened_safetensors(path) as (file, metadata):
        tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 -- not a dict
        require_digest(path, metadata, in_pieces(tensors))
    return tensors, metadata


WRAPPERS, EMA_WRAPPERS = ("model", "module", "state_dict"), ("ema", "model_ema", "ema_model")
"""Keys that hold the weights in checkpoints of LlamaGen (DDP), DeepSpeed and others; FSDP's are bare."""
PREFIXES = ("_orig_mod.", "module.")
"""Prefixes that torch.compile and DDP add to parameter names."""


def read_tensors(path: Path, *, ema: bool = False) -> dict[str, Tensor]:
    """The weights in a .pt, .pth, .bin or .safetensors file, by parameter name.

    If the file has EMA weights, a note says which weights are read.

    Pickles are loaded with `weights_only=True`, which also allows `argparse.Namespace`: some of LlamaGen's files hold one.

    Args:
        ema: take the EMA weights of a .pt, .pth or .bin file.

    Raises:
        UserError: no such file, damaged, without weights, or a pickle of other classes.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist or is not a file: copy it again, or give another")
    if path.suffix == ".safetensors":
        return read_safetensors(path)[0]
    try:
        _check_zip(path)
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} was refused: it holds more than weights, and loading it could run code ({cause(error)}). If you trust "
            "its source, convert it to .safetensors with the tool that wrote it"
        ) from error
    except Exception as error:  # torch's unpickler can raise almost anything
        raise damaged(path, error, "copy or download it again") from error
    loaded = _choose_weights(loaded, path, ema)
    for _ in WRAPPERS:
        inner = [loaded[key] for key in WRAPPERS if isinstance(loaded, dict) and isinstance(loaded.get(key), dict)]
        loaded = inner[0] if inner else loaded
    values = loaded.items() if isinstance(loaded, dict) else ()
    tensors = {_plain_name(str(name)): value for name, value in values if isinstance(value, Tensor)}
    if not tensors:
        raise UserError(f"{path} has no weights, neither bare nor under {', '.join(WRAPPERS)}: give another file")
    return tensors


def _check_zip(path: Path) -> None:
    """Check a torch file's checksums, as torch does not. Files from before torch 1.6 have none."""
    with open(path, "rb") as file:
        if file.read(4) != b"PK\x03\x04":
            return
        with zipfile.ZipFile(file) as archive:
            if wrong := archive.testzip():
                raise ValueError(f"{wrong} does not match its checksum")


def _choose_weights(loaded: Any, path: Path, ema: bool) -> Any:
    """The live or the EMA part of what a file holds."""
    averaged = next((key for key in EMA_WRAPPERS if isinstance(loaded, dict) and isinstance(loaded.get(key), dict)), "")
    if ema and not averaged:
        raise UserError(f"{path} has no EMA weights, under {', '.join(EMA_WRAPPERS)}: leave out --ema")
    if not averaged:
        return loaded
    live = next((key for key in WRAPPERS if isinstance(loaded.get(key), dict)), "")
    if live and not ema:
        note(f"{path}: using {live!r}, not its EMA weights {averaged!r}")
        return loaded
    note(f"{path}: using its EMA weights {averaged!r}" + (f", not {live!r}" if live else ""))
    return loaded[averaged]


def _plain_name(name: str) -> str:
    """A parameter's name without the wrappers' prefixes, however many there are."""
    while name.startswith(PREFIXES):
        name = name.split(".", 1)[1]
    return name.replace("._orig_mod.", ".")
