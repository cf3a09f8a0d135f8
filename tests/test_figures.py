"""Figures: SVG that any page can take in, with the labels and pictures that were asked for."""

import base64
import io
import json
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.text import Text
from PIL import Image

from st_ar.figures import COLOURS, attention_figure, line_chart, strip, views_figure
from tests.disk import refused

SVG = "{http://www.w3.org/2000/svg}"
XLINK = "{http://www.w3.org/1999/xlink}"


def chart(name: str = "loss", **series: list[float]) -> str:
    curves = {label: (list(range(len(ys))), ys) for label, ys in (series or {"AR": [3.0, 2.0, 1.5]}).items()}
    return line_chart(curves, name=name, x="optimizer step", y="loss (nats)").svg()


def random_maps(images: int, grid: int, seed: int = 0) -> np.ndarray:
    weights = np.tril(np.random.default_rng(seed).random((images, grid**2, grid**2)) + 0.01)
    return weights / weights.sum(-1, keepdims=True)


def maps_drawn(images: int = 2, steps: tuple[int, ...] = (2, 5, 8)) -> str:
    pictures = np.random.default_rng(0).integers(0, 256, (images, 6, 6, 3)).astype(np.uint8)
    maps = {"AR": random_maps(images, 3), "ST-AR": random_maps(images, 3, 1)}
    return attention_figure(pictures, maps, grid=3, steps=steps, name="attention at layer 2").svg()


