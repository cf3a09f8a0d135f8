"""A run's folder: who may train in it, what it records, and what both trainers do around their steps."""

import contextlib
import fcntl
import json
import re
import statistics
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, BinaryIO

import torch

from st_ar.config import RunConfig, TrainConfig
from st_ar.distributed import Ranks, broadcast_from_rank0, process_group
from st_ar.errors import Interrupted, UserError, cause, damaged
from st_ar.files import atomic_write, parse_json, read_json, require_absent, require_same, write_json
from st_ar.hardware import describe, freed_memory_kept
from st_ar.settings import differences, from_dict, matches_type, to_dict
from st_ar.training.checkpoint_files import list_checkpoints
from st_ar.training.optim import learning_rate

FORMAT_VERSION = 1
MAY_CHANGE = (
    *("steps", "epochs", "log_every", "checkpoint_every", "keep", "keep_every", "device", "dtype", "compile"),
    "skip_nonfinite",
    *("parallel", "shard_size", "activation_checkpointing", "rank_timeout", "evaluate_every", "evaluate_images"),
    *("accumulate", "selfguided.until"),
)
"""Settings that a resumed run may change. None of them alters a step already taken: `open_run` checks the lengths, the type of the
products, and the negatives."""
LOCK = ".lock"


@contextlib.contextmanager
def training_session(config: RunConfig) -> Generator[tuple[Ranks, torch.device]]:
    """Join the ranks and choose the device. Running out of memory and losing a rank become clear errors."""
    timeout = config.rank_timeout if isinstance(config, TrainConfig) else 1800
    with (
        process_group(config.device, timeout) as (ranks, device),
        explain_out_of_memory(config, ranks.world),
        freed_memory_kept(),
    ):
        yield ranks, device


class Run:
    """A run's folder while it trains: its record, lock and log. Rank 0 writes; every rank calls `open` and `start`.

    Use it as a context, which ends with the lock released.

    Args:
        out: the folder.
        config: the run's settings.
        ranks: the ranks that train together.
        preset: the preset's name, for the record.
        resume: continue the run in the folder.
    """

    def __init__(self, out: Path, config: RunConfig, ranks: Ranks, *, preset: str, resume: bool) -> None:
        self.out, self.config, self.ranks, self.preset, self.resume = out, config, ranks, preset, resume
        self.writes = ranks.rank == 0
        self.record: dict[str, Any] = {}
        self._lock: BinaryIO | None = None

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            self._lock.close()

    def open(
        self, describe_data: Callable[[], dict[str, Any]], dtype: torch.dtype, *, images: int, exported: int | None
    ) -> None:
        """Begin the run, or check that it may be continued, and lock the folder.

        Args:
            describe_data: verifies the training data and says what config.json keeps of it.
            dtype: type of the matrix products.
            images: number of training images.
            exported: step of the weights beside the checkpoints; None if there are none.

        Raises:
            UserError: on every rank, if rank 0 cannot begin or continue the run.
        """

        def begin() -> dict[str, Any]:
            record = describe_run(self.config, describe_data(), dtype, self.preset)
            open_run(self.out, record, self.config, images, resume=self.resume, exported=exported)
            self._lock = lock_run(self.out)
            return record

        self.record = broadcast_from_rank0(begin)

    def start(self, step: int) -> int:
        """Write config.json and drop what was logged after `step`; returns how many steps before it were skipped."""

        def rewind() -> int:
            write_json(self.out / "config.json", self.record)
            rewind_log(self.out / "log.jsonl", step)
            return skipped_steps(self.out / "log.jsonl")

        return broadcast_from_rank0(rewind)

    def log(self, entry: dict[str, Any]) -> None:
        """Append an entry to log.jsonl."""
        if self.writes:
            append_log(self.out / "log.jsonl", entry)

    def interrupted(self, step: int, total: int, signum: int) -> Interrupted:
        """The exception that ends a run after a signal, once it is saved."""
        return Interrupted(
            f"stopped at step {step} of {total}; the run is saved: the same command with --resume continues it", signum
        )


def describe_run(config: RunConfig, data: dict[str, Any], dtype: torch.dtype, preset: str) -> dict[str, Any]:
    """What config.json says: everything that the run depends on, and where it runs."""
    return {
        "format_version": FORMAT_VERSION,
        "preset": preset,
        "config": to_dict(config),
        **data,
        "dtype": str(dtype).removeprefix("torch."),
        "environment": describe() | {"ranks": Ranks.from_environment().world},
    }


