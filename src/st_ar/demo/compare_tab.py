"""The tab that draws the same with two models side by side."""

from collections.abc import Generator
from typing import Any

from st_ar.demo import html
from st_ar.demo.drawing import draw
from st_ar.demo.setup import Setup
from st_ar.demo.widgets import QUEUE, gr, make_fields, order_from, told
from st_ar.errors import UserError


def compare_tab(setup: Setup) -> None:
    """Build the tab."""
    names = setup.shelf.names
    second = names[min(1, len(names) - 1)]

    def start(first: str, other: str, *values: Any) -> Generator[tuple[Any, Any], None, None]:
        if first == other:
            raise UserError("both sides have the same weights: choose two different ones")
        labels, settings = order_from(setup, first, values)
        order_from(setup, other, values)
        called = [setup.shelf.find(first).class_names[label] for label in labels]
        for frames in draw(setup.shelf, [first, other], labels, settings):
            yield html.status(frames[0], models=2), html.side_by_side(frames, [first, other], called)

    with gr.Row():
        with gr.Column(scale=1, min_width=300):
            with gr.Row():
                left = gr.Dropdown(names, value=names[0], label="Left", elem_id="compare-left", min_width=120)
                right = gr.Dropdown(names, value=second, label="Right", elem_id="compare-right", min_width=120)
            fields = make_fields(setup, names[0], "compare")
            with gr.Row():
                go = gr.Button("Draw both", variant="primary", elem_id="compare-go", min_width=120)
                stop = gr.Button("Stop", elem_id="compare-stop", min_width=80)
        with gr.Column(scale=2, min_width=300):
            status = gr.HTML("", elem_id="compare-status", min_height=48)
            pictures = gr.HTML(
                html.note("Both draw the same classes with the same random numbers, token by token in turn."),
                elem_id="compare-pictures",
            )
    if len(names) < 2:
        gr.HTML(
            html.note(
                "There is one set of weights only: start the page with two models, or with a run that has averaged weights."
            )
        )
    event = go.click(told(start), [left, right, *fields.all()], [status, pictures], show_progress_on=[status], **QUEUE)
    stop.click(None, cancels=[event], api_visibility="private")
