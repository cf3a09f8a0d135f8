"""A checkpoint's files. Its manifest, written last, has the size and SHA-256 of every other file."""

import hashlib
import json
import logging
import os
import pickle
import re
import sys
import warnings
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata

from st_ar.errors import UserError
from st_ar.files import parse_json, sha256, write_json

FORMAT_VERSION = 2
MANIFEST, TENSORS = "manifest.json", "tensors"


Files = dict[str, dict[str, int | str]]
"""Name within the checkpoint -> bytes and sha256."""


def describe_files(folder: Path, rank: int = 0) -> Files:
    """List the files that a rank has written into a checkpoint's folder."""
    patterns = [f"{TENSORS}/__{rank}_*", *([f"{TENSORS}/.metadata"] if rank == 0 else [])]
    paths = sorted(path for pattern in patterns for path in folder.glob(pattern))
    return {str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in paths}


def write_manifest(folder: Path, files: Files, record: Mapping[str, Any]) -> None:
    """Write a checkpoint's manifest: its files and the entries of `record`."""
    content = {"format_version": FORMAT_VERSION, **record, "files": dict(sorted(files.items()))}
    write_json(folder / MANIFEST, content | {"sha256": _digest(content)})


def read_record(folder: Path) -> dict[str, Any]:
    """Read the manifest of a checkpoint, empty where it is damaged."""
    try:
        record = parse_json((folder / MANIFEST).read_bytes().decode())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def list_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """List complete checkpoints with their steps, oldest first."""
    return [(step, path) for step, path in _step_folders(folder) if (path / MANIFEST).is_file()]


def newest_whole(folder: Path) -> int:
    """Return the step of the newest checkpoint without damage, 0 without any checkpoint.

    Newer, damaged checkpoints are renamed to step_N.damaged and named on stderr.
    """
    damaged: dict[Path, str] = {}
    for step, path in reversed(_step_folders(folder)):
        damage = find_damage(path)
        if damage is None:
            for old, reason in damaged.items():
                aside = old.with_name(f"{old.name}.damaged")
                if aside.exists():
                    aside = aside.with_name(f"{aside.name}-{len(list(folder.glob(aside.name + '*')))}")
                os.replace(old, aside)
                resuming = f"renamed to {aside.name}; resuming from {path.name}"
                print(f"st-ar: {old} is damaged ({reason}): {resuming}", file=sys.stderr)
            return step
        damaged[path] = damage
    if damaged:
        listed = "; ".join(f"{path.name}: {damage}" for path, damage in damaged.items())
        raise UserError(
            f"no checkpoint in {folder} is whole ({listed}): put a copy of one there, or begin anew in another --out"
        )
    return 0


def find_damage(folder: Path) -> str | None:
    """Describe the first file of a checkpoint that is missing, truncated or altered; None if there is none."""
    try:
        content = parse_json((folder / MANIFEST).read_bytes().decode())
        version, files, digest = content["format_version"], content["files"], content.pop("sha256")
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is not a manifest"
    if version != FORMAT_VERSION and isinstance(version, int):
        raise UserError(
            f"{folder} has format version {version}; this st-ar reads {FORMAT_VERSION}: continue the run with the "
            "st-ar that wrote it"
        )
    if digest != _digest(content):
        return f"{MANIFEST} does not match its checksum"
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:  # hashing releases Python's lock
        damages = list(threads.map(lambda entry: _find_file_damage(folder, *entry), files.items()))
    return next((damage for damage in damages if damage), None)


def _find_file_damage(folder: Path, name: str, expected: Mapping[str, Any]) -> str | None:
    file = folder / name
    try:
        size = file.stat().st_size
        if size != expected["bytes"]:
            return f"{name} has {size} of {expected['bytes']} bytes"
        return None if sha256(file) == expected["sha256"] else f"{name} does not match its checksum"
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        raise UserError(
            f"cannot read {file} ({error.strerror or error}): fix that, or remove {folder} to resume from the one before"
        ) from error


def _step_folders(folder: Path) -> list[tuple[int, Path]]:
    if not folder.is_dir():
        return []
    matches = [(re.fullmatch(r"step_(\d+)", path.name), path) for path in folder.iterdir()]
    return sorted((int(match[1]), path) for match, path in matches if match)


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


METADATA, FILESYSTEM = "torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem"
ALLOWED = {
    *((METADATA, name) for name in ("Metadata", "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING")),
    *((METADATA, name) for name in ("ChunkStorageMetadata", "TensorProperties", "TensorStorageMetadata")),
    *((FILESYSTEM, "_StorageInfo"), ("torch.serialization", "_get_layout"), ("torch", "Size"), ("torch", "float32")),
    *(("pathlib", "PosixPath"), ("pathlib._local", "PosixPath")),
}
"""Everything that a checkpoint's index may unpickle. The last is Python 3.13's name."""

WRITE_ERRORS = (OSError, dcp.CheckpointException)
READ_ERRORS = (OSError, EOFError, RuntimeError, pickle.UnpicklingError, dcp.CheckpointException)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> Any:
        if (module_name, global_name) in ALLOWED:
            return super().find_class(module_name.removesuffix("._local"), global_name)
        raise pickle.UnpicklingError(f"it names {module_name}.{global_name}, which st-ar's checkpoints do not")


class _Reader(FileSystemReader):
    """FileSystemReader whose unpickler has an allow-list."""

    def read_metadata(self, *_args: Any, **_kwargs: Any) -> Metadata:
        with open(Path(self.path) / ".metadata", "rb") as file:
            return _Unpickler(file).load()


class _TensorsOnly(DefaultLoadPlanner):
    """A planner that refuses pickled objects, which the default one loads."""

    def load_bytes(self, read_item: Any, value: Any) -> None:  # noqa: ARG002
        raise pickle.UnpicklingError(f"{read_item.dest_index.fqn} is not a tensor")


def write_tensors(folder: Path, tensors: dict[str, Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Write tensors into a new folder and flush them to the disk. Raises one of WRITE_ERRORS.

    The ranks of a group write together: rank r writes files `__r_*` with its shards and a part of the replicated tensors, rank 0
    also the index.
    """
    dcp.save(tensors, storage_writer=FileSystemWriter(folder), process_group=group, no_dist=group is None)


def read_tensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Read into the given tensors, by name. Raises one of READ_ERRORS if the folder is damaged or has other tensors."""
    # Without the library's warning about a single process and its logged tracebacks: the caller reports errors.
    log_level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.load(tensors, storage_reader=_Reader(folder), planner=_TensorsOnly(), no_dist=True)
    finally:
        logging.disable(log_level)
