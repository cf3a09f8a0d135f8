"""The page: its tabs, in one style on light and dark screens."""

from importlib.resources import files
from typing import Any

from st_ar.demo import html
from st_ar.demo.compare_tab import compare_tab
from st_ar.demo.generate_tab import generate_tab
from st_ar.demo.runs_tab import runs_tab
from st_ar.demo.setup import Setup
from st_ar.demo.shelf import Shelf
from st_ar.demo.understand_tab import understand_tab
from st_ar.demo.widgets import gr

TITLE = "st-ar"
WAITING = 32
"""Jobs that may wait in line; more are refused."""
FORGET = 3600
"""Seconds after which files of the page's pictures and uploads are removed."""


def describe(shelf: Shelf) -> str:
    """The weights that the page offers, those of one shape together, and what draws with them."""
    shapes: dict[str, list[str]] = {}
    for name in shelf.names:
        config = shelf.find(name).config
        shape = f"{config.n_layers} layers of {config.dim}, {config.grid} x {config.grid} tokens"
        shapes.setdefault(shape, []).append(name)
    models = [f"{', '.join(names)}: {shape}" for shape, names in shapes.items()]
    return "; ".join([*models, f"{shelf.device.type}, {str(shelf.dtype).removeprefix('torch.')}"])


def build_page(setup: Setup) -> Any:
    """The page as Gradio's Blocks, with a queue."""
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(FORGET, FORGET)) as page:
        gr.HTML(f"<h1>{TITLE}</h1>{html.note(describe(setup.shelf))}", elem_id="head")
        drawn = gr.State(None, time_to_live=FORGET)
        with gr.Tab("Generate"):
            generate_tab(setup, drawn)
        with gr.Tab("Compare"):
            compare_tab(setup)
        with gr.Tab("Understand"):
            understand_tab(setup, drawn)
        with gr.Tab("Runs"):
            runs_tab(setup)
    return page.queue(max_size=WAITING, default_concurrency_limit=1, api_open=False)


def style() -> dict[str, Any]:
    """Theme and style sheet, as Gradio takes them when the page is mounted: fonts that every machine has, nothing from elsewhere."""
    theme = gr.themes.Default(
        primary_hue="sky", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    )
    return {"theme": theme, "css": files("st_ar").joinpath("templates/demo.css").read_text()}
