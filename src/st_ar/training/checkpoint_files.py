"""What a checkpoint's folder must hold to be whole: its manifest, written last, has the size and SHA-256 of every file.

Version 1 had no manifest: such a folder has torch.distributed.checkpoint's index itself, and is taken as it is.
"""

import contextlib
import hashlib
import json
import logging
import os
import pickle
import re
import sys
import warnings
from collections.abc import Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from st_ar.errors import UserError
from st_ar.files import parse_json, sha256, write_json

FORMAT_VERSION = 2
MANIFEST, TENSORS = "manifest.json", "tensors"


Files = dict[str, dict[str, int | str]]
"""Name within the checkpoint -> bytes and sha256."""


def describe_files(folder: Path, rank: int = 0) -> Files:
    """The files in a checkpoint's folder that a rank has written."""
    patterns = [f"{TENSORS}/__{rank}_*", *([f"{TENSORS}/.metadata"] if rank == 0 else [])]
    paths = sorted(path for pattern in patterns for path in folder.glob(pattern))
    return {str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in paths}


def write_manifest(folder: Path, files: Files, record: Mapping[str, Any]) -> None:
    """Write a checkpoint's manifest: all its files, and what else is to be recorded."""
    content = {"format_version": FORMAT_VERSION, **record, "files": dict(sorted(files.items()))}
    write_json(folder / MANIFEST, content | {"sha256": _digest(content)})


def read_record(folder: Path) -> dict[str, Any]:
    """What was recorded with a checkpoint; nothing where it is damaged."""
    try:
        record = parse_json((folder / MANIFEST).read_bytes().decode())
    except (OSError, ValueError):  # of an older one, which nobody has asked for
        return {}
    return record if isinstance(record, dict) else {}


def list_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Complete checkpoints, oldest first, with their steps."""
    return [(step, path) for step, path in _step_folders(folder) if (path / MANIFEST).is_file()]


def newest_whole(folder: Path) -> int:
    """The step of the newest checkpoint whose files are what they should be, 0 if there are no checkpoints at all.

    Damaged ones that are newer get out of the way, as step_N.damaged, with a word on stderr.

    Raises:
        UserError: all are damaged, the newest is of a newer format, or a file cannot be read.
    """
    damaged: dict[Path, str] = {}
    newest = 0, folder
    for newest in reversed(_step_folders(folder)):
        damage = find_damage(newest[1])
        if damage is None:
            break
        damaged[newest[1]] = damage
    else:
        if not damaged:
            return 0
        listed = "; ".join(f"{path.name}: {damage}" for path, damage in damaged.items())
        raise UserError(
            f"no checkpoint in {folder} is whole ({listed}): put a copy of one there, or begin anew in another --out"
        )
    for old, damage in damaged.items():
        aside = old.with_name(f"{old.name}.damaged")
        if aside.exists():
            aside = aside.with_name(f"{aside.name}-{len(list(folder.glob(aside.name + '*')))}")
        os.replace(old, aside)
        print(f"st-ar: {old} is damaged ({damage}): now {aside.name}, going on from {newest[1].name}", file=sys.stderr)
    return newest[0]


def find_damage(folder: Path) -> str | None:
    """The first file of a checkpoint that is missing, cut short or altered, and how; None if it is whole.

    Raises:
        UserError: a file cannot be read, or the checkpoint is of a newer format.
    """
    try:
        content = parse_json((folder / MANIFEST).read_bytes().decode())
        version, files, digest = content["format_version"], content["files"], content.pop("sha256")
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is no manifest"
    if version != FORMAT_VERSION and isinstance(version, int):
        raise UserError(
            f"{folder} has format version {version}; this st-ar reads {FORMAT_VERSION}: continue the run with the "
            "st-ar that wrote it"
        )
    if digest != _digest(content):
        return f"{MANIFEST} is not as it was written"
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:  # hashing leaves Python's lock alone
        found = list(threads.map(lambda entry: _differs(folder, *entry), files.items()))
    return next((damage for damage in found if damage), None)


def _differs(folder: Path, name: str, expected: Mapping[str, Any]) -> str | None:
    file = folder / name
    try:
        size = file.stat().st_size
        if size != expected["bytes"]:
            return f"{name} has {size} of {expected['bytes']} bytes"
        return None if sha256(file) == expected["sha256"] else f"{name} does not have its checksum"
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        raise UserError(
            f"cannot read {file} ({error.strerror or error}): mend that, or remove {folder} to resume from the one before"
        ) from error


def _step_folders(folder: Path) -> list[tuple[int, Path]]:
    if not folder.is_dir():
        return []
    found = [(re.fullmatch(r"step_(\d+)", path.name), path) for path in folder.iterdir()]
    return sorted((int(match[1]), path) for match, path in found if match)


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


METADATA, FILESYSTEM = "torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem"
ALLOWED = {
    (METADATA, "Metadata"),
    (METADATA, "MetadataIndex"),
    (METADATA, "ChunkStorageMetadata"),
    (METADATA, "TensorProperties"),
    (METADATA, "TensorStorageMetadata"),
    (METADATA, "_MEM_FORMAT_ENCODING"),
    (METADATA, "StorageMeta"),
    (FILESYSTEM, "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("torch", "float32"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
}
"""All that the index of a checkpoint may name; the last as Python 3.13 calls it."""

WRITE_ERRORS = (OSError, dcp.CheckpointException)
READ_ERRORS = (OSError, EOFError, RuntimeError, pickle.UnpicklingError, dcp.CheckpointException)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> Any:
        if (module_name, global_name) in ALLOWED:
            return super().find_class(module_name.removesuffix("._local"), global_name)
        raise pickle.UnpicklingError(f"it names {module_name}.{global_name}, which no checkpoint of ours does")


class _Reader(FileSystemReader):
    """FileSystemReader, but for an unpickler with an allow-list."""

    def read_metadata(self, *_args: Any, **_kwargs: Any) -> Metadata:
        with open(Path(self.path) / ".metadata", "rb") as file:
            metadata = _Unpickler(file).load()
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _TensorsOnly(DefaultLoadPlanner):
    """Never unpickles the objects that the default planner would."""

    def load_bytes(self, read_item: Any, value: Any) -> None:  # noqa: ARG002
        raise pickle.UnpicklingError(f"{read_item.dest_index.fqn} is no tensor")


def write_tensors(folder: Path, tensors: dict[str, Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Write the tensors into a new folder, flushed to the disk; one of WRITE_ERRORS if that fails.

    The ranks of a group write together, each the shards it has and a share of what all have: rank r files `__r_*`, and
    rank 0 the index.
    """
    dcp.save(tensors, storage_writer=FileSystemWriter(folder), process_group=group, no_dist=group is None)


def read_tensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Read into the given tensors, by name; one of READ_ERRORS if the folder is damaged or holds others."""
    with _quietly():
        dcp.load(tensors, storage_reader=_Reader(folder), planner=_TensorsOnly(), no_dist=True)


@contextlib.contextmanager
def _quietly() -> Generator[None]:
    """Without torch.distributed.checkpoint's warnings (one process is what we are) and logged tracebacks (we report errors)."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