def words(svg: str) -> list[str]:
    return [(element.text or "").strip() for element in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def test_no_two_of_many_curves_look_alike() -> None:
    curves = {f"method {number}": ([0.0, 1.0], [number, number + 1.0]) for number in range(3 * len(COLOURS))}
    drawing = line_chart(curves, name="many", x="step", y="loss")
    lines = drawing.figure.axes[0].get_lines()
    assert len(lines) == 3 * len(COLOURS)
    for second in ("linestyle", "marker"):  # a series of one point has no line
        assert len({(line.get_color(), str(getattr(line, f"get_{second}")())) for line in lines}) == len(lines)


@pytest.mark.parametrize("draw", [chart, maps_drawn])
def test_a_figure_is_xml_that_takes_the_pages_text_colour(draw: Callable[[], str]) -> None:
    svg = draw()
    root = ElementTree.fromstring(svg)
    assert root.tag == f"{SVG}svg"
    assert "#010203" not in svg.lower()
    assert "currentColor" in svg
    for element in root.iter():
        for name, value in element.attrib.items():
            if name.endswith("href"):
                assert value.startswith(("#", "data:image/png;base64,"))  # nothing is fetched
    text = list(root.iter(f"{SVG}text"))
    assert text
    assert all("currentColor" in element.get("style", "") for element in text)  # none would vanish on a dark page


def test_a_chart_has_a_curve_for_each_series_and_its_labels() -> None:
    svg = chart("training loss", AR=[3.0, 2.0, 1.5], **{"ST-AR": [3.5, 1.0, 0.5]})
    assert {"AR", "ST-AR", "optimizer step", "loss (nats)"} <= set(words(svg))
    assert ElementTree.fromstring(svg).get("aria-label") == "training loss"
    assert COLOURS[0].lower() in svg.lower()
    assert COLOURS[1].lower() in svg.lower()
    assert COLOURS[2].lower() not in svg.lower()


def test_ticks_are_where_they_were_asked_for() -> None:
    svg = line_chart({"AR": ([8, 64], [0.1, 0.9])}, name="probe", x="tokens", y="accuracy", x_ticks=[8, 32, 64]).svg()
    assert [word for word in words(svg) if word.isdigit()][:3] == ["8", "32", "64"]


def test_a_spread_is_a_band_around_its_line_and_among_the_numbers() -> None:
    series = {"AR": ([1, 2], [3.0, 4.0]), "ST-AR": ([1, 2], [1.0, 2.0])}
    drawing = line_chart(series, name="entropy", x="layer", y="nats", spread={"ST-AR": [0.5, 0.25]})
    (band,) = drawing.figure.axes[0].collections
    corners = {(x, y) for x, y in band.get_paths()[0].vertices.tolist()}
    assert corners == {(1, 0.5), (1, 1.5), (2, 1.75), (2, 2.25)}
    assert drawing.data["series"]["ST-AR"]["spread"] == [0.5, 0.25]
    assert "spread" not in drawing.data["series"]["AR"]


def test_a_missing_value_leaves_a_gap() -> None:
    whole, gap = chart(AR=[3.0, 2.0, 1.5, 1.0, 0.5]), chart(AR=[3.0, 2.0, float("nan"), 1.0, 0.5])
    assert "nan" not in gap.lower()
    ElementTree.fromstring(gap)

    def markers(svg: str) -> int:
        root = ElementTree.fromstring(svg)
        return sum(COLOURS[0].lower() in use.get("style", "").lower() for use in root.iter(f"{SVG}use"))

    assert markers(gap) == markers(whole) - 1


def test_a_name_with_markup_in_it_is_still_xml() -> None:
    name = """AR & "ST-AR" <loss> 'live'"""
    assert ElementTree.fromstring(chart(name)).get("aria-label") == name


def test_figures_of_different_names_share_no_reference_and_one_name_draws_one_figure() -> None:
    def references(svg: str) -> set[str]:
        return set(re.findall(r'(?:url\(|href=")#([\w.-]+)', svg))

    first, second = chart("first"), chart("second")
    assert references(first)
    assert not references(first) & references(second)  # on one page they would take each other's clip paths
    assert chart("first") == first


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_a_saved_figure_stands_for_itself_with_its_numbers_beside_it(tmp_path: Path, suffix: str) -> None:
    drawing = line_chart({"AR": ([1, 2], [3.5, 2.5])}, name="loss", x="step", y="loss (nats)")
    drawing.save(tmp_path / f"loss{suffix}")
    assert json.loads((tmp_path / "loss.json").read_text()) == {
        "x": "step",
        "y": "loss (nats)",
        "series": {"AR": {"x": [1, 2], "y": [3.5, 2.5]}},
    }
    if suffix == ".svg":
        svg = (tmp_path / "loss.svg").read_text()
        style = next(ElementTree.fromstring(svg).iter(f"{SVG}style")).text or ""
        assert "prefers-color-scheme:dark" in style
        assert svg.count("<svg") == 1
    else:
        picture = np.asarray(Image.open(tmp_path / "loss.png").convert("RGB"))
        assert (picture[0] == 255).all()  # on white
        assert picture.min() < 40
        assert picture.shape[1] > 1000


def test_another_kind_of_figure_is_refused(tmp_path: Path) -> None:
    with refused(tmp_path, r"loss\.pdf is not a \.svg or \.png file: give a name"):
        line_chart({"AR": ([1, 2], [3, 4])}, name="loss", x="step", y="loss").save(tmp_path / "loss.pdf")


def test_attention_is_drawn_over_what_is_read_and_the_future_is_blank() -> None:
    pictures = np.full((1, 6, 6, 3), 100, np.uint8)
    weights = np.zeros((1, 9, 9))
    weights[0, 5, :6] = [0.1, 0.0, 0.0, 0.9, 0.0, 0.0]  # after 5 tokens: all eyes on token 2
    svg = attention_figure(pictures, {"AR": weights}, grid=3, steps=[5], name="one").svg()
    found = [element.get(f"{XLINK}href", "") for element in ElementTree.fromstring(svg).iter(f"{SVG}image")]
    assert len(found) == 2
    drawn = [Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGBA") for uri in found]
    original, seen = (np.asarray(picture)[::-1] for picture in drawn)  # matplotlib's SVG turns them upside down
    assert original[len(original) // 2, len(original) // 2].tolist() == [100, 100, 100, 255]
    height, width = seen.shape[:2]
    middles = [
        seen[height * (2 * row + 1) // 6, width * (2 * column + 1) // 6] for row in range(3) for column in range(3)
    ]
    assert [middle[3] == 255 for middle in middles] == [True] * 5 + [False] * 4
    assert all(middle[3] == 0 for middle in middles[5:])
    brightness = [int(middle[:3].astype(int).sum()) for middle in middles[:5]]
    assert brightness.index(max(brightness)) == 2
    assert len({brightness[index] for index in (0, 1, 3, 4)}) == 1


def test_masked_tokens_have_no_heat() -> None:
    pictures = np.full((1, 6, 6, 3), 100, np.uint8)
    masked = np.zeros((1, 9, 9), bool)
    masked[0, 5, 2] = True  # token 1
    masked[0, 4, 3] = True  # of another query
    drawing = attention_figure(pictures, {"AR": random_maps(1, 3)}, grid=3, steps=[5], name="one", masked=masked)
    heat = np.ma.filled(drawing.figure.axes[1].images[1].get_array(), np.nan).ravel()
    assert np.isnan(heat).tolist() == [False, True, False, False, False, True, True, True, True]


def test_rows_are_images_and_models_and_columns_are_steps() -> None:
    svg = maps_drawn(images=2, steps=(2, 5, 8))
    found = words(svg)
    assert found.count("AR") == found.count("ST-AR") == 2
    assert [word for word in found if word.startswith("after")] == ["after 2", "after 5", "after 8"]
    assert sum(1 for _ in ElementTree.fromstring(svg).iter(f"{SVG}image")) == 2 * 2 * (1 + 3)


@given(st.integers(1, 7), st.integers(1, 4), st.integers(1, 3))
def test_a_strip_lays_images_out_in_rows_and_leaves_the_rest_white(count: int, columns: int, size: int) -> None:
    images = np.random.default_rng(count).integers(0, 255, (count, size, size, 3)).astype(np.uint8)
    picture = strip(images, columns)
    rows = (count + columns - 1) // columns
    assert picture.shape == (rows * size, columns * size, 3)
    for place in range(rows * columns):
        top, left = place // columns * size, place % columns * size
        cell = picture[top : top + size, left : left + size]
        np.testing.assert_array_equal(cell, images[place] if place < count else np.full_like(cell, 255))


def test_lines_can_be_labelled_at_their_ends() -> None:
    series = {"low": ([0, 1], [0, 0.5]), "AR, 2 views (control)": ([0, 1], [0, 0.99]), "high": ([0, 1], [0, 1])}
    figure = line_chart(series, name="n", x="x", y="y", label_ends=True).figure
    (axes,) = figure.axes
    assert axes.get_legend() is None
    figure.draw_without_rendering()
    boxes = {text.get_text(): Text.get_window_extent(text) for text in axes.texts}  # without the lines to them
    high, middle, low = (boxes[label] for label in ("high", "AR, 2 views\n(control)", "low"))
    assert low.y1 < middle.y0
    assert middle.y1 <= high.y0
    assert min(box.x0 for box in boxes.values()) > axes.transData.transform((1, 0))[0]
    assert low.y0 < axes.transData.transform((1, 0.5))[1] < low.y1  # at its own line where there is room


def test_two_views_are_shown_with_what_differs_between_them() -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3)).astype(np.uint8)
    differ = np.zeros((2, 3, 4, 4))
    differ[:, 1, :, :2] = 1
    differ[0, 2, 0], differ[1, 2, -1] = np.nan, np.nan
    differ[:, 2, 1, 1] = 1
    views = np.stack([pictures, pictures[::-1]])
    drawing = views_figure(views, {"a": differ, "b": differ}, titles=("view A", "view B"), name="two views")
    found = words(drawing.svg())
    assert [word for word in found if "equal" in word] == [f"{share} % equal" for share in (100, 100, 50, 50, 92, 92)]
    assert [word for word in found if "view" in word] == ["view A", "view B"] * 2
    assert sum(1 for _ in ElementTree.fromstring(drawing.svg()).iter(f"{SVG}image")) == 2 * 2 * 2 * 3
    assert drawing.data["share of equal tokens by image"]["b"] == pytest.approx([1, 0.5, 11 / 12])
