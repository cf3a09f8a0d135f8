"""The tab that draws images, and draws saved ones again."""

from collections.abc import Generator
from typing import Any

import numpy as np

from st_ar.demo import html
from st_ar.demo.drawing import compare_pictures, draw, find_drawer
from st_ar.demo.recipe import read_recipe
from st_ar.demo.setup import Seen, Setup
from st_ar.demo.uploads import decode_upload, read_upload
from st_ar.demo.widgets import AT_ONCE, QUEUE, class_choices, gr, make_fields, order_from, told

EMPTY = html.note("Choose classes and press Draw: the images appear here token by token.")


def generate_tab(setup: Setup, drawn: Any) -> None:
    """Build the tab; `drawn` is the visitor's state that keeps what was drawn last, a list of `Seen`."""
    names = setup.shelf.names

    def start(name: str, *values: Any) -> Generator[tuple[Any, Any, Any], None, None]:
        labels, settings = order_from(setup, name, values)
        called = [setup.shelf.find(name).class_names[label] for label in labels]
        for [frame] in draw(setup.shelf, [name], labels, settings):
            seen: Any = gr.skip()
            if frame.tokens is not None:
                seen = [
                    Seen(title=f"image {index} drawn by {name}: {known}", tokens=tokens, label=label, picture=picture)
                    for index, (known, tokens, label, picture) in enumerate(
                        zip(called, frame.tokens, labels, frame.pictures, strict=True)
                    )
                ]
            yield html.status(frame), html.gallery(frame, called, name), seen

    def again(path: Any) -> Generator[tuple[Any, Any], None, None]:
        data = read_upload(path)
        recipe = read_recipe(data)
        given = np.asarray(decode_upload(data))
        name = setup.shelf.run(lambda: find_drawer(setup.shelf, recipe))
        for [frame] in draw(setup.shelf, [name], recipe.labels, recipe.settings):
            if frame.tokens is None:
                yield html.status(frame), html.gallery(html.only(frame, recipe.number), [recipe.class_name], name)
            else:
                verdict = compare_pictures(frame.pictures[recipe.number], given, recipe, setup.shelf)
                shown = html.gallery(html.only(frame, recipe.number), [recipe.class_name], name)
                yield html.note(f"{verdict} Drawn by {name}, {html.in_words(recipe)}."), shown

    def other_weights(name: str, classes: Any) -> Any:
        return still_known(setup, name, classes)

    with gr.Row():
        with gr.Column(scale=1, min_width=300):
            weights = gr.Dropdown(names, value=names[0], label="Weights", elem_id="generate-weights")
            fields = make_fields(setup, names[0], "generate")
            with gr.Row():
                go = gr.Button("Draw", variant="primary", elem_id="generate-go", min_width=120)
                stop = gr.Button("Stop", elem_id="generate-stop", min_width=80)
        with gr.Column(scale=2, min_width=300):
            status = gr.HTML("", elem_id="generate-status", min_height=48)
            pictures = gr.HTML(EMPTY, elem_id="generate-pictures")
    with gr.Accordion("Draw a saved image again", open=False, elem_id="again"):
        gr.HTML(
            html.note(
                "Drop a PNG that was saved here: it says how it was drawn, and is drawn again and compared, bit for bit."
            )
        )
        file = gr.File(file_types=[".png"], type="filepath", label="A saved PNG", height=140, elem_id="again-file")
        again_status = gr.HTML("", elem_id="again-status", min_height=32)
        again_picture = gr.HTML("", elem_id="again-picture")

    event = go.click(
        told(start), [weights, *fields.all()], [status, pictures, drawn], show_progress_on=[status], **QUEUE
    )
    stop.click(None, cancels=[event], api_visibility="private")
    weights.change(told(other_weights), [weights, fields.classes], [fields.classes], **AT_ONCE)
    file.upload(told(again), [file], [again_status, again_picture], show_progress_on=[again_status], **QUEUE)


def still_known(setup: Setup, name: str, classes: Any) -> Any:
    """The classes of other weights, of which those stay chosen that they know."""
    choices = class_choices(setup, name)
    known = [label for _, label in choices]
    return gr.update(choices=choices, value=[label for label in classes or [] if label in known])