def open_run(
    out: Path, record: dict[str, Any], config: RunConfig, images: int, *, resume: bool, exported: int | None
) -> None:
    """Begin a run in `out`, or check that it is the run to continue.

    Args:
        exported: step of the weights beside the checkpoints; None if there are none.

    Raises:
        UserError: the folder holds a run or something else, holds nothing to resume, or the run has other settings.
    """
    file = out / "config.json"
    done = list_checkpoints(out / "checkpoints")
    step = done[-1][0] if done else 0
    if not resume:
        if file.exists() and "config" in read_json(file, "a run"):
            state = f"with a checkpoint of step {step}" if done else "without a checkpoint yet"
            raise UserError(
                f"{out} holds a run already, {state}: give --resume to continue it, or choose another --out"
            )
        require_absent(out, "a run")
        write_json(file, record)
        return
    if not done and exported:
        raise UserError(
            f"{out} has weights of step {exported} and no checkpoint to go on from: put its checkpoints back, or choose another --out"
        )
    if not file.exists():
        raise UserError(f"{out} holds no run to resume: leave out --resume to begin one, or check --out")
    begun = read_json(file, "a run")
    if "config" not in begun:
        raise UserError(f"{out} holds no run to resume, its config.json is of something else: check --out")
    if begun.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{file} has format version {begun.get('format_version')}; this st-ar continues {FORMAT_VERSION}"
        )
    begun_config = from_dict(type(config), begun.get("config"), str(file))  # an older one's missing settings: defaults
    changed = {
        name: values
        for name, values in differences(to_dict(begun_config), record["config"]).items()
        if name not in MAY_CHANGE or (name == "accumulate" and _few_negatives(config))
    }
    for part in ("tokens", "text", "validation", "init", "images"):
        there = begun.get(part) if isinstance(begun.get(part), dict) else {}
        changed |= differences(there or {}, record.get(part) or {}, f"{part}.")
    if begun.get("dtype") != record["dtype"]:
        changed["dtype"] = (begun.get("dtype"), record["dtype"])
    require_same(out, changed)
    _check_past(out, begun_config, config, images, step)


def _few_negatives(config: RunConfig) -> bool:
    """Whether the negatives come from the micro-batch alone."""
    return isinstance(config, TrainConfig) and config.selfguided.contrast and config.selfguided.negatives == "local"


def lock_run(out: Path) -> BinaryIO:
    """Lock a run's folder until the file returned is closed. Where the file system has no locks, nothing is locked.

    Raises:
        UserError: another process holds the lock, or the lock's file cannot be opened.
    """
    try:
        file = open(out / LOCK, "ab")  # noqa: SIM115 -- the caller closes it
    except OSError as error:
        raise UserError(f"{out / LOCK} cannot be opened ({error.strerror}): remove it") from error
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.close()
        raise UserError(f"another process is training in {out}: wait for its end, or stop it first") from None
    except OSError:
        pass
    return file


def _check_past(out: Path, begun: RunConfig, config: RunConfig, images: int, step: int) -> None:
    """The length, and that of self-guidance, may change as long as all of the `step` steps taken would have been the same."""
    before, now = begun.total_steps(images), config.total_steps(images)
    if now < step:
        raise UserError(
            f"{out} has done {step} steps already, more than the {now} asked for: raise --steps, or sample what is there"
        )
    changes = differences(to_dict(begun), to_dict(config))
    changed = {name: changes[name] for name in ("steps", "epochs", "selfguided.until") if name in changes}
    taken, trouble = range(1, step + 1) if changed else (), ""
    if any(learning_rate(config.optim, s, before) != learning_rate(config.optim, s, now) for s in taken):
        rates = "would have had other learning rates"
        trouble = f"with --optim.schedule {config.optim.schedule} the {step} steps already taken {rates}"
    elif isinstance(begun, TrainConfig) and isinstance(config, TrainConfig):
        old, new = begun.selfguided, config.selfguided
        if other := [s for s in taken if old.guides(s, before) != new.guides(s, now)]:
            guided = "with" if old.guides(other[0], before) else "without"
            trouble = f"step {other[0]} is already taken, {guided} self-guidance"
    if trouble:
        listed = "; ".join(f"{name} was {was}, now {is_now}" for name, (was, is_now) in changed.items())
        raise UserError(
            f"{out} was begun with other settings: {listed}, and {trouble}. Give the old ones to resume it, or choose another --out"
        )


