"""The tabs Generate and Compare, and what all tabs share: Gradio, queues, error messages and the sampling fields."""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial, wraps
from html import escape
from importlib import import_module
from inspect import isgeneratorfunction
from typing import Any

import numpy as np

from st_ar.config import SampleSettings
from st_ar.demo import html
from st_ar.demo.generation import (
    MAX_IMAGES,
    choose_labels,
    compare_images,
    generate_frames,
    match_weights,
    read_record,
)
from st_ar.demo.inputs import MAX_SEED, check_int, decode_upload, read_settings, read_upload
from st_ar.demo.setup import DemoImage, Setup
from st_ar.errors import UserError

gr: Any = import_module("gradio")
"""Gradio. It has no types for most of what is used here."""
MODEL_QUEUE = {"concurrency_id": "models", "concurrency_limit": 1, "api_visibility": "private"}
"""Events that compute with models: one runs at a time, and visitors see their place in the queue."""
FILE_QUEUE = {"concurrency_id": "files", "concurrency_limit": 2, "api_visibility": "private", "show_progress": "hidden"}
"""Events that only read files."""
UI_QUEUE = {"concurrency_id": "page", "concurrency_limit": 8, "api_visibility": "private", "show_progress": "hidden"}
"""Events that only update fields."""
CLASSES_SHOWN = 100
"""Classes in the list before a search."""


@contextmanager
def shown_errors() -> Generator[None]:
    """Turn a UserError in the block into a message in the demo."""
    try:
        yield
    except UserError as error:
        raise gr.Error(escape(str(error)), print_exception=False) from None


def handler(work: Callable[..., Any]) -> Callable[..., Any]:
    """Return an event handler whose UserErrors become messages in the demo."""
    if not isgeneratorfunction(work):
        return shown_errors()(work)

    @wraps(work)
    def generate(*values: Any) -> Generator[Any, None, None]:
        with shown_errors():
            yield from work(*values)

    return generate


def class_choices(setup: Setup, name: str) -> list[tuple[str, int]]:
    """Return the classes of some weights by name, with their numbers where two names are the same."""
    names = setup.pool.find(name).class_names
    return [(label if names.count(label) == 1 else f"{label} ({index})", index) for index, label in enumerate(names)]


def add_fields(setup: Setup, name: str, key: str) -> list[Any]:
    """Add the sampling fields for some weights, in the order of `read_fields`; `key` starts their element IDs."""
    weights = setup.pool.find(name)
    default = SampleSettings().resolved(weights.config, None if weights.has_null_class else 0.0)
    choices = class_choices(setup, name)
    classes = gr.Dropdown(
        choices,
        value=[index for _, index in choices[:4]],
        multiselect=True,
        filterable=True,
        max_choices=MAX_IMAGES,
        num_choices_shown=CLASSES_SHOWN,
        label=f"Classes ({len(choices):,}; type to search)",
        elem_id=f"{key}-classes",
    )
    with gr.Row():
        count = gr.Slider(
            *(1, MAX_IMAGES, 4), step=1, label="Images", info="classes repeat in order", elem_id=f"{key}-count",
            scale=3, min_width=160,
        )  # fmt: skip
        seed = gr.Number(
            0, precision=0, minimum=0, maximum=MAX_SEED, label="Seed", info="fixes the images", elem_id=f"{key}-seed",
            scale=2, min_width=100,
        )  # fmt: skip
    scale = gr.Slider(
        *(1, 10, default.cfg_scale),
        step=0.05,
        label="Guidance scale",
        info="1 is no guidance; higher values follow the class more closely",
        elem_id=f"{key}-scale",
    )
    with gr.Accordion("More settings", open=False, elem_id=f"{key}-more"):
        schedule = gr.Dropdown(
            ["constant", "linear", "power-cosine"],
            value="constant",
            label="Guidance schedule",
            info="constant, or rising over the tokens from 1 to the scale",
            elem_id=f"{key}-schedule",
        )
        power = gr.Slider(0.25, 4, 1, step=0.05, label="Power of power-cosine", info="higher: guidance starts later")
        temperature = gr.Slider(0.1, 2, 1, step=0.05, label="Temperature", elem_id=f"{key}-temperature")
        top_k = gr.Slider(
            0,
            weights.config.vocab_size,
            0,
            step=1,
            label="Top-k",
            info="sample from the k most likely tokens; 0 is all",
        )
        top_p = gr.Slider(
            0.05,
            1,
            1,
            step=0.01,
            label="Top-p",
            info="sample from the top tokens with probability p in total; 1 is all",
        )
    return [classes, count, scale, schedule, power, temperature, top_k, top_p, seed]


def read_fields(setup: Setup, name: str, values: tuple[Any, ...]) -> tuple[list[int], SampleSettings]:
    """Return the labels and the settings in the sampling fields; UserError if a value is not allowed."""
    classes, count, *rest = values
    config = setup.pool.find(name).config
    chosen = list(classes) if isinstance(classes, list | tuple) else []
    labels = choose_labels(chosen, check_int(count, "the number of images", 1, MAX_IMAGES), config.num_classes)
    return labels, read_settings(*rest, vocab_size=config.vocab_size)


