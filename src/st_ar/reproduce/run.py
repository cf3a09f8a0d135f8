"""Giving a plan's commands one after the other; what is done stays done, and what was stopped goes on."""

import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from st_ar.errors import UserError
from st_ar.files import read_json, write_json
from st_ar.settings import fits


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A command and what it leaves."""

    name: str
    command: tuple[str, ...]
    """The verb and its options."""
    makes: Path
    """File or folder."""
    flops: float = 0.0
    """Of training, which takes the most of the time."""
    disk: float = 0.0
    """Bytes that are known beforehand."""


def run_stages(stages: Sequence[Stage], work: Path, call: Callable[[list[str]], None]) -> None:
    """Give each command that is not done yet.

    done/NAME.json in `work` holds a command once it was begun, and its seconds once it was done.

    Args:
        call: runs a command line, the verb first.

    Raises:
        UserError: what the commands raise; or something in `work` was made by another command.
    """
    for number, stage in enumerate(stages, start=1):
        mark = _mark(stage.makes, work)
        command = list(stage.command)
        begun = read_mark(mark) if mark.exists() else None
        if begun is not None and begun["command"] != command:
            raise UserError(
                f"{stage.makes} was made by another command, `st-ar {shlex.join(begun['command'])}`, not by "
                f"`st-ar {shlex.join(command)}`: choose another --out, or remove it and {mark}"
            )
        if begun is not None and begun.get("seconds") is not None:
            if not stage.makes.exists():
                raise UserError(
                    f"{stage.makes} is gone, but {mark} says that it was made: remove that to make it again"
                )
            continue
        print(f"\n[{number}/{len(stages)}] {stage.name}\nst-ar {shlex.join(command)}", flush=True)
        if begun is None and stage.makes.exists():
            raise UserError(f"{stage.makes} exists already and was not made here: choose another --out, or remove it")
        write_json(mark, {"command": command, "seconds": None})
        started = time.perf_counter()
        if not _is_whole(stage):
            call(_continued(stage))
        write_json(mark, {"command": command, "seconds": time.perf_counter() - started})


def read_mark(path: Path) -> dict[str, Any]:
    """The command and its seconds, None if it was stopped.

    Raises:
        UserError: no mark of `run_stages`.
    """
    mark = read_json(path, "a stage")
    seconds = mark.get("seconds")
    if not fits(mark.get("command"), list[str]) or not (seconds is None or fits(seconds, float)):
        raise UserError(
            f"{path} is damaged: it does not say what was done; remove it, and what it stands for, to do that again"
        )
    return mark


def _continued(stage: Stage) -> list[str]:
    """The command, with --resume where a run is to be continued; other verbs continue what they began, or leave nothing."""
    begun = _is_run(stage) and (stage.makes / "config.json").exists()
    return [*stage.command, *(["--resume"] if begun else [])]


def _is_whole(stage: Stage) -> bool:
    """Whether a command that was stopped had in fact done everything."""
    verb, path = stage.command[0], stage.makes
    last = {  # of what is not written at once
        "train-tokenizer": path / "tokenizer.json",
        "tokenize": path / "meta.json",
        "sample": path.with_suffix(".json"),
    }
    return not _is_run(stage) and last.get(verb, path).exists()


def _is_run(stage: Stage) -> bool:
    return stage.command[0] == "train" or (stage.command[0] == "train-tokenizer" and stage.command[1] != "kmeans")


def is_done(path: Path, work: Path) -> bool:
    """Whether a command has made this, from its beginning to its end."""
    mark = _mark(path, work)
    return mark.exists() and read_mark(mark).get("seconds") is not None


def _mark(path: Path, work: Path) -> Path:
    return work / "done" / f"{path.name}.json"
