"""Named tensors on disk as a torch.distributed.checkpoint folder; reading one runs no code from it.

The folder's index is unpickled with an allow-list, its tensors are read with `weights_only=True`.
"""

import contextlib
import logging
import pickle
import warnings
from collections.abc import Generator
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

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


def reason(error: BaseException) -> str:
    """The cause of one of the errors above in one line."""
    if isinstance(error, dcp.CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return (str(error).strip() or type(error).__name__).splitlines()[-1]
