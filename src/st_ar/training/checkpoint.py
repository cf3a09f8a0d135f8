"""Checkpoints: copied in memory, written in the background, whole or absent; and the weights that a run exports."""

import contextlib
import os
import shutil
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

from st_ar.config import RunConfig, TrainConfig
from st_ar.distributed import broadcast_from_rank0, get_rank, host_group
from st_ar.errors import UserError, cause
from st_ar.model.weights import EMA, LIVE, exported_step, save_weights
from st_ar.training.checkpoint_files import (
    READ_ERRORS,
    TENSORS,
    WRITE_ERRORS,
    Files,
    describe_files,
    list_checkpoints,
    newest_whole,
    read_record,
    read_tensors,
    write_manifest,
    write_tensors,
)
from st_ar.training.inputs import LOSS, Validation

OPTIONS = StateDictOptions(flatten_optimizer_state_dict=True)
SINGLE_USE = tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 13)
"""Whether a stager closes itself after its first copy, as before torch 2.13."""


@dataclass(frozen=True)
class State:
    """The state of a run, except the step."""

    modules: dict[str, nn.Module]
    """name -> module whose state to save."""
    student: nn.Module
    """The trained module."""
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer]
    """The student's optimizer, or several that share its parameters."""

    def tensors(self, optimizer_state: dict[str, Any] | None = None) -> dict[str, Tensor]:
        """Return the live tensors by name. The optimizer's are those of `optimizer_state`, which is read if None."""
        if optimizer_state is None:
            optimizer_state = get_optimizer_state_dict(self.student, self.optimizer, options=OPTIONS)
        tensors = {
            f"{name}.{key}": value
            for name, module in self.modules.items()
            for key, value in module.state_dict().items()
        }
        moments = {f"optimizer.{key}": value for key, value in optimizer_state.items() if isinstance(value, Tensor)}
        return tensors | moments

    def load(self, read: Callable[[dict[str, Tensor]], None]) -> None:
        """Let `read` fill the tensors in place, then load the optimizer's."""
        optimizer_state = get_optimizer_state_dict(self.student, self.optimizer, options=OPTIONS)
        read(self.tensors(optimizer_state))
        set_optimizer_state_dict(self.student, self.optimizer, optimizer_state, options=OPTIONS)


def gather_weights(tensors: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """Gather the sharded tensors of a state, without the optimizer's, on the CPU of the ranks that keep them.

    All ranks must call this function.
    """
    gathered: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor) and not name.startswith("optimizer."):
            full = tensor.full_tensor()  # one after another, to save GPU memory
            if keep:
                gathered[name] = full.to("cpu", copy=True)
    return gathered


Result = TypeVar("Result")


