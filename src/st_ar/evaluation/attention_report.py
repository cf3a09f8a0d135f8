"""`st-ar attention`: maps, statistics and their HTML report."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from st_ar.config import ModelConfig
from st_ar.data.store import TokenStore
from st_ar.errors import UserError, require
from st_ar.evaluation.attention import (
    NO_MASKS,
    STATISTICS,
    Averaged,
    ImageMasks,
    LayerStatistics,
    attention_steps,
    average_statistics,
    center_crops,
    require_between,
    store_maps,
)
from st_ar.figures import Drawing, attention_figure, line_chart
from st_ar.files import atomic_folder, require_absent, require_place, write_csv, write_json
from st_ar.hardware import choose_device
from st_ar.model.transformer import Transformer
from st_ar.model.weights import EvalModel, check_store, open_eval_models
from st_ar.progress import progress
from st_ar.report import Chart, Section, Table, write_report
from st_ar.tokenizer import decode_to_images, open_tokenizer


@dataclass(frozen=True, kw_only=True)
class AttentionOptions:
    """The maps to draw, and the images to average over."""

    layers: tuple[int, ...] = ()
    """Layers to draw, counted from 1. The default is half the depth of the shallowest model."""
    heads: tuple[str, ...] = ("mean",)
    """Heads to draw: mean, numbers counted from 1, or all."""
    steps: tuple[int, ...] = ()
    """Numbers of tokens read. The default is `attention_steps`."""
    images: tuple[int, ...] = (0, 1, 2)
    """Images of the store to draw."""
    average: int = 256
    """Images to average over, evenly spaced in the store; all if it has fewer."""
    masks: ImageMasks = NO_MASKS

    def resolved(self, configs: Mapping[str, ModelConfig], store: TokenStore) -> "AttentionOptions":
        """Fill in the defaults and remove repeated values. Layers and steps ascend."""
        length = store.meta.grid**2
        layers = self.layers or (max(1, min(config.n_layers for config in configs.values()) // 2),)
        every = [str(number) for number in range(1, max(config.n_heads for config in configs.values()) + 1)]
        heads = tuple(dict.fromkeys(h for word in self.heads for h in (every if word == "all" else [_head(word)])))
        steps = self.steps or tuple(attention_steps(length))
        for name, config in configs.items():
            require_between("layer", layers, 1, config.n_layers, f"{name} has layers")
            numbers = [int(head) for head in heads if head != "mean"]
            require_between("head", numbers, 1, config.n_heads, f"{name} has heads")
        require_between("step", steps, 1, length - 1, "maps can be drawn after reading")
        require_between("image", self.images, 0, len(store) - 1, f"{store.folder} has images")
        if not heads or not self.images or self.average < 1:
            raise UserError("--heads, --images and --average must each ask for at least one")
        return replace(
            self,
            layers=tuple(sorted(set(layers))),
            heads=heads,
            steps=tuple(sorted(set(steps))),
            images=tuple(dict.fromkeys(self.images)),
            average=min(self.average, len(store)),
        )


def _head(word: str) -> str:
    if word != "mean" and not word.removeprefix("-").isdecimal():
        raise UserError(f"--heads {word!r} is not a head: give mean, numbers counted from 1, or all")
    return word if word == "mean" else str(int(word))


def report_attention(
    paths: Sequence[Path],
    tokens: Path,
    tokenizer: Path,
    out: Path,
    options: AttentionOptions | None = None,
    *,
    names: Sequence[str] = (),
    ema: bool = False,
    device: str = "auto",
) -> dict[str, dict[int, LayerStatistics]]:
    """Write the attention maps and statistics of models, and attention.html, to the folder `out`.

    Args:
        tokens: the store whose centre crops are read.
        names: names of the models; by default from their paths, with "(EMA)" for EMA weights.

    Returns:
        The statistics by model and layer.

    Raises:
        UserError: models, store and tokenizer that do not match, a text model, repeated names, options out of range, or `out`
            exists.
    """
    require_absent(out, "a folder of attention maps")
    require_place(out)
    require("matplotlib")
    require("jinja2")
    subjects = open_eval_models(paths, names, "ema" if ema else "live")
    for subject in subjects:
        subject.info.config.require_classes("st-ar attention")
    store = TokenStore(tokens)
    for subject in subjects:
        try:
            check_store(subject.info, store)
        except UserError as error:
            raise UserError(f"{subject.name} cannot read the images: {error}") from error
    decoder = open_tokenizer(tokenizer, device, "float32")
    if decoder.fingerprint != store.meta.tokenizer:
        raise UserError(
            f"{tokens} was made by tokenizer {store.meta.tokenizer[:12]}, {tokenizer} is {decoder.fingerprint[:12]}: "
            "give the tokenizer that made the store"
        )
    store.verify()
    configs = {subject.name: subject.info.config for subject in subjects}
    options = (options or AttentionOptions()).resolved(configs, store)
    models = {subject.name: subject.open().to(choose_device(device)) for subject in subjects}
    averaged = [number * len(store) // options.average for number in range(options.average)]
    results = AttentionResults(
        subjects=subjects,
        models=models,
        store=store,
        statistics={
            name: average_statistics(model, store, averaged, masks=options.masks, name=name)
            for name, model in models.items()
        },
        options=options,
    )
    pictures = decode_to_images(decoder, center_crops(store, options.images)[0])
    with atomic_folder(out) as folder:
        write_statistics(folder, results)
        maps = write_maps(folder, results, pictures)
        write_page(folder, results, maps, write_curves(folder, results))
    return results.statistics


AXES = (
    "weight on the class",
    "weight on the 3 x 3 neighbourhood",
    "mean distance (tokens)",
    "entropy (nats)",
)
COLUMNS = ("on the class", "on the 3 x 3", "distance (tokens)", "entropy (nats)")
DIGITS = (3, 3, 2, 2)
GLOSSARY = (
    "On the class: weight on the class position, whose key is zero; it gets the weight that no token attracts. On the 3 x 3: "
    "weight on the newest token and the tokens around it. Distance: from the newest token to the attended tokens, without the "
    "class. Entropy: of the weights over all keys."
)


@dataclass(frozen=True, kw_only=True)
class AttentionResults:
    """Models, and the statistics of their attention over a store."""

    subjects: Sequence[EvalModel]
    models: Mapping[str, Transformer]
    store: TokenStore
    statistics: dict[str, dict[int, LayerStatistics]]
    options: AttentionOptions


def statistics_table(
    statistics: Mapping[str, Mapping[int, LayerStatistics]],
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return header and rows: mean ± standard deviation over images, by layer and model."""
    several = len(statistics) > 1

    def cells(averaged: Averaged) -> Iterator[str]:
        for name, digits in zip(STATISTICS, DIGITS, strict=True):
            spread = f" ± {getattr(averaged.std, name):.{digits}f}" if averaged.std else ""
            yield f"{getattr(averaged.mean, name):.{digits}f}{spread}"

    rows = [
        (f"{layer}, {name}" if several else str(layer), *cells(layers[layer].over_heads))
        for layer in range(1, max(map(len, statistics.values())) + 1)
        for name, layers in statistics.items()
        if layer in layers
    ]
    return ("layer, model" if several else "layer", *COLUMNS), rows


