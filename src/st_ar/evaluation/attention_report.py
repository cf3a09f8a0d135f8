"""`st-ar attention`: what to draw and to average, the checks that it is there, and the work itself."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from torch import Tensor

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
from st_ar.tokenizer import Tokenizer, decode_to_images, open_tokenizer


@dataclass(frozen=True, kw_only=True)
class AttentionOptions:
    """What to draw and to average."""

    layers: tuple[int, ...] = ()
    """To draw, counted from 1; half the least depth if none are given."""
    heads: tuple[str, ...] = ("mean",)
    """To draw: mean, numbers counted from 1, or all."""
    steps: tuple[int, ...] = ()
    """Numbers of tokens read; those of `attention_steps` if none are given."""
    images: tuple[int, ...] = (0, 1, 2)
    """Of the store, to draw."""
    average: int = 256
    """Images to average over, evenly spaced in the store; all if it has fewer."""
    masks: ImageMasks = NO_MASKS

    def resolved(self, configs: Mapping[str, ModelConfig], store: TokenStore) -> "AttentionOptions":
        """With every default and all written out, each value once; layers and steps ascending.

        Raises:
            UserError: a layer, head, step or image that is not there, or nothing to do.
        """
        length = store.meta.grid**2
        layers = self.layers or (max(1, min(config.n_layers for config in configs.values()) // 2),)
        heads = _heads(self.heads, max(config.n_heads for config in configs.values()))
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


def _heads(words: Sequence[str], most: int) -> tuple[str, ...]:
    heads: list[str] = []
    for word in words:
        if word == "all":
            heads += map(str, range(1, most + 1))
        elif word == "mean":
            heads.append(word)
        elif word.removeprefix("-").isdecimal():
            heads.append(str(int(word)))
        else:
            raise UserError(f"--heads {word!r} is no head: give mean, numbers counted from 1, or all")
    return tuple(dict.fromkeys(heads))


def report_attention(
    paths: Sequence[Path],
    tokens: Path,
    tokenizer: Path,
    out: Path,
    chosen: AttentionOptions | None = None,
    *,
    names: Sequence[str] = (),
    ema: bool = False,
    device: str = "auto",
) -> dict[str, dict[int, LayerStatistics]]:
    """Look at models of one store: write maps, statistics and a page, attention.html, to the folder `out`.

    Args:
        paths: of models, as for `open_model`.
        tokens: the store whose centre crops are read.
        names: of the models; by default as `call_models` has it, with "(EMA)" for averaged weights.
        ema, device: of every model.

    Returns:
        The statistics by model and layer.

    Raises:
        UserError: files that do not belong together, a text model, names that do not tell the models apart, something out of
            range, or `out` exists.
    """
    require_absent(out, "a folder of attention maps")
    require_place(out)
    require("matplotlib")
    require("jinja2")
    subjects = open_eval_models(paths, names, "ema" if ema else "live")
    for subject in subjects:
        subject.info.config.require_classes("st-ar attention")
    store, painter = _open_images(tokens, tokenizer, subjects, device)
    chosen = (chosen or AttentionOptions()).resolved({subject.name: subject.info.config for subject in subjects}, store)
    place = choose_device(device)
    models = {subject.name: subject.open().to(place) for subject in subjects}
    averaged = [number * len(store) // chosen.average for number in range(chosen.average)]
    looked = AttentionResults(
        subjects=subjects,
        models=models,
        store=store,
        statistics={
            name: average_statistics(model, store, averaged, masks=chosen.masks, name=name)
            for name, model in models.items()
        },
        averaged=chosen.average,
        masks=chosen.masks,
    )
    pictures = decode_to_images(painter, center_crops(store, chosen.images)[0])
    with atomic_folder(out) as folder:
        write_statistics(folder, looked)
        maps = write_maps(
            folder, looked, pictures, images=chosen.images, layers=chosen.layers, heads=chosen.heads, steps=chosen.steps
        )
        write_page(folder, looked, maps, write_curves(folder, looked))
    return looked.statistics


def _open_images(
    tokens: Path, tokenizer: Path, subjects: Sequence[EvalModel], device: str
) -> tuple[TokenStore, Tokenizer]:
    """A store that every model can read, and its tokenizer."""
    store = TokenStore(tokens)
    for subject in subjects:
        try:
            check_store(subject.info, store)
        except UserError as error:
            raise UserError(f"{subject.name} cannot read the images: {error}") from error
    painter = open_tokenizer(tokenizer, device, "float32")
    if painter.fingerprint != store.meta.tokenizer:
        raise UserError(
            f"{tokens} was made by tokenizer {store.meta.tokenizer[:12]}, {tokenizer} is {painter.fingerprint[:12]}: "
            "give the tokenizer that made the store"
        )
    store.verify()
    return store, painter


AXES = (
    "weight on the class",
    "weight on the 3 x 3 around",
    "mean distance (tokens)",
    "entropy (nats)",
)
COLUMNS = ("on the class", "on the 3 x 3", "distance (tokens)", "entropy (nats)")
DIGITS = (3, 3, 2, 2)
WORDS = (
    "On the class: weight on the class position, whose key says nothing, so that this is how little the others stood out. On the "
    "3 x 3: weight on the tokens around the newest one, itself included. Distance: from the newest token to what is looked at, "
    "the class left out. Entropy: of the weights over all keys."
)


@dataclass(frozen=True, kw_only=True)
class AttentionResults:
    """Models, what they read, and what they looked at."""

    subjects: Sequence[EvalModel]
    models: Mapping[str, Transformer]
    """By the subjects' names."""
    store: TokenStore
    statistics: dict[str, dict[int, LayerStatistics]]
    averaged: int
    """Images that the statistics are averaged over."""
    masks: ImageMasks

    @property
    def title(self) -> str:
        """What the page is about."""
        return f"What {' and '.join(self.models)} look{'s' if len(self.models) == 1 else ''} at"

    @property
    def masking(self) -> str:
        """A sentence on the key mask, or nothing."""
        if self.masks.ratio == 0:
            return ""
        own = "" if self.masks.own_position else ", but not from its own query"
        return f" {100 * self.masks.ratio:g} % of each image's token keys are masked at random{own} (seed {self.masks.seed})."