def generate_tab(setup: Setup, generated: Any) -> None:
    """Build the tab; `generated` is the visitor's state for the latest images, a list of `DemoImage`."""
    names = setup.pool.names

    def generate(name: str, *values: Any) -> Generator[tuple[Any, Any, Any], None, None]:
        labels, settings = read_fields(setup, name, values)
        classes = [setup.pool.find(name).class_names[label] for label in labels]
        for [frame] in generate_frames(setup.pool, [name], labels, settings):
            images: Any = gr.skip()
            if frame.tokens is not None:
                images = [
                    DemoImage(
                        title=f"image {index} generated by {name}: {classes[index]}",
                        tokens=frame.tokens[index],
                        label=label,
                        pixels=frame.images[index],
                    )
                    for index, label in enumerate(labels)
                ]
            yield html.status(frame), html.gallery(frame, classes, name), images

    def regenerate(path: Any) -> Generator[tuple[Any, Any], None, None]:
        data = read_upload(path)
        record = read_record(data)
        saved = np.asarray(decode_upload(data))
        name = setup.pool.run(lambda: match_weights(setup.pool, record))
        index = record.number
        for [frame] in generate_frames(setup.pool, [name], record.labels, record.settings):
            status = html.status(frame)
            if frame.tokens is not None:
                verdict = compare_images(frame.images[index], saved, record, setup.pool)
                status = html.note(f"{verdict} Generated by {name}, {html.describe_record(record)}.")
            one = replace(frame, images=frame.images[index : index + 1], records=frame.records[index : index + 1])
            yield status, html.gallery(one, [record.class_name], name)

    with gr.Row():
        with gr.Column(scale=1, min_width=300):
            weights = gr.Dropdown(names, value=names[0], label="Weights", elem_id="generate-weights")
            fields = add_fields(setup, names[0], "generate")
            with gr.Row():
                go = gr.Button("Generate", variant="primary", elem_id="generate-go", min_width=120)
                stop = gr.Button("Stop", elem_id="generate-stop", min_width=80)
        with gr.Column(scale=2, min_width=300):
            status = gr.HTML("", elem_id="generate-status", min_height=48)
            empty = html.note("Choose classes and press Generate. The images appear here, token by token.")
            images = gr.HTML(empty, elem_id="generate-pictures")
    with gr.Accordion("Reproduce a saved image", open=False, elem_id="again"):
        gr.HTML(
            html.note(
                "Drop a PNG saved from the demo. It is generated again from its settings and compared bit for bit."
            )
        )
        file = gr.File(file_types=[".png"], type="filepath", label="A saved PNG", height=140, elem_id="again-file")
        again_status = gr.HTML("", elem_id="again-status", min_height=32)
        again_image = gr.HTML("", elem_id="again-picture")

    event = go.click(
        handler(generate), [weights, *fields], [status, images, generated], show_progress_on=[status], **MODEL_QUEUE
    )
    stop.click(None, cancels=[event], api_visibility="private")
    weights.change(handler(partial(update_classes, setup)), [weights, fields[0]], [fields[0]], **UI_QUEUE)
    file.upload(
        handler(regenerate), [file], [again_status, again_image], show_progress_on=[again_status], **MODEL_QUEUE
    )


def update_classes(setup: Setup, name: str, classes: Any) -> Any:
    """Return the class field for other weights. Chosen classes that they have stay chosen."""
    choices = class_choices(setup, name)
    known = [label for _, label in choices]
    return gr.update(choices=choices, value=[label for label in classes or [] if label in known])


def compare_tab(setup: Setup) -> None:
    """Build the tab."""
    names = setup.pool.names

    def generate(first: str, second: str, *values: Any) -> Generator[tuple[Any, Any], None, None]:
        labels, settings = read_fields(setup, first, values)
        read_fields(setup, second, values)
        classes = [setup.pool.find(first).class_names[label] for label in labels]
        for frames in generate_frames(setup.pool, [first, second], labels, settings):
            yield html.status(frames[0], models=2), html.side_by_side(frames, [first, second], classes)

    with gr.Row():
        with gr.Column(scale=1, min_width=300):
            with gr.Row():
                left = gr.Dropdown(names, value=names[0], label="Left", elem_id="compare-left", min_width=120)
                right = gr.Dropdown(names, value=names[:2][-1], label="Right", elem_id="compare-right", min_width=120)
            fields = add_fields(setup, names[0], "compare")
            with gr.Row():
                go = gr.Button("Generate both", variant="primary", elem_id="compare-go", min_width=120)
                stop = gr.Button("Stop", elem_id="compare-stop", min_width=80)
        with gr.Column(scale=2, min_width=300):
            status = gr.HTML("", elem_id="compare-status", min_height=48)
            empty = html.note("Both models generate the same classes with the same random numbers, token by token.")
            images = gr.HTML(empty, elem_id="compare-pictures")
    if len(names) < 2:
        gr.HTML(
            html.note(
                "There is only one set of weights: start the demo with two models, or a run that has EMA weights."
            )
        )
    event = go.click(
        handler(generate), [left, right, *fields], [status, images], show_progress_on=[status], **MODEL_QUEUE
    )
    stop.click(None, cancels=[event], api_visibility="private")