def write_statistics(out: Path, results: AttentionResults) -> None:
    """Write statistics.json, and statistics.csv with a row for each model, layer and head."""
    models = {
        subject.name: {
            "weights": subject.describe(),
            "layers": {str(layer): asdict(found) for layer, found in results.statistics[subject.name].items()},
        }
        for subject in results.subjects
    }
    options = results.options
    inputs = {"tokens": results.store.describe(), "images": options.average, "masks": asdict(options.masks)}
    write_json(out / "statistics.json", {**inputs, "models": models})
    header = ["model", "layer", "head", *(column for name in STATISTICS for column in (name, f"{name}_std"))]

    def numbers(averaged: Averaged) -> list[float | None]:
        pair = averaged.mean, averaged.std
        return [getattr(values, name) if values else None for name in STATISTICS for values in pair]

    rows = [
        [model, layer, head, *numbers(averaged)]
        for model, layers in results.statistics.items()
        for layer, found in layers.items()
        for head, averaged in [("mean", found.over_heads), *enumerate(found.by_head, start=1)]
    ]
    write_csv(out / "statistics.csv", header, rows)


def write_maps(out: Path, results: AttentionResults, pictures: np.ndarray) -> list[Section]:
    """Draw the maps of every layer and head over the pictures; returns a section of the report for each layer."""
    store, grid, options = results.store, results.store.meta.grid, results.options
    masked, mask = None, options.masks.draw(options.images, grid**2)
    if mask is not None:  # the same for every query if it is [N, T]
        masked = (mask if mask.dim() == 3 else mask[:, None].expand(-1, grid**2, -1)).numpy()
    names = ", ".join(f"{image} ({store.meta.class_names[store.labels[image]]})" for image in options.images)
    caption = (
        f"Images {names} of the store, by number of tokens read. Framed: the newest token. Brighter: more weight, scaled to each "
        f"map. Blank: not read yet.{' Grey: masked.' if masked is not None else ''}"
    )
    sections: list[Section] = []
    maps = [
        store_maps(model, store, options.images, layers=options.layers, masks=options.masks)
        for model in results.models.values()
    ]
    with progress("draw", len(options.layers) * len(options.heads), unit="figures") as bar:
        for by_model in zip(*maps, strict=True):  # layer by layer
            layer = by_model[0][0]
            charts: list[Chart] = []
            for head in options.heads:
                mean = head == "mean"
                weights = {
                    name: (weights.mean(1) if mean else weights[:, int(head) - 1]).cpu().numpy()
                    for name, (_, weights) in zip(results.models, by_model, strict=True)
                }
                label = "all heads averaged" if mean else f"head {head}"
                name = f"attention at layer {layer}, {label}"
                drawing = attention_figure(pictures, weights, grid=grid, steps=options.steps, name=name, masked=masked)
                file = f"layer-{layer}-{head if mean else f'head-{head}'}"
                charts.append(Chart(svg=_save(out, file, drawing), caption=f"{label.capitalize()}. {caption}"))
                bar.advance(1)
            sections.append(Section(title=f"Layer {layer}", parts=charts))
    return sections