class Checkpoints:
    """The checkpoints of a run in a folder: the `keep` newest, those whose step is a multiple of `keep_every`, if not 0, and the
    one with the smallest recorded number called `keep_least`, if any.

    They are saved within `with checkpoints:`. Its end waits for the last write and raises its error. With a group, each of its
    ranks saves a part; otherwise only the calling rank saves.
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
        self._stager: DefaultStager | None = None
        self._writing: _Background | None = None

    def __enter__(self) -> "Checkpoints":
        # Set here and not in the writing thread: warning filters belong to the whole process.
        self._filters = warnings.catch_warnings()
        self._filters.__enter__()
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            if kind is None:
                self.wait()
            elif issubclass(kind, Exception) and self._writing is not None:
                self._writing.join()  # the block's error is raised, not the write's
        finally:
            self._filters.__exit__(None, None, None)

    def save(
        self,
        step: int,
        state: State,
        record: Mapping[str, Any] | None = None,
        then: Callable[[Mapping[str, Tensor]], None] | None = None,
    ) -> None:
        """Start to write the current state as step_N, a name that only a whole checkpoint has; its manifest includes `record`.

        Waits for the previous write and returns when the state is copied. The next `check`, `wait` or `save` raises an error of
        this write, such as a full disk, on all ranks. `then` is called in the background of rank 0 when the checkpoint is whole,
        with a copy of the modules' tensors in which sharded tensors are gathered.
        """
        self.wait()
        tensors = state.tensors()
        if self._stager is None or SINGLE_USE:  # kept, to reuse its host memory, which is pinned if there is a GPU
            self._stager = DefaultStager(StagingOptions(torch.cuda.is_available(), False, False, False))
        staged = self._stager.stage(tensors)
        assert isinstance(staged, dict)
        weights = staged | gather_weights(tensors, keep=self._rank == 0) if then else {}
        write = partial(self._write, step, staged, record or {}, partial(then, weights) if then else None)
        self._writing = _Background(write)

    def check(self) -> None:
        """Raise the error of a failed write, without waiting. Several ranks raise it together at the next save."""
        if self._group is None and self._writing is not None and not self._writing.is_alive():
            self.wait()

    def wait(self) -> None:
        """Wait until everything is written and raise the write's error, if any."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.join()  # a thread that still frees tensors when the interpreter ends would abort the process
            if writing.error is not None:
                raise writing.error

    def newest(self) -> int:
        """Return the step of the newest whole checkpoint, 0 without checkpoints (see `newest_whole`).

        Removes the leftovers of a killed run: incomplete checkpoints, and old ones that the newest replaces.
        """
        for leftover in self.folder.glob(".step_*.partial"):
            shutil.rmtree(leftover, ignore_errors=True)  # another rank may remove it at the same time
        step = newest_whole(self.folder)
        if step:
            with contextlib.suppress(OSError):  # the next save reports it
                self._remove_old()
        return step

    def restore(self, step: int, state: State) -> None:
        """Load the checkpoint of `step` into the state. Step 0 has none and changes nothing."""
        if not step:
            return
        path = self.path(step)
        try:
            state.load(partial(read_tensors, path / TENSORS))
        except READ_ERRORS as error:
            raise UserError(
                f"{path} is damaged or not of this run ({cause(error)}); remove it to resume from the one before"
            ) from error

    def _write(
        self, step: int, tensors: dict[str, Tensor], record: Mapping[str, Any], then: Callable[[], None] | None
    ) -> None:
        final = self.path(step)
        aside = final.with_name(f".{final.name}.partial")

        def write_part() -> Files:
            write_tensors(aside / TENSORS, tensors, self._group)
            return describe_files(aside, self._rank)

        def finish() -> None:
            files = {name: file for part in parts for name, file in part.items()}
            write_manifest(aside, files, {"step": step, **record})
            if final.exists():
                shutil.rmtree(final)
            os.replace(aside, final)

        try:
            self._together(partial(shutil.rmtree, aside, ignore_errors=True), rank0_only=True)
            parts = self._together(write_part)
            self._together(finish, rank0_only=True)
        except UserError as error:
            if self._rank == 0:
                shutil.rmtree(aside, ignore_errors=True)
            newest = list_checkpoints(self.folder)
            left = f"{newest[-1][1]} is intact" if newest else "there is no earlier one"
            raise UserError(
                f"cannot write the checkpoint of step {step} ({error}); {left}; free some space and continue with --resume"
            ) from error
        self._together(self._remove_old, rank0_only=True)
        if then is not None:
            self._together(then, rank0_only=True)

    def _together(self, action: Callable[[], Result], *, rank0_only: bool = False) -> list[Result]:
        """Run an action on each rank or only on rank 0, wait for all ranks, and return the results.

        Raises:
            UserError: on every rank, if a file cannot be written on one.
        """
        results: list[Any] = []
        try:
            if self._rank == 0 or not rank0_only:
                results = [action()]
        except UserError as error:
            results = [error]
        except WRITE_ERRORS as error:
            results = [UserError(cause(error))]
        if self._group is not None:
            gathered: list[list[Any]] = [[] for _ in range(dist.get_world_size(self._group))]
            dist.all_gather_object(gathered, results, self._group)
            results = [result for each in gathered for result in each]
        for result in results:
            if isinstance(result, UserError):
                raise result
        return results

    def _remove_old(self) -> None:
        checkpoints = list_checkpoints(self.folder)
        kept = {step for step, _ in checkpoints[-self.keep :]}
        if self.keep_every:
            kept |= {step for step, _ in checkpoints if step % self.keep_every == 0}
        if name := self.keep_least:
            records = [(step, read_record(path)) for step, path in checkpoints]
            kept.update(
                step for _, step in sorted((record[name], step) for step, record in records if name in record)[:1]
            )
        for step, path in checkpoints:
            if step not in kept:  # renamed first: if this process is killed, nothing that looks whole is left
                aside = path.with_name(f".{path.name}.partial")
                os.replace(path, aside)
                shutil.rmtree(aside)

    def path(self, step: int) -> Path:
        """Return the folder of a checkpoint."""
        return self.folder / f"step_{step:08d}"


