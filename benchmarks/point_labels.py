"""Labels beside the points of a chart, for figures with more rows than a legend can tell apart."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from textwrap import fill
from typing import Any

import numpy as np
from matplotlib.path import Path as Line
from matplotlib.transforms import Bbox

from st_ar.figures import Lines

WIDTH = 22
"""Characters of a line of a label."""
RADII = (13, 16, 20, 25, 31, 38, 46, 55, 65, 77, 90, 105, 125)
"""Distances in pixels between a point and its label that are tried."""
MARKER = 12
"""Pixels around a point that stay free."""
ORDERS = 30
"""Orders of placing the labels that are tried."""


def label_points(axes: Any, series: Lines) -> None:
    """Label each series beside one of its points. No label covers a point or another label.

    Of several orders of placing them, the one with the labels nearest to their points is drawn.
    """
    axes.figure.draw_without_rendering()  # settles the limits
    points = {label: axes.transData.transform(np.column_stack(found)) for label, found in series.items()}
    sizes = {label: _size(axes, label) for label in series}
    rng = np.random.default_rng(0)
    orders = [list(map(str, rng.permutation(list(points)))) for _ in range(ORDERS)]
    _, boxes = min((_place(axes.bbox, points, sizes, order) for order in orders), key=lambda found: found[0])
    for label, (anchor, box) in boxes.items():
        axes.annotate(
            fill(label, WIDTH),
            axes.transData.inverted().transform(anchor),
            (np.array(box.min) - anchor) * 72 / axes.figure.dpi,
            textcoords="offset points",
            arrowprops={
                "arrowstyle": "-",
                "linewidth": 0.7,
                "alpha": 0.6,
                "color": axes.xaxis.label.get_color(),
                "shrinkA": 0,
                "shrinkB": 4,
                "relpos": tuple((_nearest(box, anchor) - box.min) / box.size),
            },
            color=axes.xaxis.label.get_color(),
            fontsize=10,
        )


def _size(axes: Any, label: str) -> np.ndarray:
    text = axes.text(0, 0, fill(label, WIDTH), fontsize=10)
    size = np.array(text.get_window_extent().size)
    text.remove()
    return size + np.array([6, 2])  # a margin


def _nearest(box: Bbox, point: np.ndarray) -> np.ndarray:
    """The place of a box that is nearest to a point."""
    return np.clip(point, box.min, box.max)


def _candidates(points: np.ndarray, size: np.ndarray) -> Iterator[tuple[float, np.ndarray, Bbox]]:
    """Distance, point and box of a label, for all its places."""
    for radius, angle, anchor in product(RADII, np.linspace(0, 2 * np.pi, 24, endpoint=False), points):
        way = np.array([np.cos(angle), np.sin(angle)]).round(3)
        centre = anchor + radius * way + np.sign(way) * size / 2
        yield radius, anchor, Bbox([centre - size / 2, centre + size / 2])


def _place(
    area: Bbox, points: Mapping[str, np.ndarray], sizes: Mapping[str, np.ndarray], order: Sequence[str]
) -> tuple[float, dict[str, tuple[np.ndarray, Bbox]]]:
    """Place the labels in this order; returns their summed cost, and each one's point and box."""
    taken = [Bbox([point - MARKER, point + MARKER]) for found in points.values() for point in found]
    leaders: list[Line] = []
    boxes: dict[str, tuple[np.ndarray, Bbox]] = {}
    total = 0.0
    for label in order:
        best, chosen = float("inf"), None
        for cost, anchor, box in _candidates(points[label], sizes[label]):
            if cost >= best:
                continue
            cost += 1000 * sum(box.overlaps(other) for other in taken)
            cost += 1000 * (area.x0 > box.x0 or area.y0 > box.y0 or box.y1 > area.y1)
            if cost >= best:
                continue
            leader = Line([anchor, _nearest(box, anchor)])
            cost += 150 * (
                sum(leader.intersects_bbox(other, filled=False) for other in taken) - 1
            )  # without its own point
            cost += 150 * sum(
                other.intersects_path(leader) or other.intersects_bbox(box, filled=False) for other in leaders
            )
            if cost < best:
                best, chosen = cost, (anchor, box, leader)
        assert chosen is not None
        total += best
        boxes[label] = chosen[:2]
        taken.append(chosen[1])
        leaders.append(chosen[2])
    return total, boxes
