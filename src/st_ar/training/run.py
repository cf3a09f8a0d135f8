"""A run's folder: its lock, record and log, and the scaffold that both trainers share."""

import contextlib
import fcntl
import json
import os
import re
import statistics
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, BinaryIO

import torch

from st_ar.config import RunConfig, TrainConfig
from st_ar.distributed import Ranks, broadcast_from_rank0, process_group
from st_ar.errors import Interrupted, UserError, cause, damaged
from st_ar.files import (
    is_forbidden,
    parse_json,
    read_json,
    require_absent,
    require_same,
    unwritable,
    write_json,
    write_json_lines,
)
from st_ar.hardware import describe, freed_memory_kept
from st_ar.settings import differences, from_dict, matches_type, to_dict
from st_ar.training.checkpoint_files import list_checkpoints
from st_ar.training.optim import learning_rate

FORMAT_VERSION = 1
MAY_CHANGE = (
    *("steps", "epochs", "log_every", "checkpoint_every", "keep", "keep_every", "device", "dtype", "compile"),
    "cuda_graph",
    "skip_nonfinite",
    *("parallel", "shard_size", "activation_checkpointing", "rank_timeout", "evaluate_every", "evaluate_images"),
    *("accumulate", "selfguided.until"),
)
"""Settings that a resumed run may change. A change that would have altered steps already taken is refused."""
LOCK = ".lock"
OUT_OF_MEMORY = re.compile(r"can't allocate memory|not enough memory|out of memory")


@contextlib.contextmanager
def training_session(config: RunConfig) -> Generator[tuple[Ranks, torch.device]]:
    """Join the ranks and choose the device. Running out of memory or losing a rank raises a UserError."""
    timeout = config.rank_timeout if isinstance(config, TrainConfig) else 1800
    with process_group(config.device, timeout) as (ranks, device):
        try:
            with freed_memory_kept():
                yield ranks, device
        except (MemoryError, RuntimeError) as error:
            message = str(error)
            if not (isinstance(error, MemoryError | torch.OutOfMemoryError) or OUT_OF_MEMORY.search(message)):
                raise
            size = re.search(r"ried to allocate ([\d.]+ \w+)", message) or re.search(r"allocate ([\d.]+ \w+)", message)
            more = f" ({size[1]} more were needed)" if size else ""
            raise UserError(f"out of memory{more}: {_remedy(config, ranks.world)}") from error


class Run(contextlib.ExitStack):
    """A run's folder during training: its record, lock and log. Rank 0 writes; every rank calls `open` and `start`.

    Its end releases the lock.
    """

    def __init__(self, out: Path, config: RunConfig, ranks: Ranks, *, preset: str, resume: bool) -> None:
        super().__init__()
        self.out, self.config, self.ranks, self.preset, self.resume = out, config, ranks, preset, resume
        self.writes = ranks.rank == 0
        self.record: dict[str, Any] = {}

    def open(
        self, describe_data: Callable[[], dict[str, Any]], dtype: torch.dtype, *, images: int, exported: int | None
    ) -> None:
        """Begin the run, or check that it can continue, and lock the folder. Errors of rank 0 are raised on every rank.

        `describe_data` verifies the training data and returns its description for config.json. `exported` is the step of the
        exported weights, None if there are none.
        """

        def begin() -> dict[str, Any]:
            record = {
                "format_version": FORMAT_VERSION,
                "preset": self.preset,
                "config": to_dict(self.config),
                **describe_data(),
                "dtype": str(dtype).removeprefix("torch."),
                "environment": describe() | {"ranks": self.ranks.world},
            }
            open_run(self.out, record, self.config, images, resume=self.resume, exported=exported)
            self.enter_context(lock_run(self.out))
            return record

        self.record = broadcast_from_rank0(begin)

    def start(self, step: int) -> int:
        """Write config.json and drop log entries after `step`; returns the number of skipped steps before it."""

        def rewind() -> int:
            write_json(self.out / "config.json", self.record)
            rewind_log(self.out / "log.jsonl", step)
            return sum("skipped" in entry for entry in read_log(self.out / "log.jsonl"))

        return broadcast_from_rank0(rewind)

    def log(self, entry: dict[str, Any]) -> None:
        """Append an entry to log.jsonl."""
        if self.writes:
            append_log(self.out / "log.jsonl", entry)

    def interrupted(self, step: int, total: int, signum: int) -> Interrupted:
        """Return the exception that ends a saved run after a signal."""
        return Interrupted(
            f"stopped at step {step} of {total}; the run is saved: the same command with --resume continues it", signum
        )


