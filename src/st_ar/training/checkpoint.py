"""Checkpoints: copied in memory, written in the background, whole or absent; and what a run keeps."""

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


@dataclass(frozen=True)
class State:
    """All that the rest of a run depends on, but for the step."""

    modules: dict[str, nn.Module]
    """name -> module whose state belongs to the run."""
    student: nn.Module
    """The trained module."""
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer]
    """The student's, or several that share its parameters."""

    def tensors(self) -> dict[str, Tensor]:
        """The live tensors, by name: saved from and loaded into."""
        return self._tensors(self._optimizer_state())

    def load(self, read: Callable[[dict[str, Tensor]], None]) -> None:
        """Let `read` fill the tensors, and take them over."""
        optimizer_state = self._optimizer_state()
        read(self._tensors(optimizer_state))
        set_optimizer_state_dict(self.student, self.optimizer, optimizer_state, options=OPTIONS)

    def _optimizer_state(self) -> dict[str, Any]:
        return get_optimizer_state_dict(self.student, self.optimizer, options=OPTIONS)

    def _tensors(self, optimizer_state: dict[str, Any]) -> dict[str, Tensor]:
        tensors = {
            f"{name}.{key}": value
            for name, module in self.modules.items()
            for key, value in module.state_dict().items()
        }
        moments = {f"optimizer.{key}": value for key, value in optimizer_state.items() if isinstance(value, Tensor)}
        return tensors | moments


class Copier:
    """Copies tensors into the host's memory, which it takes again for the next copy; pinned, if there is a GPU.

    Before torch 2.13 a stager closes itself after its first copy: there each copy has one of its own, and new memory.
    """

    _SERVES_ONCE = tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 13)

    def __init__(self) -> None:
        self._stager: DefaultStager | None = None

    def copy(self, tensors: dict[str, Tensor]) -> dict[str, Any]:
        """The tensors as they are now, by the same names."""
        if self._stager is None or self._SERVES_ONCE:
            self._stager = DefaultStager(StagingOptions(torch.cuda.is_available(), False, False, False))
        copied = self._stager.stage(tensors)
        assert isinstance(copied, dict)
        return copied


def whole_weights(tensors: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """Of a state's tensors the modules' that are split among ranks, put together, on the CPU of the rank that is to keep them.

    All ranks must call this.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor) and not name.startswith("optimizer."):
            whole = tensor.full_tensor()  # one after another, to save a GPU's memory
            if keep:
                found[name] = whole.to("cpu", copy=True)
    return found


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
                f"{path} is damaged or not of this run ({cause(error)}); remove it to resume from the one before"
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
            made = [UserError(cause(error))]
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


class CheckpointExporter:
    """Saves and restores a run: checkpoints, and the weights that it exports. All ranks call its methods together.

    Args:
        out: the run's folder.
        config: the run's settings.
        state: what checkpoints hold.
        validation: the validation loss, by which the best weights are kept.
        about: what exports say besides the step and the model.
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
        """Load the newest whole checkpoint and export it if that is missing; returns its step, 0 if there is none."""
        step = broadcast_from_rank0(self.checkpoints.newest)
        self.checkpoints.restore(step, self.state)
        measured = self.checkpoints.recorded(step, LOSS)
        folders = self._folders(step, measured)
        late = broadcast_from_rank0(lambda: [path for path in folders if exported_step(path) != step])
        if late:
            tensors = self.state.tensors()
            weights = tensors | whole_weights(tensors, keep=get_rank() == 0)
            if get_rank() == 0:
                self._export(late, step, measured, weights)
        return step

    def save(self, step: int, measured: Mapping[str, float]) -> None:
        """Begin to write everything as it is now, with the validation loss if it was measured."""
        then = partial(self._export, self._folders(step, measured), step, measured)
        self.checkpoints.save(step, self.state, measured, then=then)

    def _folders(self, step: int, measured: Mapping[str, float]) -> list[Path]:
        best = [self.out / "best"] if step and self.validation.improves(measured) else []
        return [*export_folders(self.out, "export", step, self.config), *best]

    def _export(
        self, folders: Sequence[Path], step: int, measured: Mapping[str, float], tensors: Mapping[str, Tensor]
    ) -> None:
        weights = {LIVE: under("student.model.", tensors), EMA: under("ema.", tensors)}
        for folder in folders:
            save_weights(folder, weights, self.config.model, {"step": step, **self.about, **measured})


def export_folders(out: Path, newest: str, step: int, config: RunConfig) -> list[Path]:
    """Folders that the weights of a checkpoint belong in: the newest's, and with --keep-every its own."""
    kept = config.keep_every and step % config.keep_every == 0
    return [out / newest, *([out / "kept" / f"step_{step:08d}"] if kept else [])] if step else []


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def not_finite(terms: Mapping[str, Tensor]) -> str:
    """Which of the losses and gradient norms are not finite; empty if all are. The host waits for a GPU."""
    return ", ".join(f"{name} is {value.item()}" for name, value in terms.items() if not torch.isfinite(value))


def require_finite(
    terms: Mapping[str, Tensor], step: int, checkpoints: Checkpoints, *, skipping: int | None = None
) -> None:
    """Stop a run before a broken state is saved. A checkpoint that is being written is finished first.

    Args:
        terms: losses and gradient norms by name.
        step: the step that they are of.
        checkpoints: the run's checkpoints.
        skipping: how many such steps the run may skip; None if it cannot skip any.

    Raises:
        UserError: one of the terms is not finite.
    """
    if wrong := not_finite(terms):
        checkpoints.wait()
        done = list_checkpoints(checkpoints.folder)
        good = f"the last good checkpoint is {done[-1][1]}" if done else "there is no checkpoint yet"
        more = "" if skipping is None else f"; or continue with --resume and a larger --skip-nonfinite than {skipping}"
        begin = f" from it with --init {checkpoints.folder.parent} and another --out" if done else ""
        raise UserError(
            f"the loss or its gradient is not finite at step {step} ({wrong}): {good}. "
            f"Start a new run{begin}, with a lower --optim.lr or --dtype float32{more}"
        )
