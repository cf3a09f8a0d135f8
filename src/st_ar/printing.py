"""What verbs print: tables on a terminal, and the same numbers as JSON."""

import contextlib
import json
import sys
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns in line: the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    for row in (header, *rows):
        first, *rest = (
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        print("  ".join([first, *rest]).rstrip())


def check_json(where: str | None) -> None:
    """Refuse a --json that could not be written at the end.

    Raises:
        UserError: its folder is none, or may not be written to.
    """
    from st_ar.files import require_place

    if where not in (None, "-"):
        require_place(Path(where))


def keep_json(where: str | None, result: Mapping[str, Any]) -> None:
    """Write a result as JSON to a file, or (-) to standard output; None does nothing."""
    from st_ar.files import write_json

    if where == "-":
        print(json.dumps(result, indent=2))
    elif where is not None:
        write_json(Path(where), dict(result))


@contextlib.contextmanager
def json_alone(where: str | None) -> Generator[None]:
    """While this lasts, what is printed goes to standard error if JSON is to have standard output (-) to itself."""
    with contextlib.redirect_stdout(sys.stderr) if where == "-" else contextlib.nullcontext():
        yield