def open_run(
    out: Path, record: dict[str, Any], config: RunConfig, images: int, *, resume: bool, exported: int | None
) -> None:
    """Begin a run in `out`, or check that the run there can continue."""
    file = out / "config.json"
    checkpoints = list_checkpoints(out / "checkpoints")
    step = checkpoints[-1][0] if checkpoints else 0
    if not resume:
        if file.exists() and "config" in read_json(file, "a run"):
            state = f"with a checkpoint of step {step}" if checkpoints else "without a checkpoint yet"
            raise UserError(
                f"{out} holds a run already, {state}: give --resume to continue it, or choose another --out"
            )
        require_absent(out, "a run")
        write_json(file, record)
        return
    if not checkpoints and exported:
        raise UserError(
            f"{out} has weights of step {exported} but no checkpoint to resume from: put its checkpoints back, or choose another --out"
        )
    if not file.exists():
        raise UserError(f"{out} holds no run to resume: leave out --resume to begin one, or check --out")
    saved = read_json(file, "a run")
    if "config" not in saved:
        raise UserError(f"{out} holds no run to resume, its config.json is of something else: check --out")
    if saved.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{file} has format version {saved.get('format_version')}; this st-ar continues {FORMAT_VERSION}"
        )
    saved_config = from_dict(type(config), saved.get("config"), str(file))  # settings that it lacks get their defaults
    local = isinstance(config, TrainConfig) and config.selfguided.contrast and config.selfguided.negatives == "local"
    changed = {
        name: values
        for name, values in differences(to_dict(saved_config), record["config"]).items()
        if name not in MAY_CHANGE or (name == "accumulate" and local)
    }
    for part in ("tokens", "text", "validation", "init", "images"):
        old = saved.get(part)
        changed |= differences(old if isinstance(old, dict) else {}, record.get(part) or {}, f"{part}.")
    if saved.get("dtype") != record["dtype"]:
        changed["dtype"] = (saved.get("dtype"), record["dtype"])
    require_same(out, changed)
    _require_same_past(out, saved_config, config, images, step)


def lock_run(out: Path) -> BinaryIO:
    """Lock a run's folder until the returned file is closed. On file systems without locks nothing is locked."""
    try:
        file = open(out / LOCK, "ab")  # noqa: SIM115 -- the caller closes it
    except OSError as error:
        if not (out / LOCK).exists() or not os.access(out, os.W_OK | os.X_OK):
            raise unwritable(out / LOCK, error) from error
        raise UserError(f"{out / LOCK} cannot be opened ({error.strerror}): remove it") from error
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.close()
        raise UserError(f"another process is training in {out}: wait for its end, or stop it first") from None
    except OSError:
        pass
    return file


