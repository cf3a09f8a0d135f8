"""Files that are whole or absent: written aside, then renamed. JSON, CSV, and tensors with checksums."""

import argparse
import contextlib
import csv
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


@contextlib.contextmanager
def atomic_write(path: Path) -> Generator[Path]:
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
def atomic_folder(path: Path) -> Generator[Path]:
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
    with atomic_write(path) as aside:
        aside.write_text(json.dumps(value, indent=2) + "\n")


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a CSV file, whole or not at all; None is an empty cell."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(header)
    table.writerows(rows)
    with atomic_write(path) as aside:
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
    with atomic_write(path) as aside, open(aside, "wb") as file:
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        file.write(np.ascontiguousarray(array).data)


def is_nonempty(path: Path, besides: Collection[str] = ()) -> bool:
    """Whether there is a file at `path`, or a folder with more in it than `besides` and what a killed write left."""
    if not path.is_dir():
        return path.exists()
    names = {entry.name for entry in path.iterdir()} - set(besides)
    return any(not (name.startswith(".") and name.endswith(".partial")) for name in names)


def require_absent(path: Path, what: str, besides: Collection[str] = (), *, flag: str = "--out") -> None:
    """Refuse to write over something that is there; `besides` may be, left by a killed job. `flag` named the path."""
    if is_nonempty(path, besides):
        raise UserError(
            f"{path} exists already and is not empty: {what} is never written over; choose another {flag} or remove it"
        )


def claim(file: Path, settings: dict[str, Any], what: str, *, taken: Iterable[Path] = ()) -> bool:
    """Begin a job in a folder, or continue it there; `file` in it keeps the job's settings.

    Args:
        file: file of the settings, such as job.json.
        settings: JSON values that must be the same to continue.
        what: the job's result: "a token store".
        taken: paths besides the folder that must be absent.

    Returns:
        Whether the job had been begun.

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
    """Refuse to continue what was begun in a folder with other settings: name -> (old, new)."""
    if changed:
        listed = "; ".join(f"{name} was {_short(old)}, now {_short(new)}" for name, (old, new) in changed.items())
        raise UserError(
            f"{folder} was begun with other settings: {listed}. Give the old ones to resume it, or choose another --out"
        )


def _short(value: Any) -> str:
    return text if len(text := str(value)) <= 80 else f"{text[:80]} .."


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


WRAPPERS = ("model", "module", "state_dict")
"""Where LlamaGen's files keep their weights: DDP's, DeepSpeed's, and others'; FSDP's are bare."""
EMA_WRAPPERS = ("ema", "model_ema", "ema_model")
"""Where LlamaGen's and others' files keep their EMA weights, beside the live ones."""
PREFIXES = ("_orig_mod.", "module.")
"""What torch.compile and DDP put before a parameter's name."""


OURS, DIGEST = "st_ar", "sha256"
"""The key in a .safetensors file's metadata under which ours say what they are, and in that their checksum.

One key, for safetensors writes several in no fixed order, and equal weights are to be equal files."""
ROWS = 4096
"""Of a tensor's first dimension that are hashed at once."""