def table_of(
    statistics: Mapping[str, Mapping[int, LayerStatistics]],
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and rows: the layers in order, in each the models side by side; mean ± standard deviation from image to image."""
    several = len(statistics) > 1
    depth = max(max(layers) for layers in statistics.values())
    rows = [
        (f"{layer}, {name}" if several else str(layer), *_cells(layers[layer].over_heads))
        for layer in range(1, depth + 1)
        for name, layers in statistics.items()
        if layer in layers
    ]
    return ("layer, model" if several else "layer", *COLUMNS), rows


def _cells(averaged: Averaged) -> list[str]:
    cells: list[str] = []
    for name, digits in zip(STATISTICS, DIGITS, strict=True):
        spread = f" ± {getattr(averaged.std, name):.{digits}f}" if averaged.std else ""
        cells.append(f"{getattr(averaged.mean, name):.{digits}f}{spread}")
    return cells


def write_statistics(out: Path, looked: AttentionResults) -> None:
    """Write statistics.json, with what was read by which weights, and statistics.csv, a line for each layer and head."""
    models = {
        subject.name: {
            "weights": subject.describe(),
            "layers": {str(layer): asdict(found) for layer, found in looked.statistics[subject.name].items()},
        }
        for subject in looked.subjects
    }
    read = {"tokens": looked.store.describe(), "images": looked.averaged, "masks": asdict(looked.masks)}
    write_json(out / "statistics.json", {**read, "models": models})
    header = ["model", "layer", "head", *(column for name in STATISTICS for column in (name, f"{name}_std"))]
    rows = [
        [model, layer, head, *_numbers(averaged)]
        for model, layers in looked.statistics.items()
        for layer, found in layers.items()
        for head, averaged in [("mean", found.over_heads), *enumerate(found.by_head, start=1)]
    ]
    write_csv(out / "statistics.csv", header, rows)


def _numbers(averaged: Averaged) -> list[float | None]:
    """Each mean and its standard deviation, None where there is none."""
    return [
        getattr(values, name) if values else None for name in STATISTICS for values in (averaged.mean, averaged.std)
    ]


def write_maps(
    out: Path,
    looked: AttentionResults,
    pictures: np.ndarray,
    *,
    images: Sequence[int],
    layers: Sequence[int],
    heads: Sequence[str],
    steps: Sequence[int],
) -> list[Section]:
    """Draw every layer and head over the pictures of the images; returns a section of the page for each layer."""
    store, grid = looked.store, looked.store.meta.grid
    masked = _masked(looked.masks.draw(images, grid**2))
    names = ", ".join(f"{image} ({store.meta.class_names[store.labels[image]]})" for image in images)
    caption = (
        f"Images {names} of the store, after so many tokens. Framed: the newest token. Brighter: more weight, on each map's own "
        f"scale. Blank: not read yet.{' Grey: masked.' if masked is not None else ''}"
    )
    sections: list[Section] = []
    maps = [store_maps(model, store, images, layers=layers, masks=looked.masks) for model in looked.models.values()]
    with progress("draw", len(layers) * len(heads), unit="figures") as bar:
        for of_models in zip(*maps, strict=True):  # layer by layer
            layer = of_models[0][0]
            charts: list[Chart] = []
            for head in heads:
                weights = {
                    name: _of_head(weights, head) for name, (_, weights) in zip(looked.models, of_models, strict=True)
                }
                which = "all heads averaged" if head == "mean" else f"head {head}"
                name = f"attention at layer {layer}, {which}"
                drawing = attention_figure(pictures, weights, grid=grid, steps=steps, name=name, masked=masked)
                file = f"layer-{layer}-{'mean' if head == 'mean' else f'head-{head}'}"
                charts.append(Chart(svg=_save(out, file, drawing), caption=f"{which.capitalize()}. {caption}"))
                bar.advance(1)
            sections.append(Section(title=f"Layer {layer}", parts=charts))
    return sections


def _of_head(weights: Tensor, head: str) -> np.ndarray:
    return (weights.mean(1) if head == "mean" else weights[:, int(head) - 1]).cpu().numpy()


def _masked(mask: Tensor | None) -> np.ndarray | None:
    """A key mask [N, T] or [N, T, T] as bool [N, T, T]."""
    if mask is None:
        return None
    return (mask if mask.dim() == 3 else mask[:, None].expand(-1, mask.shape[1], -1)).numpy()


def write_curves(out: Path, looked: AttentionResults) -> list[Chart]:
    """Draw each statistic over the layers, a line for each model and a band of one standard deviation."""
    depth = max(max(layers) for layers in looked.statistics.values())
    ticks = range(1, depth + 1, -(-depth // 12))
    charts: list[Chart] = []
    for statistic, axis in zip(STATISTICS, AXES, strict=True):
        lines: dict[str, tuple[list[float], list[float]]] = {}
        spread: dict[str, list[float]] = {}
        for model, layers in looked.statistics.items():
            averaged = [found.over_heads for found in layers.values()]
            lines[model] = ([float(layer) for layer in layers], [getattr(each.mean, statistic) for each in averaged])
            if looked.averaged > 1:
                spread[model] = [getattr(each.std, statistic) for each in averaged]
        name = f"{axis.partition(' (')[0]} over layers"
        drawing = line_chart(lines, name=name, x="layer", y=axis, x_ticks=ticks, spread=spread)
        charts.append(Chart(svg=_save(out, statistic.replace("_", "-"), drawing)))
    return charts


def _save(out: Path, name: str, drawing: Drawing) -> str:
    """Write NAME.svg, NAME.png and NAME.json; returns the figure for the page."""
    for suffix in (".svg", ".png"):
        drawing.save(out / f"{name}{suffix}")
    return drawing.svg()


def write_page(out: Path, looked: AttentionResults, maps: Sequence[Section], curves: Sequence[Chart]) -> None:
    """Write attention.html."""
    images = "one image" if looked.averaged == 1 else f"{looked.averaged:,} images"
    spread = "" if looked.averaged == 1 else " ± is the standard deviation from image to image."
    header, rows = table_of(looked.statistics)
    table = Table(
        columns=header, rows=rows, caption=f"Averages over heads, steps and {images}.{spread}{looked.masking} {WORDS}"
    )
    sections = [
        *maps,
        Section(title="The numbers", parts=[table]),
        Section(
            title="Over the layers",
            paragraphs=[] if looked.averaged == 1 else ["The bands are one standard deviation from image to image."],
            parts=curves,
        ),
        Section(title="What was read", paragraphs=_sources(looked)),
    ]
    lead = f"Where attention goes while images of {looked.store.meta.source} are read token by token.{looked.masking}"
    write_report(out / "attention.html", title=looked.title, lead=lead, sections=sections)


def _sources(looked: AttentionResults) -> list[str]:
    meta = looked.store.meta
    store = (
        f"Images: {looked.averaged:,} of the {len(looked.store):,} of {looked.store.folder}, evenly spaced; the centre crop "
        f"({meta.crops[looked.store.center]}) of each, {meta.grid} x {meta.grid} tokens."
    )
    weights = [
        f"{subject.name}: {'averaged' if info.ema else 'live'} weights of step {info.step:,}, {info.config.n_layers} layers of "
        f"{info.config.n_heads} heads, {info.source}."
        for subject in looked.subjects
        for info in [subject.info]
    ]
    return [
        store,
        *weights,
        "Every number is in statistics.json and statistics.csv, by head too; each figure's is beside it as JSON.",
    ]
