"""log.jsonl: one JSON object for each logged step, appended as the run goes."""

import json
from pathlib import Path
from typing import Any

from st_ar.errors import UserError
from st_ar.files import written_aside


def read_log(path: Path) -> list[dict[str, Any]]:
    """The logged steps; a last line cut short by a killed run is left out."""
    entries: list[dict[str, Any]] = []
    if not path.exists():
        return entries
    for line in path.read_text().splitlines():
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError:
            break
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
