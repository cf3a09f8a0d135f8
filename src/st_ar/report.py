"""Tables on the terminal, results as JSON, and self-contained HTML reports.

A report's tables sort by a click on a column's head, and its figures open large. Its content security policy allows only that
script, and no requests.
"""

import base64
import contextlib
import hashlib
import io
import json
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from st_ar.errors import UserError, require
from st_ar.files import require_place, write_json, write_text


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table; the first column names the row."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    wrap: bool = False
    """Whether the cells are texts, set left and wrapped, and not numbers."""


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A figure as SVG text from st_ar.figures."""

    svg: str
    caption: str = ""


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """Rows of pictures under column headings. A row is its name and a picture (a PNG data URI) per column."""

    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[str]]]
    caption: str = ""


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading, paragraphs, commands to copy, and tables or figures."""

    title: str
    paragraphs: Sequence[str] = ()
    commands: Sequence[str] = ()
    parts: Sequence[Table | Chart | Gallery] = ()


def png_uri(picture: np.ndarray) -> str:
    """Encode a picture uint8 [H, W, 3] as a data URI."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def require_page(path: Path) -> None:
    """Check before the work that a report can be written."""
    if path.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--page {path} is not an HTML file: give a name that ends in .html")
    require("jinja2")
    require_place(path)


def write_report(path: Path, *, title: str, lead: str, sections: Sequence[Section]) -> None:
    """Write an HTML report atomically.

    Raises:
        UserError: jinja2 is not installed, or the report cannot be written.
    """
    environment = require("jinja2").Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    templates = files("st_ar").joinpath("templates")
    template = environment.from_string(templates.joinpath("report.html").read_text(encoding="utf-8"))
    script = templates.joinpath("report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    html = template.render(
        title=title,
        lead=lead,
        sections=sections,
        kind=lambda part: type(part).__name__.lower(),
        script=script,
        script_hash=f"sha256-{digest}",
    )
    write_text(path, html)


@dataclass(frozen=True)
class Spread:
    """A measurement repeated with several seeds."""

    values: tuple[float, ...]
    """One value per seed."""

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> float | None:
        """Standard deviation over the seeds (n - 1); None for one seed."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    def text(self, digits: int) -> str:
        """Format as 84.8 ± 0.7, or as 84.8 for one seed."""
        spread = "" if self.deviation is None else f" ± {self.deviation:.{digits}f}"
        return f"{self.mean:.{digits}f}{spread}"

    def describe(self) -> dict[str, object]:
        """Return plain JSON values."""
        return {"mean": self.mean, "deviation": self.deviation, "values": list(self.values)}


def difference(a: Spread, b: Spread) -> Spread:
    """Return a - b seed by seed. Paired runs see the same data in the same order."""
    return Spread(tuple(x - y for x, y in zip(a.values, b.values, strict=True)))


def is_noise(paired: Spread) -> bool | None:
    """Whether a paired difference is within two standard errors of zero; None for one seed."""
    if paired.deviation is None:
        return None
    return abs(paired.mean) <= 2 * paired.deviation / math.sqrt(len(paired.values))


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print aligned columns: the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    for row in (header, *rows):
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        cells[0] = row[0].ljust(widths[0])
        print("  ".join(cells).rstrip())


def check_json(where: str | None) -> None:
    """Check before the work that --json can be written."""
    if where not in (None, "-"):
        require_place(Path(where))


def keep_json(where: str | None, result: Mapping[str, Any]) -> None:
    """Write a result as JSON to a file or (-) to standard output; None does nothing."""
    if where == "-":
        print(json.dumps(result, indent=2))
    elif where is not None:
        write_json(Path(where), dict(result))


def json_alone(where: str | None) -> contextlib.AbstractContextManager[object]:
    """Print to standard error in a block if --json is -, so that standard output holds only the JSON."""
    return contextlib.redirect_stdout(sys.stderr) if where == "-" else contextlib.nullcontext()


LONGEST = 200
"""Maximum number of characters of a value in a report; lists of labels are longer."""


def _flatten(record: Mapping[str, Any], prefix: str = "") -> list[list[str]]:
    """Flatten a nested record into rows of dotted name and text. Empty values are left out."""
    rows: list[list[str]] = []
    for key, value in record.items():
        if isinstance(value, Mapping):
            rows += _flatten(value, f"{prefix}{key}.")
        elif value is not None and value not in ("", []):
            text = value if isinstance(value, str) else json.dumps(value)
            rows.append([f"{prefix}{key}", text if len(text) <= LONGEST else f"{text[:LONGEST]} .."])
    return rows


def provenance(result: Mapping[str, Any], keys: Sequence[str]) -> Section:
    """Return a section with tables of everything that identifies a result's numbers."""
    tables = [Table(columns=[key, ""], rows=_flatten(result[key]), wrap=True) for key in keys]
    return Section(title="Provenance", parts=[table for table in tables if table.rows])