def trained_config(run: Path) -> TrainConfig:
    """A run's settings.

    Raises:
        UserError: no run.
    """
    path = run / "config.json"
    return from_dict(TrainConfig, read_json(path, "a run").get("config"), str(path))


def seconds_per_step(run: Path) -> float:
    """The median over a run's log, of the steps while self-guidance lasts and of those after it apart, weighed by their numbers.

    Raises:
        UserError: no run, or one that logged no speed.
    """
    trained = trained_config(run)
    lines = read_log(run / "log.jsonl")  # some are of skipped steps or of validation alone
    speeds: list[Any] = [entry["tokens_per_second"] for entry in lines if "tokens_per_second" in entry]
    if not speeds or not matches_type(speeds, list[float]) or min(speeds) <= 0:
        raise UserError(f"{run / 'log.jsonl'} does not say how fast every step was: train again, or copy it again")
    tokens = trained.batch_size * trained.views * trained.model.sequence_length
    whole, seconds = lines[-1]["step"], 0.0
    last = int(trained.selfguided.until * whole)
    for first, end in ((0, last), (last, whole)):
        pace = [
            entry["tokens_per_second"]
            for entry in lines
            if "tokens_per_second" in entry and first < entry["step"] <= end
        ]
        seconds += (end - first) * tokens / statistics.median(pace or speeds)
    return seconds / whole


def read_log(path: Path) -> list[dict[str, Any]]:
    """The logged steps; a last line cut short by a killed run is left out.

    Raises:
        UserError: another line is damaged, or the file cannot be read.
    """
    entries: list[dict[str, Any]] = []
    if not path.exists():
        return entries
    try:
        lines = path.read_bytes().decode(errors="replace").splitlines()
    except OSError as error:
        raise UserError(f"cannot read {path}: {cause(error)}; remove it to go on without what was logged") from error
    for number, line in enumerate(lines, start=1):
        try:
            entry = parse_json(line)
            if not isinstance(entry, dict) or not matches_type(entry.get("step"), int):
                raise ValueError("no object with a step")
        except ValueError as error:
            if number == len(lines):
                break
            raise damaged(
                path, f"line {number} is no logged step ({cause(error)}", "mend or remove that line"
            ) from error
        entries.append(entry)
    return entries


def rewind_log(path: Path, step: int) -> None:
    """Drop what was logged after `step`, from where a run goes on."""
    kept = [entry for entry in read_log(path) if entry["step"] <= step]
    with atomic_write(path) as aside:
        aside.write_text("".join(json.dumps(entry) + "\n" for entry in kept))


def skipped_steps(path: Path) -> int:
    """How many steps were skipped because something was not finite."""
    return sum("skipped" in entry for entry in read_log(path))


def append_log(path: Path, entry: dict[str, Any]) -> None:
    """Add a logged step."""
    try:
        with open(path, "a") as file:
            file.write(json.dumps(entry, allow_nan=False) + "\n")
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; free some space and continue with --resume"
        ) from error


@contextlib.contextmanager
def explain_out_of_memory(config: RunConfig, world: int) -> Generator[None]:
    """Name the settings that take memory, on `world` ranks, if it runs out within.

    Raises:
        UserError: memory of the host or of a GPU that cannot be had.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        said = str(error)
        known = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not known and not re.search(r"can't allocate memory|not enough memory|out of memory", said):
            raise
        asked = re.search(r"ried to allocate ([\d.]+ \w+)", said) or re.search(r"allocate ([\d.]+ \w+)", said)
        size = f" ({asked[1]} more could not be had)" if asked else ""
        raise UserError(f"out of memory{size}: {_remedy(config, world)}") from error


def _remedy(config: RunConfig, world: int) -> str:
    smaller = f"give a smaller --batch-size than {config.batch_size} or a smaller --model"
    if not isinstance(config, TrainConfig):
        return smaller
    ways: list[str] = []
    if config.activation_checkpointing != "full":
        ways.append("--activation-checkpointing full, which may also be given with --resume")
    here = config.batch_size // world
    more = next((n for n in range(config.accumulate + 1, here + 1) if here % n == 0), None)
    if more:
        ways.append(f"--accumulate {more}, for micro-batches of {here // more} x {config.views} sequences")
    if world > 1 and config.parallel != "fsdp":
        ways.append("--parallel fsdp, which splits the weights among the ranks")
    return "; or ".join([*(f"give {way}" for way in ways), smaller])