def write_curves(out: Path, results: AttentionResults) -> list[Chart]:
    """Draw each statistic over the layers, a line per model with a band of one standard deviation."""
    depth = max(map(len, results.statistics.values()))
    ticks = range(1, depth + 1, -(-depth // 12))
    charts: list[Chart] = []
    for statistic, axis in zip(STATISTICS, AXES, strict=True):
        lines: dict[str, tuple[list[float], list[float]]] = {}
        spread: dict[str, list[float]] = {}
        for model, layers in results.statistics.items():
            averaged = [found.over_heads for found in layers.values()]
            lines[model] = (list(layers), [getattr(each.mean, statistic) for each in averaged])
            if results.options.average > 1:
                spread[model] = [getattr(each.std, statistic) for each in averaged]
        name = f"{axis.partition(' (')[0]} over layers"
        drawing = line_chart(lines, name=name, x="layer", y=axis, x_ticks=ticks, spread=spread)
        charts.append(Chart(svg=_save(out, statistic.replace("_", "-"), drawing)))
    return charts


def _save(out: Path, name: str, drawing: Drawing) -> str:
    """Write NAME.svg, NAME.png and NAME.json; returns the SVG for the report."""
    for suffix in (".svg", ".png"):
        drawing.save(out / f"{name}{suffix}")
    return drawing.svg()


def write_page(out: Path, results: AttentionResults, maps: Sequence[Section], curves: Sequence[Chart]) -> None:
    """Write attention.html."""
    count, masks, store, meta = results.options.average, results.options.masks, results.store, results.store.meta
    images, spread, bands, masking = "one image", "", [], ""
    if masks.ratio:
        own = "" if masks.own_position else ", but not from its own query"
        masking = f" {100 * masks.ratio:g} % of each image's token keys are masked at random{own} (seed {masks.seed})."
    if count > 1:
        images = f"{count:,} images"
        spread = " ± is the standard deviation over images."
        bands = ["The bands are one standard deviation over images."]
    header, rows = statistics_table(results.statistics)
    caption = f"Averages over heads, steps and {images}.{spread}{masking} {GLOSSARY}"
    inputs = [
        f"Images: {count:,} of the {len(store):,} of {store.folder}, evenly spaced; the centre crop ({meta.crops[store.center]}) of "
        f"each, {meta.grid} x {meta.grid} tokens.",
        *(
            f"{subject.name}: {'EMA' if info.ema else 'live'} weights of step {info.step:,}, {info.config.n_layers} layers of "
            f"{info.config.n_heads} heads, {info.source}."
            for subject in results.subjects
            for info in [subject.info]
        ),
        "The numbers, also by head, are in statistics.json and statistics.csv. Each figure's numbers are in a JSON file beside it.",
    ]
    sections = [
        *maps,
        Section(title="Statistics", parts=[Table(columns=header, rows=rows, caption=caption)]),
        Section(title="Statistics by layer", paragraphs=bands, parts=curves),
        Section(title="Inputs", paragraphs=inputs),
    ]
    title = f"Attention of {' and '.join(results.models)}"
    lead = f"Attention while images of {meta.source} are read token by token.{masking}"
    write_report(out / "attention.html", title=title, lead=lead, sections=sections)
