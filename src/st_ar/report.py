"""HTML reports: one self-contained page, everything inline, readable on a phone, light and dark, whole when it is printed.

Tables sort by a click on a column's head, figures and pictures open large. The page's policy lets nothing but that script run, and
nothing be fetched.
"""

import base64
import contextlib
import hashlib
import io
import json
import math
import statistics
import sys
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from st_ar.errors import UserError, require
from st_ar.files import atomic_write, require_place


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table; the first column names the row."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A figure as SVG text from st_ar.figures."""

    svg: str
    caption: str = ""


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """Rows of pictures under column headings: for each row its name and a picture (a PNG data URI) a column."""

    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[str]]]
    caption: str = ""


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading, paragraphs, commands to copy, and what is shown."""

    title: str
    paragraphs: Sequence[str] = ()
    commands: Sequence[str] = ()
    parts: Sequence[Table | Chart | Gallery] = field(default_factory=tuple)


def png_uri(picture: np.ndarray) -> str:
    """A picture uint8 [H, W, 3] as a data URI."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _kind(part: Table | Chart | Gallery) -> str:
    return type(part).__name__.lower()


def require_page(path: Path) -> None:
    """Refuse, before the work that it is to show, a page that could not be written.

    Raises:
        UserError: jinja2 is not installed, another kind of file, or its folder may not be written to.
    """
    if path.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--page {path}: the page is HTML; give a name that ends in .html")
    require("jinja2")
    require_place(path)


def write_report(path: Path, *, title: str, lead: str, sections: Sequence[Section]) -> None:
    """Write the page, whole or not at all.

    Raises:
        UserError: jinja2 is not installed, or the page cannot be written.
    """
    environment = require("jinja2").Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    templates = files("st_ar").joinpath("templates")
    template = environment.from_string(templates.joinpath("report.html").read_text())
    script = templates.joinpath("report.js").read_text()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    with atomic_write(path) as aside:
        aside.write_text(
            template.render(
                title=title, lead=lead, sections=sections, kind=_kind, script=script, script_hash=f"sha256-{digest}"
            )
        )


@dataclass(frozen=True)
class Spread:
    """A measurement repeated with several seeds."""

    values: tuple[float, ...]
    """One for each seed."""

    @property
    def mean(self) -> float:
        """Of the seeds."""
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> float | None:
        """Standard deviation over the seeds (n - 1 in the denominator); None for a single one, which says nothing about spread."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    def text(self, digits: int) -> str:
        """84.8 ± 0.7, or 84.8 alone for one seed."""
        spread = "" if self.deviation is None else f" ± {self.deviation:.{digits}f}"
        return f"{self.mean:.{digits}f}{spread}"

    def describe(self) -> dict[str, object]:
        """As plain JSON values."""
        return {"mean": self.mean, "deviation": self.deviation, "values": list(self.values)}


def difference(of: Spread, over: Spread) -> Spread:
    """Seed by seed, since both methods saw the same data in the same order."""
    return Spread(tuple(a - b for a, b in zip(of.values, over.values, strict=True)))


def is_noise(paired: Spread) -> bool | None:
    """Whether a paired difference is less than two standard errors from zero; None where one seed cannot say."""
    if paired.deviation is None:
        return None
    return abs(paired.mean) <= 2 * paired.deviation / math.sqrt(len(paired.values))


@dataclass(frozen=True, kw_only=True)
class Column:
    """How a measurement is shown."""

    key: str
    label: str
    digits: int
    factor: float = 1
    """100 for shares shown in per cent."""

    def text(self, measured: Spread | None) -> str:
        """The cell; a dash for what was not measured."""
        return "-" if measured is None else Spread(tuple(self.factor * v for v in measured.values)).text(self.digits)


def table_rows(columns: Sequence[Column], rows: Mapping[str, Mapping[str, Spread]]) -> list[list[str]]:
    """Rows of text for a terminal (`printing.print_table`) or a page (`report.Table`): the method, then its columns."""
    return [[label, *(column.text(found.get(column.key)) for column in columns)] for label, found in rows.items()]


def table_columns(columns: Sequence[Column], rows: Mapping[str, Mapping[str, Spread]]) -> list[list[str]]:
    """The same lying down: a row for each measurement, a column for each method."""
    return [[column.label, *(column.text(found.get(column.key)) for found in rows.values())] for column in columns]


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


LONGEST = 200
"""Characters of a value; lists of labels are longer."""


def facts(record: Mapping[str, Any], before: str = "") -> list[list[str]]:
    """A nested record as rows: names joined by dots, values as text; what is empty is left out."""
    rows: list[list[str]] = []
    for key, value in record.items():
        if isinstance(value, Mapping):
            rows += facts(value, f"{before}{key}.")
        elif value is not None and value != "" and value != [] and value != {}:
            text = value if isinstance(value, str) else json.dumps(value)
            rows.append([f"{before}{key}", text if len(text) <= LONGEST else f"{text[:LONGEST]} .."])
    return rows


def identified(result: Mapping[str, Any], keys: Sequence[str]) -> Section:
    """A section with tables of everything that identifies a result's numbers."""
    found = [Table(columns=[key, ""], rows=facts(result[key])) for key in keys]
    return Section(title="What identifies these numbers", parts=[table for table in found if table.rows])
