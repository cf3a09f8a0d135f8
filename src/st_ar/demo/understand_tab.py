"""The tab that shows what a model does as it reads an image: attention, uncertainty, and what a probe takes it for."""

import math
from collections.abc import Callable, Generator
from typing import Any

import numpy as np

from st_ar.demo import html
from st_ar.demo import reading as maps
from st_ar.demo.inputs import read_upload, whole
from st_ar.demo.reading import NONE, OWN, label_given
from st_ar.demo.setup import Setup
from st_ar.demo.tabs import AT_ONCE, QUEUE, class_choices, gr, told
from st_ar.errors import UserError
from st_ar.figures import line_chart

DRAWN, STORED, UPLOADED = "drawn here", "token store", "upload"
MEAN = 0
"""Choice of the head, beside their numbers: the average of all."""


def understand_tab(setup: Setup, drawn: Any) -> None:
    """Build the tab; `drawn` is the visitor's state with the images drawn last, a list of `Seen`."""
    names = setup.shelf.names
    config = setup.shelf.find(names[0]).config
    sources = [DRAWN, *([STORED] if setup.store is not None else []), UPLOADED]

    def load(source: Any, index: Any, path: Any, name: Any, last: Any) -> tuple[Any, Any, Any]:
        if source == UPLOADED:
            seen = setup.from_upload(read_upload(path), name)
        elif source == STORED:
            seen = setup.from_store(whole(index, "the image", 0, 1 << 40))
        elif not last:
            raise UserError("nothing is drawn yet: draw images in the first tab, or choose another source")
        else:
            seen = last[min(whole(index, "the image", 0, 1 << 40), len(last) - 1)]
        length = len(seen.tokens)
        return seen, gr.update(maximum=length - 1, value=length // 2), ""

    def look(seen: Any, name: Any, given: Any, token: Any, layer: Any, head: Any) -> tuple[Any, ...]:
        if seen is None:
            return (gr.skip(),) * 5
        weights = setup.shelf.find(name)
        shape = weights.config
        token = min(whole(token, "the token", 0, shape.sequence_length), len(seen.tokens) - 1)
        layer = min(whole(layer, "the layer", 1, 1 << 10), shape.n_layers)
        head = min(whole(head, "the head", MEAN, 1 << 16), shape.n_heads)
        label = label_given(given, seen.label, shape.null_class, knows_none=weights.knows_no_class)
        reading = setup.read(name, seen, label)
        rows = reading.attention[layer - 1, :, token].astype(np.float32)
        row = rows.mean(0) if head == MEAN else rows[head - 1]
        most = math.log(shape.vocab_size)
        return (
            maps.marked(seen.picture, shape.grid, token),
            maps.attention_map(seen.picture, row, shape.grid, token),
            maps.entropy_map(seen.picture, reading.entropy, shape.grid, token),
            maps.heads_overview(reading, shape.grid, token, (layer, None if head == MEAN else head)),
            html.step_words(seen, token, reading, float(row[0]), most),
        )

    def guess(seen: Any, name: Any) -> Generator[str, None, None]:
        if seen is None:
            raise UserError("no image is chosen: show one first")
        for sofar in setup.guess(name, seen):
            if not sofar.by_step:
                yield html.note(
                    f"Fitting a quick probe to {name}, once: {sofar.read:,} of {sofar.total:,} images read."
                )
                continue
            truth = setup.shelf.find(name).class_names[seen.label] if seen.label is not None else None
            yield html.guess_table(sofar, name, truth, len(seen.tokens))

    def curve(seen: Any, name: Any, given: Any) -> str:
        if seen is None:
            return ""
        weights = setup.shelf.find(name)
        shape = weights.config
        label = label_given(given, seen.label, shape.null_class, knows_none=weights.knows_no_class)
        entropy = setup.read(name, seen, label).entropy
        drawing = line_chart(
            {name: (list(map(float, range(len(entropy)))), entropy.tolist())},
            name="entropy by token", x="token", y="entropy (nats)", markers=False,
        )  # fmt: skip
        return html.chart(
            drawing.svg(), f"How unsure {name} is of each token; its mean is {float(entropy.mean()):.3f} nats."
        )

    def other_weights(name: Any, given: Any, layer: Any, head: Any) -> tuple[Any, Any, Any]:
        return still_there(setup, name, given, layer, head)

    def on_token(name: Any, event: Any) -> int:
        return maps.token_at(*_place(event), setup.shelf.find(name).config.grid)

    def on_head(name: Any, event: Any) -> tuple[int, int]:
        shape = setup.shelf.find(name).config
        layer, head = maps.head_at(*_place(event), shape.grid, shape.n_heads)
        return min(layer, shape.n_layers), min(head, shape.n_heads)

    def other_source(source: Any) -> tuple[Any, Any]:
        most = len(setup.store) - 1 if source == STORED and setup.store is not None else 15
        return gr.update(visible=source != UPLOADED, maximum=most, value=0), gr.update(visible=source == UPLOADED)

    chosen = gr.State(None)
    with gr.Row():
        with gr.Column(scale=1, min_width=300):
            source = gr.Radio(sources, value=sources[-2], label="Image from", elem_id="understand-source")
            most = len(setup.store) - 1 if setup.store is not None else 15
            index = gr.Slider(0, most, 0, step=1, label="Which image", elem_id="understand-index")
            file = gr.File(label="An image", type="filepath", height=140, visible=False, elem_id="understand-file")
            show = gr.Button("Show", variant="primary", elem_id="understand-show")
            weights = gr.Dropdown(names, value=names[0], label="Weights", elem_id="understand-weights")
            given = gr.Dropdown(
                _given_choices(setup, names[0]), value=OWN, label="Class that the model is given", filterable=True
            )
            token = gr.Slider(
                0, config.sequence_length - 1, config.sequence_length // 2, step=1, label="Token",
                info="or click on one in a picture", elem_id="understand-token",
            )  # fmt: skip
            with gr.Row():
                layer = gr.Slider(
                    1,
                    config.n_layers,
                    max(1, config.n_layers // 2),
                    step=1,
                    label="Layer",
                    min_width=140,
                    elem_id="understand-layer",
                )
                head = gr.Dropdown(
                    _head_choices(config.n_heads), value=MEAN, label="Head", min_width=120, elem_id="understand-head"
                )
            words = gr.HTML(html.note("Choose an image and press Show."), elem_id="understand-words")
        with gr.Column(scale=2, min_width=300):
            with gr.Row():
                picture = _picture("The image: click on a token", "understand-picture")
                attention = _picture("What the step that predicts it looks at", "understand-attention")
            with gr.Row():
                entropy = _picture("How unsure the model is of each token", "understand-entropy")
                overview = _picture("Heads (columns), layers (rows): click on one", "understand-overview")
            gr.HTML(
                html.note(
                    "Blue frame: the token that is predicted. White frame: the newest that was read. Brighter: more weight, or more "
                    "entropy; each map on its own scale."
                )
            )
            with gr.Accordion("Entropy over the image", open=False):
                curves = gr.HTML("", elem_id="understand-curve")
    with gr.Row():
        ask = gr.Button(
            "What does a probe take it for?", elem_id="understand-ask", interactive=setup.probe_store is not None
        )
    missing = (
        "" if setup.probe_store is not None else html.note("Start the page with --probe-tokens STORE to ask a probe.")
    )
    guesses = gr.HTML(missing, elem_id="understand-guesses")

    seeing = [chosen, weights, given, token, layer, head]
    shown = [picture, attention, entropy, overview, words]
    source.change(told(other_source), [source], [index, file], **AT_ONCE)
    loaded = gr.on(
        [show.click, file.upload], told(load), [source, index, file, weights, drawn], [chosen, token, guesses],
        show_progress_on=[words], **QUEUE,
    )  # fmt: skip
    changed = weights.change(told(other_weights), [weights, given, layer, head], [given, layer, head], **AT_ONCE)
    triggers = [loaded.success, changed.success, given.input, token.input, layer.input, head.input]
    for pixels in (picture, attention, entropy):
        clicked = pixels.select(told(_with_event(on_token)), [weights], [token], **AT_ONCE)
        triggers.append(clicked.success)
    triggers.append(overview.select(told(_with_event(on_head)), [weights], [layer, head], **AT_ONCE).success)
    for trigger in triggers:
        trigger(told(look), seeing, shown, trigger_mode="always_last", show_progress_on=[words], **QUEUE)
    for trigger in (loaded.success, changed.success, given.input):
        trigger(told(curve), [chosen, weights, given], [curves], **QUEUE | {"show_progress": "hidden"})
    ask.click(told(guess), [chosen, weights], [guesses], **QUEUE)


def still_there(setup: Setup, name: Any, given: Any, layer: Any, head: Any) -> tuple[Any, Any, Any]:
    """The classes, layers and heads of other weights, of which the chosen ones stay as far as they have them."""
    shape = setup.shelf.find(name).config
    classes = _given_choices(setup, name)
    return (
        gr.update(choices=classes, value=given if given in [label for _, label in classes] else OWN),
        gr.update(maximum=shape.n_layers, value=min(whole(layer, "the layer", 1, 1 << 10), shape.n_layers)),
        gr.update(
            choices=_head_choices(shape.n_heads),
            value=head if whole(head, "the head", MEAN, 1 << 16) <= shape.n_heads else MEAN,
        ),
    )


def _with_event(work: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """A handler that is given the event too: Gradio knows it by the type of the argument."""

    def handler(name: Any, event: Any) -> Any:
        return work(name, event)

    handler.__annotations__["event"] = gr.SelectData
    return handler


def _place(event: Any) -> tuple[int, int]:
    """Where a picture was clicked on, in its own pixels."""
    place = getattr(event, "index", None)
    if not isinstance(place, list | tuple) or len(place) != 2:
        raise UserError("the click has no place: click inside a picture")
    x, y = (whole(value, "the place of the click", 0, 1 << 20) for value in place)
    return x, y


def _picture(caption: str, key: str) -> Any:
    """A picture that can be clicked on, under its caption: Gradio's own labels would cover tokens."""
    with gr.Column(min_width=200):
        gr.HTML(html.note(caption))
        return gr.Image(
            show_label=False,
            type="numpy",
            image_mode="RGBA",
            format="png",
            interactive=False,
            buttons=[],
            elem_id=key,
            elem_classes=["pixels"],
            alt_text=caption,
        )


def _given_choices(setup: Setup, name: str) -> list[tuple[str, int]]:
    own = [("the image's own", OWN)]
    none = [("none", NONE)] if setup.shelf.find(name).knows_no_class else []
    return [*own, *none, *class_choices(setup, name)]


def _head_choices(heads: int) -> list[tuple[str, int]]:
    return [("average", MEAN), *((str(head), head) for head in range(1, heads + 1))]
