"""What the tabs share: Gradio itself, handlers whose errors are told, and the fields that say how to draw."""

from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import wraps
from html import escape
from importlib import import_module
from inspect import isgeneratorfunction
from typing import Any

import numpy as np

from st_ar.config import SampleSettings
from st_ar.demo import html
from st_ar.demo.draw import MOST_IMAGES, choose_labels, compare_pictures, draw, find_drawer, read_recipe
from st_ar.demo.inputs import MOST_SEED, decode_upload, read_upload, settings_from, whole
from st_ar.demo.setup import Seen, Setup
from st_ar.errors import UserError

gr: Any = import_module("gradio")
"""Its types say little of what is used here."""
QUEUE = {"concurrency_id": "models", "concurrency_limit": 1, "api_visibility": "private"}
"""Of all that computes with models: one job at a time, the others wait in line and see it."""
BESIDE = {"concurrency_id": "files", "concurrency_limit": 2, "api_visibility": "private", "show_progress": "hidden"}
"""Of all that only reads files."""
AT_ONCE = {"concurrency_id": "page", "concurrency_limit": 8, "api_visibility": "private", "show_progress": "hidden"}
"""Of what only changes the page's own fields."""
CLASSES_SHOWN = 100
"""Names in the list before one searches for more."""


def told(work: Callable[..., Any]) -> Callable[..., Any]:
    """A handler, whose mistakes of users become messages on the page."""
    if isgeneratorfunction(work):

        @wraps(work)
        def steps(*values: Any) -> Generator[Any, None, None]:
            try:
                yield from work(*values)
            except UserError as error:
                raise gr.Error(escape(str(error)), print_exception=False) from None

        return steps

    @wraps(work)
    def once(*values: Any) -> Any:
        try:
            return work(*values)
        except UserError as error:
            raise gr.Error(escape(str(error)), print_exception=False) from None

    return once


def class_choices(setup: Setup, name: str) -> list[tuple[str, int]]:
    """The classes of some weights, by their names; numbered where two are called alike."""
    names = setup.shelf.find(name).class_names
    return [(known if names.count(known) == 1 else f"{known} ({index})", index) for index, known in enumerate(names)]


@dataclass(frozen=True, kw_only=True)
class Fields:
    """The fields that say what is drawn, and how."""

    classes: Any
    count: Any
    scale: Any
    schedule: Any
    power: Any
    temperature: Any
    top_k: Any
    top_p: Any
    seed: Any

    def all(self) -> list[Any]:
        """In the order in which `order_from` takes their values."""
        return [
            *(self.classes, self.count, self.scale, self.schedule, self.power, self.temperature),
            *(self.top_k, self.top_p, self.seed),
        ]


def make_fields(setup: Setup, name: str, key: str) -> Fields:
    """The fields for some weights; `key` begins their identifiers on the page."""
    weights = setup.shelf.find(name)
    choices = class_choices(setup, name)
    recommended = SampleSettings().resolved(weights.config).cfg_scale
    classes = gr.Dropdown(
        choices,
        value=[index for _, index in choices[:4]],
        multiselect=True,
        filterable=True,
        max_choices=MOST_IMAGES,
        num_choices_shown=CLASSES_SHOWN,
        label=f"Classes ({len(choices):,}; type to search)",
        elem_id=f"{key}-classes",
    )
    with gr.Row():
        count = gr.Slider(
            1,
            MOST_IMAGES,
            4,
            step=1,
            label="Images",
            info="the classes in turn",
            elem_id=f"{key}-count",
            scale=3,
            min_width=160,
        )
        seed = gr.Number(
            0,
            precision=0,
            minimum=0,
            maximum=MOST_SEED,
            label="Seed",
            info="the same again",
            elem_id=f"{key}-seed",
            scale=2,
            min_width=100,
        )
    scale = gr.Slider(
        1,
        10,
        recommended,
        step=0.05,
        label="Guidance scale",
        info="1 is none; more keeps closer to the class",
        elem_id=f"{key}-scale",
    )
    with gr.Accordion("More settings", open=False, elem_id=f"{key}-more"):
        schedule = gr.Dropdown(
            ["constant", "linear", "power-cosine"],
            value="constant",
            label="Guidance schedule",
            info="alike for all tokens, or rising from 1 up to the scale",
            elem_id=f"{key}-schedule",
        )
        power = gr.Slider(0.25, 4, 1, step=0.05, label="Power of power-cosine", info="larger: guidance sets in later")
        temperature = gr.Slider(0.1, 2, 1, step=0.05, label="Temperature", elem_id=f"{key}-temperature")
        top_k = gr.Slider(
            0, weights.config.vocab_size, 0, step=1, label="Top-k", info="draw from the k likeliest tokens; 0 is all"
        )
        top_p = gr.Slider(
            0.05, 1, 1, step=0.01, label="Top-p", info="draw from the likeliest that hold p together; 1 is all"
        )
    return Fields(
        classes=classes, count=count, scale=scale, schedule=schedule, power=power, temperature=temperature, top_k=top_k,
        top_p=top_p, seed=seed,
    )  # fmt: skip


def order_from(setup: Setup, name: str, values: tuple[Any, ...]) -> tuple[list[int], SampleSettings]:
    """The labels and settings that the fields' values say.

    Raises:
        UserError: one of them is missing, of another type or out of range.
    """
    classes, count, *rest = values
    config = setup.shelf.find(name).config
    chosen = list(classes) if isinstance(classes, list | tuple) else []
    labels = choose_labels(chosen, whole(count, "the number of images", 1, MOST_IMAGES), config.num_classes)
    return labels, settings_from(*rest, vocab_size=config.vocab_size)


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
