"""Checkpoints: copied in memory, written in the background while training goes on, whole or absent, the newest few kept.

They hold tensors alone (weights, EMA, projector, optimizer); the step is in the folder's name, and every random draw is
a function of the step. What is on the disk: `tensor_files` and `manifest`.
"""

import contextlib
import os
import shutil
import threading
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from st_ar.errors import UserError
from st_ar.training.manifest import (
    TENSORS,
    Files,
    describe_files,
    list_checkpoints,
    newest_whole,
    read_record,
    write_manifest,
)
from st_ar.training.state import Copier, State, whole_weights
from st_ar.training.tensor_files import READ_ERRORS, WRITE_ERRORS, read_tensors, reason, write_tensors

Result = TypeVar("Result")


class Checkpoints:
    """The checkpoints of a run.

    They are saved within `with checkpoints:`, which ends with everything written; an error of the last write comes up
    there.

    Args:
        folder: RUN/checkpoints.
        keep: how many of the newest to keep.
        keep_every: also keep those whose step is a multiple of this; 0 for none.
        keep_least: also keep the one of which the least number is recorded under this name; empty for none.
        group: ranks that save together, each a part, by collectives of their own; by default the rank that calls, alone.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep: int,
        keep_every: int = 0,
        keep_least: str = "",
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self.folder, self.keep, self.keep_every, self.keep_least = folder, keep, keep_every, keep_least
        self._group = group
        self._rank = 0 if group is None else dist.get_rank(group)
        self._copier = Copier()
        self._writing: _Background | None = None

    def __enter__(self) -> "Checkpoints":
        # Here and not where it is given: filters are the process's, and the writing thread is not alone.
        self._filters = warnings.catch_warnings()
        self._filters.__enter__()
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            if kind is None:
                self.wait()
            elif issubclass(kind, Exception) and self._writing is not None:  # that error is told, not the write's
                self._writing.join()
        finally:
            self._filters.__exit__(None, None, None)

    def save(
        self,
        step: int,
        state: State,
        record: Mapping[str, Any] | None = None,
        then: Callable[[Mapping[str, Tensor]], None] | None = None,
    ) -> None:
        """Begin to write step_N as the state is now; it has its name only when it is whole.

        Returns when the state is copied, after the write before has ended. Errors of this one are raised by the next
        `check`, `wait` or `save`.

        Args:
            record: what else to write into the manifest.
            then: called in the background of the first rank, once the checkpoint is whole, with a copy of the modules'
                tensors; those that ranks share are put together.

        Raises:
            UserError: the write before failed, such as on a full disk; on all ranks if it did so on one.
        """
        self.wait()
        tensors = state.tensors()
        staged = self._copier.copy(tensors)
        weights = staged | whole_weights(tensors, keep=self._rank == 0) if then else {}
        self._writing = _Background(
            partial(self._write, step, staged, record or {}, partial(then, weights) if then else None)
        )

    def check(self) -> None:
        """Raise the error of a write that has failed; costs nothing. Several ranks find it together, when they next save."""
        if self._group is None and self._writing is not None and not self._writing.is_alive():
            self.wait()

    def wait(self) -> None:
        """Wait until everything is written; raises the error if that fails."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.finish()

    def newest(self) -> int:
        """The step of the newest whole checkpoint, 0 if there is none yet; see `newest_whole`.

        Removes what a killed run has left: halves, and those that the newest was to replace.
        """
        for partial_ in self.folder.glob(".step_*.partial"):
            shutil.rmtree(partial_, ignore_errors=True)  # another rank may be at it too
        step = newest_whole(self.folder)
        if step:
            with contextlib.suppress(OSError):  # the next save says so
                self._remove_old()
        return step

    def recorded(self, step: int, *names: str) -> dict[str, Any]:
        """What was recorded under these names, as far as it was, with the whole checkpoint of `step`; 0 has none."""
        record = read_record(self._path(step)) if step else {}
        return {name: record[name] for name in names if name in record}

    def restore(self, step: int, state: State) -> None:
        """Load the checkpoint of `step` into the state; step 0 leaves it as it is."""
        if not step:
            return
        path = self._path(step)
        try:
            state.load(partial(read_tensors, path / TENSORS))
        except READ_ERRORS as error:
            raise UserError(
                f"{path} is damaged or not of this run ({reason(error)}); remove it to resume from the one before"
            ) from error

    def _write(
        self, step: int, tensors: dict[str, Tensor], record: Mapping[str, Any], then: Callable[[], None] | None
    ) -> None:
        final = self._path(step)
        aside = final.with_name(f".{final.name}.partial")

        def write_part() -> Files:
            write_tensors(aside / TENSORS, tensors, self._group)
            return describe_files(aside, self._rank)

        def finish() -> None:
            write_manifest(
                aside, {name: file for part in parts for name, file in part.items()}, {"step": step, **record}
            )
            if final.exists():
                shutil.rmtree(final)
            os.replace(aside, final)

        try:
            self._together(partial(shutil.rmtree, aside, ignore_errors=True), first_alone=True)
            parts = self._together(write_part)
            self._together(finish, first_alone=True)
        except UserError as error:
            if self._rank == 0:
                shutil.rmtree(aside, ignore_errors=True)
            newest = list_checkpoints(self.folder)
            left = f"{newest[-1][1]} is intact" if newest else "there is no earlier one"
            raise UserError(
                f"cannot write the checkpoint of step {step} ({error}); {left}; free some space and continue with --resume"
            ) from error
        self._together(self._remove_old, first_alone=True)
        if then is not None:
            self._together(then, first_alone=True)

    def _together(self, action: Callable[[], Result], *, first_alone: bool = False) -> list[Result]:
        """What an action makes on each rank, or on the first alone, when all have done it.

        Raises:
            UserError: on every rank, if a file cannot be written on one.
        """
        made: list[Any] = []
        try:
            if self._rank == 0 or not first_alone:
                made = [action()]
        except UserError as error:
            made = [error]
        except WRITE_ERRORS as error:
            made = [UserError(reason(error))]
        if self._group is not None:
            everyones: list[list[Any]] = [[] for _ in range(dist.get_world_size(self._group))]
            dist.all_gather_object(everyones, made, self._group)
            made = [one for each in everyones for one in each]
        for one in made:
            if isinstance(one, UserError):
                raise one
        return made

    def _remove_old(self) -> None:
        found = list_checkpoints(self.folder)
        kept = {step for step, _ in found[-self.keep :]}
        if self.keep_every:
            kept |= {step for step, _ in found if step % self.keep_every == 0}
        records = {step: self.recorded(step, self.keep_least) for step, _ in found} if self.keep_least else {}
        numbers = {step: record[self.keep_least] for step, record in records.items() if record}
        if numbers:
            kept.add(min(numbers, key=numbers.__getitem__))
        for step, path in found:
            if step not in kept:
                _remove(path)

    def _path(self, step: int) -> Path:
        return self.folder / f"step_{step:08d}"


def _remove(path: Path) -> None:
    """Remove a checkpoint; killed half-way, it leaves none that looks whole."""
    aside = path.with_name(f".{path.name}.partial")
    os.replace(path, aside)
    shutil.rmtree(aside)


class _Background(threading.Thread):
    """An action in a thread that does not outlive the process."""

    def __init__(self, action: Callable[[], None]) -> None:
        super().__init__(name="checkpoint", daemon=True)
        self._action: Callable[[], None] | None = action
        self._error: BaseException | None = None
        self._device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
        self.start()

    def run(self) -> None:
        try:
            assert self._action is not None
            if self._device is not None:
                torch.cuda.set_device(self._device)  # a new thread's is the first
            self._action()
        except BaseException as error:
            self._error = error
        finally:
            self._action = None  # and the copy of the state with it

    def finish(self) -> None:
        """Wait for the end; raises the action's error.

        Of the thread itself: one that still frees tensors while the interpreter ends would abort the process.
        """
        self.join()
        if self._error is not None:
            raise self._error
