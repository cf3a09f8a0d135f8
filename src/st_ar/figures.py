"""Every figure of the project in one style: colour-blind safe, and readable on light and on dark pages.

In a page's SVG what is not a data colour takes the page's text colour. A file of SVG takes one from the reader's light or dark mode;
a PNG is on white.
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.sax.saxutils import quoteattr

import numpy as np

from st_ar.errors import UserError
from st_ar.files import write_json, written_aside

if TYPE_CHECKING:
    from matplotlib.figure import Figure


COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito's palette, in the order of use: telling apart needs no red-green vision."""
MARKERS = ("o", "s", "^", "D", "v", "P")
DASHES = ("-", "--", ":")
_INK = "#010203"  # stands for the page's text colour until the SVG is written; on the white of a PNG it stays
_OWN_COLOURS = (
    "svg{color:#1b1f24;background:#fff}@media(prefers-color-scheme:dark){svg{color:#e6e9ee;background:#14171b}}"
)


def style(name: str) -> dict[str, Any]:
    """Matplotlib's settings for a figure called `name`."""
    return {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "font.family": "sans-serif",
        "font.size": 11,
        "text.color": _INK,
        "axes.edgecolor": _INK,
        "axes.labelcolor": _INK,
        "xtick.color": _INK,
        "ytick.color": _INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.15,
        "grid.color": _INK,
        "axes.facecolor": "none",
        "figure.facecolor": "none",
        "legend.frameon": False,
        "lines.linewidth": 2,
    }


def require_matplotlib() -> Any:
    """The module; UserError where it is not installed."""
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise UserError(f"figures are drawn by matplotlib ({error}): pip install 'st-ar[quickstart]'") from error
    return matplotlib


def require_drawable(path: Path) -> None:
    """Refuse a figure that could not be drawn, before the work whose result it shows.

    Raises:
        UserError: neither FILE.svg nor FILE.png, or no matplotlib.
    """
    if path.suffix not in (".svg", ".png"):
        raise UserError(f"{path}: figures are drawn as .svg or .png, not as {path.suffix or 'a file without ending'}")
    require_matplotlib()


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """A figure, what it is called, and the numbers that it shows."""

    figure: "Figure"
    name: str
    """What it shows, for those who cannot see it."""
    data: Any
    """The numbers, as plain JSON values."""

    def svg(self) -> str:
        """For a page to take in."""
        file = io.StringIO()
        with require_matplotlib().rc_context(style(self.name)):
            self.figure.savefig(file, format="svg", bbox_inches="tight", metadata={"Date": None, "Creator": None})
        text = file.getvalue()
        text = text[text.index("<svg") :].replace(_INK, "currentColor")
        return text.replace("<svg ", f'<svg role="img" aria-label={quoteattr(self.name)} ', 1)

    def save(self, path: Path) -> None:
        """Write FILE.svg or FILE.png, and the numbers beside it as FILE.json.

        Raises:
            UserError: another kind of file, or it cannot be written.
        """
        require_drawable(path)
        with written_aside(path) as aside:
            if path.suffix == ".svg":
                head, body = self.svg().split(">", 1)
                aside.write_text(f"{head}><style>{_OWN_COLOURS}</style>{body}")
            else:
                self.figure.savefig(aside, format="png", bbox_inches="tight", dpi=200, facecolor="white")
        write_json(path.with_suffix(".json"), self.data)


def embedded(svg: str) -> str:
    """The text of an SVG file of `Drawing.save` for a page to take in, in the page's colours."""
    return svg.replace(f"<style>{_OWN_COLOURS}</style>", "", 1)


def line_chart(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    name: str,
    x: str,
    y: str,
    markers: bool = True,
    x_ticks: Sequence[float] | None = None,
    spread: Mapping[str, Sequence[float]] | None = None,
    legend_above: bool = False,
) -> Drawing:
    """Lines over a common axis.

    Args:
        series: label -> (x values, y values).
        name: what the figure shows, for those who cannot see it; also keeps identifiers apart on a page.
        x, y: axis labels with units.
        markers: whether to mark the points.
        x_ticks: where to put ticks.
        spread: label -> half the height of a band around the line.
        legend_above: put the legend over the axes, where lines leave it no room inside.
    """
    matplotlib = require_matplotlib()
    from matplotlib.figure import Figure

    with matplotlib.rc_context(style(name)):
        figure = Figure(figsize=(6.2, 3.6))
        axes = figure.subplots()
        draw_lines(axes, series, x=x, y=y, markers=markers, spread=spread)
        if x_ticks is not None:
            axes.set_xticks(list(x_ticks))
        if legend_above:
            axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)
    lines = {label: {"x": list(map(float, xs)), "y": list(map(float, ys))} for label, (xs, ys) in series.items()}
    for label, heights in (spread or {}).items():
        lines[label]["spread"] = list(map(float, heights))
    return Drawing(figure=figure, name=name, data={"x": x, "y": y, "series": lines})


def draw_lines(
    axes: Any,
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    x: str,
    y: str,
    markers: bool = True,
    spread: Mapping[str, Sequence[float]] | None = None,
) -> None:
    """Draw the lines of `line_chart` with labels and a legend into some axes."""
    for index, (label, (xs, ys)) in enumerate(series.items()):
        turn, place = divmod(index, len(COLOURS))
        dashes = DASHES[turn % len(DASHES)]
        marker = MARKERS[(place + turn) % len(MARKERS)] if markers else None
        axes.plot(xs, ys, label=label, color=COLOURS[place], marker=marker, markersize=6, linestyle=dashes)
        if spread and label in spread:
            low, high = (np.add(ys, np.multiply(sign, spread[label])) for sign in (-1, 1))
            axes.fill_between(xs, low, high, color=COLOURS[place], alpha=0.15, linewidth=0)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.legend()


def strip(images: np.ndarray, columns: int) -> np.ndarray:
    """Images uint8 [N, S, S, 3] as one picture, `columns` to a row, white where none is left."""
    n, size = images.shape[:2]
    rows = -(-n // columns)
    canvas = np.full((rows * columns, size, size, 3), 255, np.uint8)
    canvas[:n] = images
    return canvas.reshape(rows, columns, size, size, 3).swapaxes(1, 2).reshape(rows * size, columns * size, 3)