def digest(said: Mapping[str, Any], pieces: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 of what a file says of itself, and of its tensors by name, each in pieces of ROWS."""
    found = hashlib.sha256(json.dumps(said, sort_keys=True).encode())
    for name, piece in pieces:
        found.update(f" {name} {piece.dtype} {list(piece.shape)} ".encode())
        found.update(piece.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def in_pieces(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """As `digest` takes tensors that are in memory."""
    return ((name, piece) for name in sorted(tensors) for piece in torch.atleast_1d(tensors[name]).split(ROWS))


def save_tensors(path: Path, tensors: Mapping[str, Tensor], **said: Any) -> None:
    """Write a .safetensors file, whole or not at all, with `said` (plain JSON values) and a checksum in its metadata."""
    kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    said |= {DIGEST: digest(said, in_pieces(kept))}
    # The library writes to a name of its own in the folder first: in one of ours, which the next write clears if this is killed.
    scratch = path.with_name(f".{path.name}.folder.partial")
    with atomic_write(path) as aside:
        shutil.rmtree(scratch, ignore_errors=True)
        try:
            scratch.mkdir()
            # Other libraries, such as accelerate, refuse a file that does not say that its tensors are PyTorch's.
            save_file(kept, scratch / path.name, metadata={OURS: json.dumps(said, sort_keys=True), "format": "pt"})
            _sort_metadata(scratch / path.name)
            (scratch / "mode").touch()  # as the umask has it; the library lets nobody else read what it writes
            (scratch / path.name).chmod((scratch / "mode").stat().st_mode)
            os.replace(scratch / path.name, aside)
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
    """A .safetensors file open for reading, and what `save_tensors` had to say: nothing, if another program wrote it.

    Raises:
        UserError: no such file, or damaged; also where the block reads what is damaged.
    """
    try:
        open(path, "rb").close()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    try:
        with safe_open(path, framework="pt") as file:
            said = parse_json((file.metadata() or {}).get(OURS, "{}"))
            if not isinstance(said, dict):
                raise ValueError(f"its metadata {OURS} is no object")
            yield file, said
    except UserError:
        raise
    except Exception as error:  # the library's own, and torch's on types that it does not know
        raise damaged(path, error, "copy it again, or export it again from its run") from error


def require_digest(path: Path, said: dict[str, Any], pieces: Iterable[tuple[str, Tensor]]) -> None:
    """Compare what was read with the checksum in `said`, if there is one, and take that out.

    Raises:
        UserError: they differ.
    """
    check = said.pop(DIGEST, None)
    if check is not None and check != digest(said, pieces):
        raise damaged(path, "its content does not match its checksum", "copy it again, or export it again from its run")


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a .safetensors file, and what it says of them; both checked if it carries a checksum, as ours do.

    Raises:
        UserError: no such file, damaged, or other content than when it was written.
    """
    with opened_safetensors(path) as (file, said):
        tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 -- no dict
        require_digest(path, said, in_pieces(tensors))
    return tensors, said


def read_tensors(path: Path, *, ema: bool = False) -> dict[str, Tensor]:
    """The weights in a .pt, .pth, .bin or .safetensors file, by plain parameter names.

    A note says which were taken of a file that holds live and EMA weights, or EMA weights only.

    Pickles are loaded with `weights_only=True`; beside tensors and plain values only `argparse.Namespace` is let through,
    which some of LlamaGen's files hold.

    Args:
        ema: take the EMA weights of a .pt, .pth or .bin file.

    Raises:
        UserError: no such file, damaged, no such weights in it, or a pickle that names anything else.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist or is no file: copy it again, or give another")
    if path.suffix == ".safetensors":
        return read_safetensors(path)[0]
    try:
        _check_zip(path)
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle protocols
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} was refused: it is no plain file of weights, and loading it could run code from it "
            f"({cause(error)}). If you trust where it comes from, convert it to .safetensors with the tool that wrote it"
        ) from error
    except Exception as error:  # torch's reader of pickles raises nearly everything
        raise damaged(path, error, "copy or download it again") from error
    return {plain_name(name): tensor for name, tensor in unwrap(loaded, path, ema=ema).items()}


def _check_zip(path: Path) -> None:
    """Compare the checksums of torch's files, which torch itself does not; those from before torch 1.6 have none."""
    with open(path, "rb") as file:
        if file.read(4) != b"PK\x03\x04":
            return
        with zipfile.ZipFile(file) as archive:
            if wrong := archive.testzip():
                raise ValueError(f"{wrong} does not match its checksum")


def unwrap(loaded: Any, path: Path, *, ema: bool = False) -> dict[str, Tensor]:
    """The dict of tensors inside what a file held; see `read_tensors`."""
    averaged = [name for name in EMA_WRAPPERS if isinstance(loaded, dict) and isinstance(loaded.get(name), dict)]
    if ema and not averaged:
        raise UserError(f"{path} holds no EMA weights, under {', '.join(EMA_WRAPPERS)}: leave out --ema")
    if averaged:
        name = next((name for name in WRAPPERS if isinstance(loaded.get(name), dict)), "")
        if ema or not name:
            note(
                f"{path}: taking its EMA weights, {averaged[0]!r}" + (f", not {name!r}" if name else ", the only ones")
            )
            loaded = loaded[averaged[0]]
        else:
            note(f"{path}: taking {name!r}, not its EMA weights {averaged[0]!r}")
    for _ in range(len(WRAPPERS)):
        inner = [loaded[key] for key in WRAPPERS if isinstance(loaded, dict) and isinstance(loaded.get(key), dict)]
        if not inner:
            break
        loaded = inner[0]
    tensors = {str(k): v for k, v in loaded.items() if isinstance(v, Tensor)} if isinstance(loaded, dict) else {}
    if not tensors:
        raise UserError(f"{path} holds no weights, neither bare nor under {', '.join(WRAPPERS)}")
    return tensors


def plain_name(name: str) -> str:
    """A parameter's name without the prefixes of wrappers, in whatever order and number."""
    while name.startswith(PREFIXES):
        name = name.split(".", 1)[1]
    return name.replace("._orig_mod.", ".")
