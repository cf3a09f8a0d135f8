"""The tabs Generate and Compare, and what all tabs share: Gradio, queues, error messages and the sampling fields."""

import os
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial, wraps
from html import escape
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
from st_ar.errors import UserError, require

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # these are read when Gradio is imported
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["GRADIO_ANALYTICS_CACHE_FREQUENCY"] = str(1 << 31)  # never compute statistics that are not shown
gr: Any = require("gradio")
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
    numbered = (label if names.count(label) == 1 else f"{label} ({index})" for index, label in enumerate(names))
    empty = setup.pool.find(name).empty_classes
    return [
        (f"{label} (no training images)" if index in empty else label, index) for index, label in enumerate(numbered)
    ]


def add_fields(setup: Setup, name: str, key: str) -> list[Any]:
    """Add the sampling fields for some weights, in the order of `read_fields`; `key` starts their element IDs."""
    weights = setup.pool.find(name)
    default = SampleSettings().resolved(weights.config, weights.class_dropout)
    choices = class_choices(setup, name)
    classes = gr.Dropdown(
        choices,
        value=[index for _, index in choices if index not in weights.empty_classes][:4],
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
            0, precision=0, minimum=0, maximum=MAX_SEED, label="Seed", info="same seed, same images", elem_id=f"{key}-seed",
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
            info="constant, or rising from 1 to the guidance scale",
            elem_id=f"{key}-schedule",
        )
        power = gr.Slider(
            0.25, 4, 1, step=0.05, label="Exponent of power-cosine", info="higher values start guidance later"
        )
        temperature = gr.Slider(0.1, 2, 1, step=0.05, label="Temperature", elem_id=f"{key}-temperature")
        top_k = gr.Slider(
            0,
            weights.config.vocab_size,
            0,
            step=1,
            label="Top-k",
            info="sample from the k most likely tokens; 0 is off",
        )
        top_p = gr.Slider(
            0.05,
            1,
            1,
            step=0.01,
            label="Top-p",
            info="sample from the most likely tokens with total probability p; 1 is off",
        )
    return [classes, count, scale, schedule, power, temperature, top_k, top_p, seed]


def read_fields(setup: Setup, name: str, values: tuple[Any, ...]) -> tuple[list[int], SampleSettings]:
    """Return the labels and the settings in the sampling fields; UserError if a value is not allowed."""
    classes, count, *rest = values
    config = setup.pool.find(name).config
    chosen = list(classes) if isinstance(classes, list | tuple) else []
    labels = choose_labels(chosen, check_int(count, "the number of images", 1, MAX_IMAGES), config.num_classes)
    return labels, read_settings(*rest, vocab_size=config.vocab_size)


def add_panel(
    setup: Setup, key: str, sides: Sequence[str], hint: str, states: Sequence[Any] = ()
) -> tuple[list[Any], Any]:
    """Add fields, buttons and images of one or two models; return the fields of weights and of classes.

    Args:
        key: start of the element IDs.
        sides: labels of the fields of weights.
        hint: shown before the first image.
        states: get the finished images of the first model, a list of `DemoImage`.
    """

    def generate(*values: Any) -> Generator[tuple[Any, ...], None, None]:
        chosen = values[: len(sides)]
        (labels, settings), *_ = [read_fields(setup, name, values[len(sides) :]) for name in chosen]
        classes = [setup.pool.find(chosen[0]).class_names[label] for label in labels]
        for frames in generate_frames(setup.pool, chosen, labels, settings):
            latest: Any = gr.skip()
            if (tokens := frames[0].tokens) is not None:
                titles = [f"image {index} generated by {chosen[0]}: {name}" for index, name in enumerate(classes)]
                parts = zip(titles, tokens, labels, frames[0].images, strict=True)
                latest = [DemoImage(title=t, tokens=row, label=label, pixels=p) for t, row, label, p in parts]
            yield html.status(frames), html.gallery(frames, chosen, classes), *[latest] * len(states)

    names = setup.pool.names
    with gr.Row():
        with gr.Column(scale=1, min_width=300):
            with gr.Row():
                weights = [
                    gr.Dropdown(names, value=value, label=label, elem_id=f"{key}-{label.lower()}", min_width=120)
                    for label, value in zip(sides, [*names, names[0]], strict=False)
                ]
            fields = add_fields(setup, names[0], key)
            with gr.Row():
                action = "Generate" if len(sides) == 1 else "Generate both"
                go = gr.Button(action, variant="primary", elem_id=f"{key}-go", min_width=120)
                stop = gr.Button("Stop", elem_id=f"{key}-stop", min_width=80)
        with gr.Column(scale=2, min_width=300):
            status = gr.HTML("", elem_id=f"{key}-status", min_height=48)
            images = gr.HTML(html.note(hint), elem_id=f"{key}-pictures")
    event = go.click(
        handler(generate), [*weights, *fields], [status, images, *states], show_progress_on=[status], **MODEL_QUEUE
    )
    stop.click(None, cancels=[event], api_visibility="private")
    return weights, fields[0]


def generate_tab(setup: Setup, generated: Any) -> None:
    """Build the tab; `generated` is the visitor's state for the latest images, a list of `DemoImage`."""

    def regenerate(path: Any) -> Generator[tuple[Any, Any], None, None]:
        data = read_upload(path)
        record = read_record(data)
        saved = np.asarray(decode_upload(data))
        name = setup.pool.run(lambda: match_weights(setup.pool, record))
        index = record.number
        for [frame] in generate_frames(setup.pool, [name], record.labels, record.settings):
            status = html.status([frame])
            if frame.tokens is not None:
                verdict = compare_images(frame.images[index], saved, record, setup.pool)
                status = html.note(f"{verdict} Generated by {name}, {record.in_words()}.")
            one = replace(frame, images=frame.images[index : index + 1], records=frame.records[index : index + 1])
            yield status, html.gallery([one], [name], [record.class_name])

    hint = "Choose classes and press Generate. The images appear here, token by token."
    [weights], classes = add_panel(setup, "generate", ["Weights"], hint, [generated])
    with gr.Accordion("Reproduce a saved image", open=False, elem_id="again"):
        hint = "Drop a PNG saved from the demo. It is generated again from its settings and compared bit for bit."
        gr.HTML(html.note(hint))
        file = gr.File(file_types=[".png"], type="filepath", label="A saved PNG", height=140, elem_id="again-file")
        again_status = gr.HTML("", elem_id="again-status", min_height=32)
        again_image = gr.HTML("", elem_id="again-picture")

    weights.change(handler(partial(update_classes, setup)), [weights, classes], [classes], **UI_QUEUE)
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
    hint = "Both models generate the same classes with the same random numbers, token by token."
    add_panel(setup, "compare", ["Left", "Right"], hint)
    if len(setup.pool.names) < 2:
        alone = "There is only one set of weights: start the demo with two models, or a run that has EMA weights."
        gr.HTML(html.note(alone))