class _Background(threading.Thread):
    """An action in a daemon thread, and its error, if any."""

    def __init__(self, action: Callable[[], None]) -> None:
        super().__init__(target=action, name="checkpoint", daemon=True)
        self.error: BaseException | None = None
        self._device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
        self.start()

    def run(self) -> None:
        try:
            if self._device is not None:
                torch.cuda.set_device(self._device)  # new threads start on the first GPU
            super().run()  # drops the action at its end, and with it the copy of the state
        except BaseException as error:
            self.error = error


class CheckpointExporter:
    """Saves and restores a run: its checkpoints and the weights that it exports. All ranks call its methods together.

    `about` has the entries of the exports' config.json besides the step and the model.
    """

    def __init__(
        self, out: Path, config: TrainConfig, state: State, validation: Validation, about: Mapping[str, Any]
    ) -> None:
        self.out, self.config, self.state, self.validation, self.about = out, config, state, validation, about
        self.checkpoints = Checkpoints(
            out / "checkpoints",
            keep=config.keep,
            keep_every=config.keep_every,
            keep_least=LOSS,
            group=host_group(config.rank_timeout),
        )

    def restore(self) -> int:
        """Load the newest whole checkpoint, and export it if a killed run has not; returns its step, 0 without checkpoints."""
        step = broadcast_from_rank0(self.checkpoints.newest)
        self.checkpoints.restore(step, self.state)
        record = read_record(self.checkpoints.path(step))
        measured = {LOSS: record[LOSS]} if step and LOSS in record else {}
        folders = self._folders(step, measured)
        missing = broadcast_from_rank0(lambda: [path for path in folders if exported_step(path) != step])
        if missing:
            tensors = self.state.tensors()
            weights = tensors | gather_weights(tensors, keep=get_rank() == 0)
            if get_rank() == 0:
                self._export(missing, step, measured, weights)
        return step

    def save(self, step: int, measured: Mapping[str, float]) -> None:
        """Start to write a checkpoint and its exports, with the validation loss if it was measured."""
        then = partial(self._export, self._folders(step, measured), step, measured)
        self.checkpoints.save(step, self.state, measured, then=then)

    def _folders(self, step: int, measured: Mapping[str, float]) -> list[Path]:
        best = [self.out / "best"] if step and self.validation.update_best(measured) else []
        return [*export_folders(self.out, "export", step, self.config), *best]

    def _export(
        self, folders: Sequence[Path], step: int, measured: Mapping[str, float], tensors: Mapping[str, Tensor]
    ) -> None:
        weights = {LIVE: under("student.model.", tensors), EMA: under("ema.", tensors)}
        for folder in folders:
            save_weights(folder, weights, self.config.model, {"step": step, **self.about, **measured})


def export_folders(out: Path, newest: str, step: int, config: RunConfig) -> list[Path]:
    """Return the folders for the weights of a checkpoint: the newest's, and with --keep-every one in kept/."""
    kept = config.keep_every and step % config.keep_every == 0
    return [out / newest, *([out / "kept" / f"step_{step:08d}"] if kept else [])] if step else []


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors whose names start with `prefix`, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def not_finite(terms: Mapping[str, Tensor]) -> str:
    """Name the losses and gradient norms that are not finite. The host waits for a GPU."""
    return ", ".join(f"{name} is {value.item()}" for name, value in terms.items() if not torch.isfinite(value))


def require_finite(
    terms: Mapping[str, Tensor], step: int, checkpoints: Checkpoints, *, skipping: int | None = None
) -> None:
    """Stop a run whose losses or gradient norms are not finite, before a broken state is saved.

    `skipping` is the number of such steps that the run may skip; None if it cannot skip any.
    """
    if wrong := not_finite(terms):
        checkpoints.wait()
        saved = list_checkpoints(checkpoints.folder)
        good = f"the last good checkpoint is {saved[-1][1]}" if saved else "there is no checkpoint yet"
        more = "" if skipping is None else f"; or continue with --resume and a larger --skip-nonfinite than {skipping}"
        begin = f" from it with --init {checkpoints.folder.parent} and another --out" if saved else ""
        raise UserError(
            f"the loss or its gradient is not finite at step {step} ({wrong}): {good}. "
            f"Start a new run{begin}, with a lower --optim.lr or --dtype float32{more}"
        )
