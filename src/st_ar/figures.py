"""Figures in one colour-blind safe style, for light and dark backgrounds.

Text and axes of an inline SVG take the page's text colour. An SVG file follows the reader's light or dark mode. A PNG is white.
"""

import contextlib
import io
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any
from xml.sax.saxutils import quoteattr

import numpy as np
from PIL import Image

from st_ar.errors import UserError, require
from st_ar.files import atomic_write, write_json, write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure


COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito's colour-blind safe palette, in order of use."""
Lines = Mapping[str, tuple[Sequence[float], Sequence[float]]]
"""Label -> (x values, y values)."""
MARKERS = ("o", "s", "^", "D", "v", "P")
DASHES = ("-", "--", ":")
_INK = "#010203"  # replaced by currentColor in an SVG
_OWN_COLOURS = (
    "svg{color:#1b1f24;background:#fff}@media(prefers-color-scheme:dark){svg{color:#e6e9ee;background:#14171b}}"
)


def style(name: str) -> dict[str, Any]:
    """Return matplotlib's settings for a figure. `name` seeds the identifiers in its SVG."""
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


@contextlib.contextmanager
def _styled(name: str, *, grid: bool = True) -> Generator[Any]:
    """Draw the block in the style of a figure; yields matplotlib's Figure."""
    with require("matplotlib").rc_context(style(name) | {"axes.grid": grid}):
        from matplotlib.figure import Figure

        yield Figure


def require_drawable(path: Path) -> None:
    """Check before the work that a figure can be drawn."""
    if path.suffix not in (".svg", ".png"):
        raise UserError(f"{path} is not a .svg or .png file: give a name that ends in .svg or .png")
    require("matplotlib")


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """A figure, its name and its numbers."""

    figure: "Figure"
    name: str
    """Alternative text."""
    data: Any
    """The numbers, as plain JSON values."""

    def svg(self) -> str:
        """Return SVG text to embed in an HTML page."""
        file = io.StringIO()
        with require("matplotlib").rc_context(style(self.name)):
            self.figure.savefig(file, format="svg", bbox_inches="tight", metadata={"Date": None, "Creator": None})
        text = file.getvalue()
        text = text[text.index("<svg") :].replace(_INK, "currentColor")
        return text.replace("<svg ", f'<svg role="img" aria-label={quoteattr(self.name)} ', 1)

    def save(self, path: Path) -> None:
        """Write FILE.svg or FILE.png, and the numbers to FILE.json."""
        require_drawable(path)
        if path.suffix == ".svg":
            head, body = self.svg().split(">", 1)
            write_text(path, f"{head}><style>{_OWN_COLOURS}</style>{body}")
        else:
            with atomic_write(path) as aside:
                self.figure.savefig(aside, format="png", bbox_inches="tight", dpi=200, facecolor="white")
        write_json(path.with_suffix(".json"), self.data)


def line_chart(
    series: Lines,
    *,
    name: str,
    x: str,
    y: str,
    markers: bool = True,
    x_ticks: Sequence[float] | None = None,
    spread: Mapping[str, Sequence[float]] | None = None,
    label_ends: bool = False,
) -> Drawing:
    """Draw lines over a common axis.

    Args:
        name: alternative text; also makes identifiers unique on an HTML page.
        x, y: axis labels with units.
        spread: label -> half the height of a band around the line.
        label_ends: name each line at its right end instead of in a legend.
    """
    with _styled(name) as new_figure:
        figure = new_figure(figsize=(6.2, 3.6))
        axes = figure.subplots()
        _draw_lines(axes, series, x, y, markers, spread)
        if x_ticks is not None:
            axes.set_xticks(list(x_ticks))
        if label_ends:
            _label_ends(axes, series)
    lines = {label: {"x": list(map(float, xs)), "y": list(map(float, ys))} for label, (xs, ys) in series.items()}
    for label, heights in (spread or {}).items():
        lines[label]["spread"] = list(map(float, heights))
    return Drawing(figure=figure, name=name, data={"x": x, "y": y, "series": lines})


def _draw_lines(
    axes: Any, series: Lines, x: str, y: str, markers: bool = True, spread: Mapping[str, Sequence[float]] | None = None
) -> None:
    for index, (label, (xs, ys)) in enumerate(series.items()):
        cycle, colour = divmod(index, len(COLOURS))
        dashes = DASHES[cycle % len(DASHES)]
        marker = MARKERS[(colour + cycle) % len(MARKERS)] if markers else None
        axes.plot(xs, ys, label=label, color=COLOURS[colour], marker=marker, markersize=6, linestyle=dashes)
        if spread and label in spread:
            low, high = (np.add(ys, np.multiply(sign, spread[label])) for sign in (-1, 1))
            axes.fill_between(xs, low, high, color=COLOURS[colour], alpha=0.15, linewidth=0)
    axes.set(xlabel=x, ylabel=y)
    axes.legend()


