"""log.jsonl: one JSON object for each logged step, appended as the run goes."""

import json
from pathlib import Path
from typing import Any

from st_ar.errors import UserError, cause
from st_ar.files import parse_json, written_aside
from st_ar.settings import fits


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
            if not isinstance(entry, dict) or not fits(entry.get("step"), int):
                raise ValueError("no object with a step")
        except ValueError as error:
            if number == len(lines):
                break
            raise UserError(
                f"{path} is damaged: line {number} is no logged step ({cause(error)}); mend or remove that line"
            ) from error
        entries.append(entry)
    return entries


def rewind_log(path: Path, step: int) -> None:
    """Drop what was logged after `step`, from where a run goes on."""
    kept = [entry for entry in read_log(path) if entry["step"] <= step]
    with written_aside(path) as aside:
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
