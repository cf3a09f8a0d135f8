"""The tab Understand: a model's attention and uncertainty as it reads an image, and a probe's predictions."""

import math
from collections.abc import Callable, Generator
from functools import partial
from typing import Any

import numpy as np

from st_ar.demo import html, reading
from st_ar.demo.inputs import check_int, read_upload
from st_ar.demo.reading import NO_CLASS, OWN_CLASS, choose_label
from st_ar.demo.setup import DemoImage, Setup
from st_ar.demo.tabs import MODEL_QUEUE, UI_QUEUE, class_choices, gr, handler
from st_ar.errors import UserError
from st_ar.figures import line_chart

GENERATED, STORED, UPLOADED = "generated", "token store", "upload"
MEAN = 0
"""Choice of the average over the heads, beside the heads' numbers."""
LAST_GENERATED = 15
"""Largest index of a generated image."""
ANY_INDEX = 1 << 40


def understand_tab(setup: Setup, generated: Any) -> None:
    """Build the tab; `generated` is the visitor's state for the latest images, a list of `DemoImage`."""
    names = setup.pool.names
    config = setup.pool.find(names[0]).config
    store_size = len(setup.store) if setup.store is not None else 0
    last = store_size - 1 if store_size else LAST_GENERATED
    sources = [GENERATED, *([STORED] if store_size else []), UPLOADED]

    def load(source: Any, index: Any, path: Any, name: Any, latest: Any) -> tuple[Any, Any, Any]:
        if source == UPLOADED:
            image = setup.from_upload(read_upload(path), name)
        elif source == STORED:
            image = setup.from_store(check_int(index, "the image", 0, ANY_INDEX))
        elif not latest:
            raise UserError("there are no generated images: generate some in the first tab, or choose another source")
        else:
            image = latest[min(check_int(index, "the image", 0, ANY_INDEX), len(latest) - 1)]
        length = len(image.tokens)
        return image, gr.update(maximum=length - 1, value=length // 2), ""

    def label_for(image: DemoImage, name: Any, choice: Any) -> int:
        weights = setup.pool.find(name)
        return choose_label(choice, image.label, weights.config.null_class, has_null_class=weights.class_dropout != 0)

    def show(image: Any, name: Any, choice: Any, token: Any, layer: Any, head: Any) -> tuple[Any, ...]:
        if image is None:
            return (gr.skip(),) * 5
        config = setup.pool.find(name).config
        token = min(check_int(token, "the token", 0, config.sequence_length), len(image.tokens) - 1)
        layer = min(check_int(layer, "the layer", 1, ANY_INDEX), config.n_layers)
        head = min(check_int(head, "the head", MEAN, ANY_INDEX), config.n_heads)
        found = setup.read(name, image, label_for(image, name, choice))
        by_head = found.attention[layer - 1, :, token].astype(np.float32)
        weights = by_head.mean(0) if head == MEAN else by_head[head - 1]
        return (
            reading.mark_token(image.pixels, config.grid, token),
            reading.render_attention(image.pixels, weights, config.grid, token),
            reading.render_entropy(image.pixels, found.entropy, config.grid, token),
            reading.render_heads(found, config.grid, token, (layer, None if head == MEAN else head)),
            html.step_table(image, token, found, float(weights[0]), math.log(config.vocab_size)),
        )

    def predict(image: Any, name: Any) -> Generator[str, None, None]:
        if image is None:
            raise UserError("no image is shown: choose one and press Show")
        for prediction in setup.predict(name, image):
            if prediction.by_step:
                truth = setup.pool.find(name).class_names[image.label] if image.label is not None else None
                yield html.prediction_table(prediction, name, truth, len(image.tokens))
            else:
                progress = f"{prediction.fitted:,} of {prediction.total:,} images read"
                yield html.note(f"Fitting a probe to {name}, which is done once: {progress}.")

    def plot_entropy(image: Any, name: Any, choice: Any) -> str:
        if image is None:
            return ""
        entropy = setup.read(name, image, label_for(image, name, choice)).entropy
        drawing = line_chart(
            {name: (list(map(float, range(len(entropy)))), entropy.tolist())},
            name="entropy by token", x="token", y="entropy (nats)", markers=False,
        )  # fmt: skip
        return html.chart(
            drawing.svg(), f"Entropy of {name} for each token, {float(entropy.mean()):.3f} nats on average."
        )

    def click_token(name: Any, event: Any) -> int:
        return reading.token_at(*_click_position(event), setup.pool.find(name).config.grid)

    def click_head(name: Any, event: Any) -> tuple[int, int]:
        config = setup.pool.find(name).config
        layer, head = reading.head_at(*_click_position(event), config.grid, config.n_heads)
        return min(layer, config.n_layers), min(head, config.n_heads)

    def update_source(source: Any) -> tuple[Any, Any]:
        largest = last if source == STORED else LAST_GENERATED
        return gr.update(visible=source != UPLOADED, maximum=largest, value=0), gr.update(visible=source == UPLOADED)

    image = gr.State(None)
    with gr.Row():
        with gr.Column(scale=1, min_width=300):
            source = gr.Radio(sources, value=sources[-2], label="Image source", elem_id="understand-source")
            index = gr.Slider(0, last, 0, step=1, label="Image index", elem_id="understand-index")
            file = gr.File(label="Image file", type="filepath", height=140, visible=False, elem_id="understand-file")
            go = gr.Button("Show", variant="primary", elem_id="understand-show")
            weights = gr.Dropdown(names, value=names[0], label="Weights", elem_id="understand-weights")
            choice = gr.Dropdown(
                _label_choices(setup, names[0]), value=OWN_CLASS, label="Class given to the model", filterable=True
            )
            token = gr.Slider(
                0, config.sequence_length - 1, config.sequence_length // 2, step=1, label="Token",
                info="or click on one in an image", elem_id="understand-token",
            )  # fmt: skip
            with gr.Row():
                layer = gr.Slider(
                    1, config.n_layers, max(1, config.n_layers // 2), step=1, label="Layer", min_width=140,
                    elem_id="understand-layer",
                )  # fmt: skip
                head = gr.Dropdown(
                    _head_choices(config.n_heads), value=MEAN, label="Head", min_width=120, elem_id="understand-head"
                )
            numbers = gr.HTML(html.note("Choose an image and press Show."), elem_id="understand-words")
        with gr.Column(scale=2, min_width=300):
            with gr.Row():
                marked = _add_image("Image: click on a token", "understand-picture")
                attention = _add_image("Attention when this token is predicted", "understand-attention")
            with gr.Row():
                entropy = _add_image("Entropy of each token", "understand-entropy")
                heads = _add_image("Layers (rows) and heads (columns): click on one", "understand-overview")
            legend = (
                "Blue frame: the predicted token. White frame: the last token read. Brighter means more attention or higher "
                "entropy. Each map has its own scale."
            )
            gr.HTML(html.note(legend))
            with gr.Accordion("Entropy by token", open=False):
                curve = gr.HTML("", elem_id="understand-curve")
    has_probe = setup.probe_store is not None
    with gr.Row():
        ask = gr.Button("Predict the class with a probe", elem_id="understand-ask", interactive=has_probe)
    hint = "" if has_probe else html.note("Start the demo with --probe-tokens STORE to use a probe.")
    predictions = gr.HTML(hint, elem_id="understand-guesses")

    inputs = [image, weights, choice, token, layer, head]
    outputs = [marked, attention, entropy, heads, numbers]
    source.change(handler(update_source), [source], [index, file], **UI_QUEUE)
    loaded = gr.on(
        [go.click, file.upload], handler(load), [source, index, file, weights, generated], [image, token, predictions],
        show_progress_on=[numbers], **MODEL_QUEUE,
    )  # fmt: skip
    changed = weights.change(
        handler(partial(update_choices, setup)), [weights, choice, layer, head], [choice, layer, head], **UI_QUEUE
    )
    triggers = [loaded.success, changed.success, choice.input, token.input, layer.input, head.input]
    triggers += [
        clickable.select(_with_event(click_token), [weights], [token], **UI_QUEUE).success
        for clickable in (marked, attention, entropy)
    ]
    triggers.append(heads.select(_with_event(click_head), [weights], [layer, head], **UI_QUEUE).success)
    for trigger in triggers:
        trigger(handler(show), inputs, outputs, trigger_mode="always_last", show_progress_on=[numbers], **MODEL_QUEUE)
    for trigger in (loaded.success, changed.success, choice.input):
        trigger(handler(plot_entropy), [image, weights, choice], [curve], **MODEL_QUEUE | {"show_progress": "hidden"})
    ask.click(handler(predict), [image, weights], [predictions], **MODEL_QUEUE)


def update_choices(setup: Setup, name: Any, choice: Any, layer: Any, head: Any) -> tuple[Any, Any, Any]:
    """Return the class, layer and head fields for other weights. Chosen values that they have stay chosen."""
    config = setup.pool.find(name).config
    classes = _label_choices(setup, name)
    return (
        gr.update(choices=classes, value=choice if choice in [label for _, label in classes] else OWN_CLASS),
        gr.update(maximum=config.n_layers, value=min(check_int(layer, "the layer", 1, ANY_INDEX), config.n_layers)),
        gr.update(
            choices=_head_choices(config.n_heads),
            value=head if check_int(head, "the head", MEAN, ANY_INDEX) <= config.n_heads else MEAN,
        ),
    )


def _with_event(work: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """Return a handler that gets the event too. Gradio finds the argument by its type."""
    work.__annotations__["event"] = gr.SelectData
    return handler(work)


def _click_position(event: Any) -> tuple[int, int]:
    """The pixel of a click on an image."""
    position = getattr(event, "index", None)
    if not isinstance(position, list | tuple) or len(position) != 2:
        raise UserError("the click has no position: click inside an image")
    x, y = (check_int(value, "the position of the click", 0, 1 << 20) for value in position)
    return x, y


def _add_image(caption: str, key: str) -> Any:
    """Add a clickable image below its caption. Gradio's own labels would cover tokens."""
    with gr.Column(min_width=200):
        gr.HTML(html.note(caption))
        return gr.Image(
            show_label=False, type="numpy", image_mode="RGBA", format="png", interactive=False, buttons=[],
            elem_id=key, elem_classes=["pixels"], alt_text=caption,
        )  # fmt: skip


def _label_choices(setup: Setup, name: str) -> list[tuple[str, int]]:
    none = [] if setup.pool.find(name).class_dropout == 0 else [("none", NO_CLASS)]
    return [("the image's class", OWN_CLASS), *none, *class_choices(setup, name)]


def _head_choices(heads: int) -> list[tuple[str, int]]:
    return [("average", MEAN), *((str(head), head) for head in range(1, heads + 1))]