def _label_ends(axes: Any, series: Lines) -> None:
    """Replace the legend by a label right of each line's end, in the ends' order and without overlap."""
    axes.get_legend().remove()
    axes.autoscale_view()
    ends = (
        axes.transData.transform([(xs[-1], ys[-1]) for xs, ys in series.values()]) * 72 / axes.figure.dpi
    )  # in points
    free = np.inf  # height up to which there is no label
    for line, label, end in sorted(zip(axes.lines, series, ends, strict=True), key=lambda item: -item[2][1]):
        text = fill(label, 20, break_long_words=False)
        half = 7.5 * (text.count("\n") + 1)  # of the label's height
        height = min(end[1], free - half)
        free = height - half
        axes.annotate(
            text,
            (line.get_xdata()[-1], line.get_ydata()[-1]),
            (ends[:, 0].max() - end[0] + 24, height - end[1]),
            textcoords="offset points",
            va="center",
            arrowprops={"arrowstyle": "-", "color": line.get_color(), "shrinkA": 2, "shrinkB": 4, "relpos": (0, 0.5)},
        )


def strip(images: np.ndarray, columns: int) -> np.ndarray:
    """Arrange images uint8 [N, S, S, 3] in one picture with `columns` per row, on white."""
    n, size = images.shape[:2]
    rows = -(-n // columns)
    canvas = np.full((rows * columns, size, size, 3), 255, np.uint8)
    canvas[:n] = images
    return canvas.reshape(rows, columns, size, size, 3).swapaxes(1, 2).reshape(rows * size, columns * size, 3)


def save_png(path: Path, image: np.ndarray) -> None:
    """Write an image uint8 [H, W, 3] atomically as a PNG."""
    with atomic_write(path) as aside:
        Image.fromarray(image).save(aside, format="PNG")


def attention_figure(
    images: np.ndarray,
    maps: Mapping[str, np.ndarray],
    *,
    grid: int,
    steps: Sequence[int],
    name: str,
    masked: np.ndarray | None = None,
) -> Drawing:
    """Draw attention over the images, a row per image and model, a column per step.

    The newest token is framed, read tokens show heat scaled to each map's largest weight, unread tokens are blank.

    Args:
        images: uint8 [N, S, S, 3].
        maps: model -> weights [N, T, T] of one layer; rows are queries, key 0 is the class.
        steps: numbers of tokens read, in 1..T-1.
        masked: bool [N, T, T], True for masked keys, which show no heat.
    """
    rows = len(images) * len(maps)
    with _styled(name, grid=False) as new_figure:
        figure = new_figure(figsize=(1.7 * (len(steps) + 1), 1.75 * rows))
        cells = figure.subplots(rows, len(steps) + 1, squeeze=False)
        _draw_attention(cells, images, maps, grid, steps, masked)
        figure.subplots_adjust(wspace=0.06, hspace=0.08)
    return Drawing(figure=figure, name=name, data=_attention_data(maps, steps))


def _name_row(axes: Any, label: str) -> None:
    axes.set_ylabel(fill(label, 15, break_long_words=False), rotation=0, ha="right", va="center", labelpad=6)


def _draw_attention(
    cells: np.ndarray,
    images: np.ndarray,
    maps: Mapping[str, np.ndarray],
    grid: int,
    steps: Sequence[int],
    masked: np.ndarray | None = None,
) -> None:
    """Fill a grid of axes with the picture and one column per step, a row per image and model."""
    from matplotlib.patches import Rectangle

    size = images.shape[1]
    side, extent = size / grid, (-0.5, size - 0.5, size - 0.5, -0.5)
    for row, (index, model) in enumerate(product(range(len(images)), maps)):
        picture = images[index]
        grey = np.repeat(picture.mean(axis=-1, keepdims=True), 3, axis=-1).astype(np.uint8)
        for axes in cells[row]:
            axes.set(xticks=[], yticks=[], xlim=extent[:2], ylim=extent[2:])
            axes.grid(visible=False)
            axes.spines[:].set(visible=True, linewidth=0.5, alpha=0.4)
        cells[row, 0].imshow(picture)
        _name_row(cells[row, 0], model)
        for column, step in enumerate(steps, start=1):
            axes = cells[row, column]
            if row == 0:
                axes.set_title(f"after {step}", fontsize=10)
            weights = maps[model][index, step, 1 : step + 1]
            heat = np.full(grid**2, np.nan)
            heat[:step] = weights / max(float(weights.max()), 1e-12)
            if masked is not None:
                heat[:step][masked[index, step, 1 : step + 1]] = np.nan
            read = np.kron((np.arange(grid**2) < step).reshape(grid, grid), np.ones((int(side), int(side))))
            axes.imshow(np.dstack([grey, (255 * read).astype(np.uint8)]))
            axes.imshow(heat.reshape(grid, grid), cmap="inferno", alpha=0.65, vmin=0, vmax=1, extent=extent)
            top, left = divmod(step - 1, grid)
            frame = (left * side - 0.5, top * side - 0.5)
            axes.add_patch(Rectangle(frame, side, side, fill=False, edgecolor="#00D0FF", linewidth=1.6))


def _attention_data(maps: Mapping[str, np.ndarray], steps: Sequence[int]) -> dict[str, object]:
    shown = {
        model: [[weights[step, : step + 1].round(6).tolist() for step in steps] for weights in by_image]
        for model, by_image in maps.items()
    }
    return {"tokens read": list(steps), "weights by image and step": shown}


def overview_figure(
    curves: Lines,
    *,
    images: np.ndarray,
    maps: Mapping[str, np.ndarray],
    grid: int,
    steps: Sequence[int],
    layer: int,
    samples: Mapping[str, np.ndarray],
    name: str,
) -> Drawing:
    """Draw probe curves, attention over one image, and samples of several models in one figure.

    Args:
        curves: model -> (tokens read, probe accuracy in %).
        images, maps: one image uint8 [1, S, S, 3], and model -> weights of `layer` as in `attention_figure`.
        samples: model -> images uint8 [N, S, S, 3], with equal labels and seeds.
    """
    with _styled(name) as new_figure:
        figure = new_figure(figsize=(11, 6))
        top, bottom = figure.add_gridspec(2, 1, height_ratios=(3.2, 2.2), hspace=0.33)
        left, right = top.subgridspec(1, 2, width_ratios=(1, 1.2), wspace=0.38)
        _draw_lines(figure.add_subplot(left), curves, "tokens read", "probe accuracy (%)")
        cells = right.subgridspec(len(maps), len(steps) + 1, wspace=0.06, hspace=0.08).subplots(squeeze=False)
        _draw_attention(cells, images, maps, grid, steps)
        cells[0, 0].set_title(f"layer {layer}", fontsize=10)
        rows = bottom.subgridspec(len(samples), 1, hspace=0.12).subplots(squeeze=False)[:, 0]
        for axes, (model, pictures) in zip(rows, samples.items(), strict=True):
            framed = np.pad(pictures, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=255)
            axes.imshow(strip(framed, len(framed)), interpolation="none")
            axes.set(xticks=[], yticks=[])
            axes.grid(visible=False)
            axes.spines[:].set_visible(False)
            _name_row(axes, model)
    curve_data = {label: {"x": list(xs), "y": list(ys)} for label, (xs, ys) in curves.items()}
    data = {"probe accuracy (%)": curve_data, "attention": {"layer": layer, **_attention_data(maps, steps)}}
    return Drawing(figure=figure, name=name, data=data)


def views_figure(views: np.ndarray, differ: Mapping[str, np.ndarray], *, titles: tuple[str, str], name: str) -> Drawing:
    """Draw two views of each image with the grid of tokens, a row per image, two columns per tokenizer.

    Tokens that differ are crossed out, and those without counterpart are faded. The share of equal tokens is below.

    Args:
        views: two views of k images, uint8 [2, k, S, S, 3].
        differ: tokenizer -> [2, k, g, g] by view and token: 1 if it differs from its counterpart, 0 if it is equal, nan without a
            counterpart.
    """
    rows, size = views.shape[1:3]
    equal: dict[str, list[float]] = {}
    with _styled(name, grid=False) as new_figure:
        from matplotlib.collections import LineCollection

        inches = max(2.1, 0.2 * max(states.shape[-1] for states in differ.values()))  # side of a view
        figure = new_figure(figsize=(2 * inches * len(differ), (inches + 0.15) * rows))
        cells = figure.subplots(rows, 2 * len(differ), squeeze=False)
        for column, (label, by_view) in enumerate(differ.items()):
            grid = by_view.shape[-1]
            side = size / grid
            equal[label] = [1 - float(np.nanmean(states)) for states in by_view[0]]
            for row, view in product(range(rows), (0, 1)):
                axes, extent = cells[row, 2 * column + view], (0, size, size, 0)
                states = by_view[view, row]
                axes.imshow(views[view, row], extent=extent, interpolation="none")
                fade = np.where(np.isnan(states)[..., None], (1, 1, 1, 0.75), 0.0)
                axes.imshow(fade, extent=extent, interpolation="none")
                edges = np.arange(grid + 1) * side
                axes.hlines(edges, 0, size, colors="white", linewidth=0.5, alpha=0.6)
                axes.vlines(edges, 0, size, colors="white", linewidth=0.5, alpha=0.6)
                centres = (np.argwhere(states == 1) + 0.5) * side
                r = side / 5
                crosses = [((x - r, y + k * r), (x + r, y - k * r)) for y, x in centres for k in (1, -1)]
                for colour, width in (("white", 2.4), (COLOURS[1], 1.2)):  # visible on any picture
                    axes.add_collection(LineCollection(crosses, colors=colour, linewidths=width))
                axes.set(xticks=[], yticks=[], xlim=(0, size), ylim=(size, 0))
                axes.spines[:].set_visible(False)
                if row == 0:
                    axes.set_title(f"{label}\n{titles[view]}" if len(differ) > 1 else titles[view], fontsize=10)
            for row, share in enumerate(equal[label]):
                cells[row, 2 * column + 1].set_xlabel(f"{100 * share:.0f} % equal", fontsize=9)
        figure.subplots_adjust(wspace=0.06, hspace=0.16)
    return Drawing(figure=figure, name=name, data={"share of equal tokens by image": equal})
