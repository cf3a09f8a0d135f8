"""Tensors from other people's files, without running anything that is in them."""

import argparse
import contextlib
import hashlib
import json
import os
import pickle
import shutil
import warnings
import zipfile
from collections.abc import Generator, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from st_ar.errors import UserError, cause
from st_ar.files import parse_json, written_aside

WRAPPERS = ("model", "module", "state_dict")
"""Where LlamaGen's files keep their weights: DDP's, DeepSpeed's, and others'; FSDP's are bare."""
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
    with written_aside(path) as aside:
        shutil.rmtree(scratch, ignore_errors=True)
        try:
            scratch.mkdir()
            # One entry of metadata: several would be written in random order.
            save_file(kept, scratch / path.name, metadata={OURS: json.dumps(said, sort_keys=True)})
            (scratch / "mode").touch()  # as the umask has it; the library lets nobody else read what it writes
            (scratch / path.name).chmod((scratch / "mode").stat().st_mode)
            os.replace(scratch / path.name, aside)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


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
        raise UserError(
            f"{path} is damaged or incomplete ({cause(error)}): copy it again, or export it again from its run"
        ) from error


def require_digest(path: Path, said: dict[str, Any], pieces: Iterable[tuple[str, Tensor]]) -> None:
    """Compare what was read with the checksum in `said`, if there is one, and take that out.

    Raises:
        UserError: they differ.
    """
    check = said.pop(DIGEST, None)
    if check is not None and check != digest(said, pieces):
        raise UserError(
            f"{path} is damaged: its content does not match its checksum; copy it again, or export it again from its run"
        )


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a .safetensors file, and what it says of them; both checked if it carries a checksum, as ours do.

    Raises:
        UserError: no such file, damaged, or other content than when it was written.
    """
    with opened_safetensors(path) as (file, said):
        tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 -- no dict
        require_digest(path, said, in_pieces(tensors))
    return tensors, said


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The weights in a .pt, .pth, .bin or .safetensors file, by plain parameter names.

    Pickles are loaded with `weights_only=True`; beside tensors and plain values only `argparse.Namespace` is let through,
    which some of LlamaGen's files hold.

    Raises:
        UserError: no such file, damaged, no weights in it, or a pickle that names anything else.
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
            f"({_cause(error)}). If you trust where it comes from, convert it to .safetensors with the tool that wrote it"
        ) from error
    except Exception as error:  # torch's reader of pickles raises nearly everything
        raise UserError(f"{path} is damaged or incomplete ({_cause(error)}): copy or download it again") from error
    return {plain_name(name): tensor for name, tensor in unwrap(loaded, path).items()}


def _check_zip(path: Path) -> None:
    """Compare the checksums of torch's files, which torch itself does not; those from before torch 1.6 have none."""
    with open(path, "rb") as file:
        if file.read(4) != b"PK\x03\x04":
            return
        with zipfile.ZipFile(file) as archive:
            if wrong := archive.testzip():
                raise ValueError(f"{wrong} does not match its checksum")


def unwrap(loaded: Any, path: Path) -> dict[str, Tensor]:
    """The dict of tensors inside what a file held."""
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


def _cause(error: BaseException) -> str:
    """The telling line of torch's long messages."""
    lines = (str(error).strip() or type(error).__name__).splitlines()
    return next((line.strip() for line in lines if "GLOBAL" in line or "nsupported" in line), lines[0])
