"""What the tabs share: Gradio itself, handlers whose errors are told, and the fields that say how to draw."""

from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import wraps
from html import escape
from importlib import import_module
from inspect import isgeneratorfunction
from typing import Any

from st_ar.demo.drawing import choose_labels
from st_ar.demo.inputs import MOST_SEED, settings_from, whole
from st_ar.demo.recipe import MOST_IMAGES
from st_ar.demo.setup import Setup
from st_ar.errors import UserError
from st_ar.sample_config import SampleSettings

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