def _require_same_past(out: Path, saved: RunConfig, config: RunConfig, images: int, step: int) -> None:
    """Refuse a new length of the run or of self-guidance that would have changed any of the `step` steps taken."""
    before, now = saved.total_steps(images), config.total_steps(images)
    if now < step:
        raise UserError(
            f"{out} has done {step} steps already, more than the {now} asked for: raise --steps, or sample what is there"
        )
    changes = differences(to_dict(saved), to_dict(config))
    changed = {name: changes[name] for name in ("steps", "epochs", "selfguided.until") if name in changes}
    taken, reason = range(1, step + 1) if changed else (), ""
    if any(learning_rate(config.optim, s, before) != learning_rate(config.optim, s, now) for s in taken):
        rates = "would have had other learning rates"
        reason = f"with --optim.schedule {config.optim.schedule} the {step} steps already taken {rates}"
    elif isinstance(saved, TrainConfig) and isinstance(config, TrainConfig):
        old, new = saved.selfguided, config.selfguided
        if other := [s for s in taken if old.guides(s, before) != new.guides(s, now)]:
            guided = "with" if old.guides(other[0], before) else "without"
            reason = f"step {other[0]} is already taken, {guided} self-guidance"
    if reason:
        listed = "; ".join(f"{name} was {was}, now {is_now}" for name, (was, is_now) in changed.items())
        raise UserError(
            f"{out} was begun with other settings: {listed}, and {reason}. Give the old ones to resume it, or choose another --out"
        )


def trained_config(run: Path) -> TrainConfig:
    """Read a run's settings."""
    path = run / "config.json"
    return from_dict(TrainConfig, read_json(path, "a run").get("config"), str(path))


def seconds_per_step(run: Path) -> float:
    """Return a run's mean seconds per step, from the median speeds with self-guidance and after it ended."""
    config = trained_config(run)
    entries = read_log(run / "log.jsonl")
    speeds = {entry["step"]: entry["tokens_per_second"] for entry in entries if "tokens_per_second" in entry}
    if not speeds or not matches_type(list(speeds.values()), list[float]) or min(speeds.values()) <= 0:
        raise UserError(f"{run / 'log.jsonl'} does not say how fast every step was: train again, or copy it again")
    total, seconds = entries[-1]["step"], 0.0
    last_guided = int(config.selfguided.until * total)
    for start, end in ((0, last_guided), (last_guided, total)):
        measured = [speed for step, speed in speeds.items() if start < step <= end] or speeds.values()
        seconds += (end - start) / statistics.median(measured)
    return seconds * config.batch_size * config.views * config.model.sequence_length / total


def read_log(path: Path) -> list[dict[str, Any]]:
    """Read the log entries. A last line that a killed run left incomplete is skipped."""
    entries: list[dict[str, Any]] = []
    if not path.exists():
        return entries
    try:
        lines = path.read_bytes().decode(errors="replace").splitlines()
    except OSError as error:
        raise UserError(f"cannot read {path}: {cause(error)}; remove it to continue without the old log") from error
    for number, line in enumerate(lines, start=1):
        try:
            entry = parse_json(line)
            if not isinstance(entry, dict) or not matches_type(entry.get("step"), int):
                raise ValueError("it is not an object with a step")
        except ValueError as error:
            if number == len(lines):
                break
            raise damaged(path, f"line {number}: {cause(error)}", "fix or remove that line") from error
        entries.append(entry)
    return entries


def rewind_log(path: Path, step: int) -> None:
    """Drop the log entries after `step`."""
    kept = [entry for entry in read_log(path) if entry["step"] <= step]
    write_json_lines(path, kept)


def append_log(path: Path, entry: dict[str, Any]) -> None:
    """Append a log entry."""
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry, allow_nan=False) + "\n")
    except OSError as error:
        if is_forbidden(error):
            raise unwritable(path, error) from error
        raise UserError(f"cannot write {path}: {cause(error)}; free some space and continue with --resume") from error


def _remedy(config: RunConfig, world: int) -> str:
    smaller = f"give a smaller --batch-size than {config.batch_size} or a smaller --model"
    if not isinstance(config, TrainConfig):
        return smaller
    remedies: list[str] = []
    if config.activation_checkpointing != "full":
        remedies.append("give --activation-checkpointing full, also with --resume")
    share = config.batch_size // world
    more = next((n for n in range(config.accumulate + 1, share + 1) if share % n == 0), None)
    if more:
        remedies.append(f"give --accumulate {more}, for micro-batches of {share // more} x {config.views} sequences")
    if world > 1 and config.parallel != "fsdp":
        remedies.append("give --parallel fsdp, which splits the weights among the ranks")
    return "; or ".join([*remedies, smaller])
