"""Checkpoints: torch.distributed.checkpoint folders, written aside and renamed, the newest few kept.

They hold tensors alone (weights, EMA, projector, optimizer); the step is in the folder's name, and every random draw is
a function of the step. Reading one runs no code from it: its index is unpickled with an allow-list.
"""

import contextlib
import logging
import os
import pickle
import re
import shutil
import warnings
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from st_ar.errors import UserError
from st_ar.training.group import from_first

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
}
"""All that the index of a checkpoint may name."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> Any:
        if (module_name, global_name) in ALLOWED:
            return super().find_class(module_name, global_name)
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


OPTIONS = StateDictOptions(flatten_optimizer_state_dict=True)


class Checkpoints:
    """The checkpoints of a run.

    Args:
        folder: RUN/checkpoints.
        modules: name -> module whose state belongs to the run.
        student: the trained module.
        optimizer: the student's, or several that share its parameters.
        keep: how many to keep.
        together: whether all ranks save, each a part, and restore; otherwise the one that calls is on its own.
    """

    def __init__(
        self,
        folder: Path,
        modules: dict[str, nn.Module],
        student: nn.Module,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        keep: int,
        *,
        together: bool = False,
    ) -> None:
        self.folder, self.modules, self.student, self.optimizer, self.keep = folder, modules, student, optimizer, keep
        self.together = together and dist.is_initialized()
        self.first = not self.together or dist.get_rank() == 0

    def save(self, step: int) -> Path:
        """Write step_N; it has its name only when it is whole."""
        final = self.folder / f"step_{step:08d}"
        aside = self.folder / f".{final.name}.partial"
        try:
            if self.first:
                shutil.rmtree(aside, ignore_errors=True)
            self._meet()
            with _quietly():
                tensors = self._tensors(self._optimizer_state())
                dcp.save(tensors, storage_writer=FileSystemWriter(aside), no_dist=not self.together)
            if not self.first:
                return final
            if final.exists():
                shutil.rmtree(final)
            os.replace(aside, final)
        except (OSError, dcp.CheckpointException) as error:
            shutil.rmtree(aside, ignore_errors=True)
            newest = list_checkpoints(self.folder)
            left = f"{newest[-1][1]} is intact" if newest else "there is no earlier one"
            raise UserError(
                f"cannot write the checkpoint of step {step} ({_reason(error)}); {left}; free some space and continue with --resume"
            ) from error
        for _, old in list_checkpoints(self.folder)[: -self.keep]:
            shutil.rmtree(old)
        return final

    def restore(self) -> int:
        """Load the newest checkpoint into modules and optimizer; returns its step, 0 if there is none yet."""
        for partial in self.folder.glob(".step_*.partial"):
            shutil.rmtree(partial, ignore_errors=True)  # another rank may be at it too
        found = from_first(lambda: list_checkpoints(self.folder))
        if not found:
            return 0
        step, path = found[-1]
        optimizer_state = self._optimizer_state()
        try:
            with _quietly():
                dcp.load(
                    self._tensors(optimizer_state), storage_reader=_Reader(path), planner=_TensorsOnly(), no_dist=True
                )
        except (OSError, EOFError, RuntimeError, pickle.UnpicklingError, dcp.CheckpointException) as error:
            raise UserError(
                f"{path} is damaged or not of this run ({_reason(error)}); remove it to resume from the one before"
            ) from error
        set_optimizer_state_dict(self.student, self.optimizer, optimizer_state, options=OPTIONS)
        return step

    def _meet(self) -> None:
        """Wait for the other ranks' hosts, not for GPUs."""
        if self.together:
            dist.all_reduce(torch.zeros(1))

    def _optimizer_state(self) -> dict[str, Any]:
        return get_optimizer_state_dict(self.student, self.optimizer, options=OPTIONS)

    def _tensors(self, optimizer_state: dict[str, Any]) -> dict[str, Tensor]:
        """The live tensors, by name: saved from and loaded into."""
        tensors = {
            f"{name}.{key}": value
            for name, module in self.modules.items()
            for key, value in module.state_dict().items()
        }
        moments = {f"optimizer.{key}": value for key, value in optimizer_state.items() if isinstance(value, Tensor)}
        return tensors | moments


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


def _reason(error: BaseException) -> str:
    """The cause in one line."""
    if isinstance(error, dcp.CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return (str(error).strip() or type(error).__name__).splitlines()[-1]


def list_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Complete checkpoints, oldest first, with their steps."""
    if not folder.is_dir():
        return []
    found = [(re.fullmatch(r"step_(\d+)", path.name), path) for path in folder.iterdir()]
    return sorted((int(match[1]), path) for match, path in found if match)
