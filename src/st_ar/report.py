"""HTML reports: one self-contained page, everything inline, readable on a phone, light and dark, whole when it is printed.

Tables sort by a click on a column's head, figures and pictures open large. The page's policy lets nothing but that script run, and
nothing be fetched.
"""

import base64
import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from st_ar.errors import UserError
from st_ar.files import require_place, written_aside


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
    require_reports()
    require_place(path)


def require_reports() -> Any:
    """The library that renders pages; UserError: it is not installed."""
    try:
        import jinja2
    except ModuleNotFoundError as error:
        raise UserError(f"reports are rendered by jinja2 ({error}): pip install 'st-ar[quickstart]'") from error
    return jinja2


def write_report(path: Path, *, title: str, lead: str, sections: Sequence[Section]) -> None:
    """Write the page, whole or not at all.

    Raises:
        UserError: jinja2 is not installed, or the page cannot be written.
    """
    environment = require_reports().Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    templates = files("st_ar").joinpath("templates")
    template = environment.from_string(templates.joinpath("report.html").read_text())
    script = templates.joinpath("report.js").read_text()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    with written_aside(path) as aside:
        aside.write_text(
            template.render(
                title=title, lead=lead, sections=sections, kind=_kind, script=script, script_hash=f"sha256-{digest}"
            )
        )
