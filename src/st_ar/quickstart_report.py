"""The quickstart's page: what was measured of AR and ST-AR, said plainly, with its figures."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from st_ar.comparison import Column, Spread, table_columns
from st_ar.config import TrainConfig
from st_ar.data.store import TokenStore
from st_ar.evaluation import features
from st_ar.evaluation.attention import AttentionStatistics, attention_maps, attention_steps
from st_ar.evaluation.probe import ProbeResult
from st_ar.figures import line_chart, strip
from st_ar.model.transformer import Transformer
from st_ar.report import Chart, Gallery, Section, Table, png_uri, write_report
from st_ar.token_figures import attention_figure
from st_ar.training.log import read_log

SEED_NOISE = 0.2
"""Relative difference of two samples' FD-regions that means nothing: twice its spread between seeds (docs/results.md)."""
METHODS = {"AR": "llamagen", "ST-AR": "st-ar"}
"""What the report calls a method -> the beginning of its presets' names."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What the quickstart measures of one model."""

    validation_loss: float
    """Nats per token on the test images, live weights."""
    validation_loss_ema: float
    """The same with the averaged weights."""
    probe: ProbeResult
    frechet: float
    """FD-regions of the samples to the test images."""
    attention: dict[int, AttentionStatistics]
    """By layer."""
    seconds_per_step: float
    """Median over the logged stretches of training."""


@dataclass(frozen=True, kw_only=True)
class Shown:
    """What the page draws from."""

    samples: Mapping[str, np.ndarray]
    """Method -> images uint8 [N, S, S, 3]."""
    labels: Sequence[int]
    """Of the samples."""
    real: np.ndarray
    """The test images."""
    models: Mapping[str, Transformer]
    configs: Mapping[str, TrainConfig]


def token_budget(config: TrainConfig) -> int:
    """Tokens that a run of a number of steps trains on."""
    assert config.steps is not None
    return config.steps * config.batch_size * config.views * config.model.sequence_length


def write_page(
    path: Path,
    measured: Mapping[str, Measured],
    summary: dict[str, Any],
    shown: Shown,
    store: TokenStore,
    test_store: TokenStore,
) -> None:
    """Write the quickstart's report beside its artefacts."""
    config = shown.configs["AR"]
    sections = [
        _results(measured, summary),
        _probe_section(measured, summary["images"]),
        _training_section(path.parent),
        _attention_section(shown, measured, test_store),
        _samples_section(shown, test_store),
        _method_section(path.parent, shown.configs, summary),
    ]
    parameters = sum(parameter.numel() for parameter in shown.models["AR"].parameters())
    lead = (
        f"Two transformers of {parameters / 1e6:.2f} million parameters, the same data, order, initialisation and number of "
        f"tokens ({token_budget(config) / 1e6:.1f} million): one trained plainly, one with self-guidance."
    )
    title = f"AR and ST-AR on {len(store):,} images of {summary['images']}"
    write_report(path, title=title, lead=lead, sections=sections)


def _points(share: float) -> str:
    return f"{100 * share:.1f} %"


def _spreads(result: Measured) -> dict[str, Spread]:
    numbers = {
        "last": result.probe.top1[-1],
        "best": max(result.probe.top1),
        "loss": result.validation_loss,
        "ema": result.validation_loss_ema,
        "frechet": result.frechet,
        "seconds": result.seconds_per_step,
    }
    return {key: Spread((value,)) for key, value in numbers.items()}


def _results(measured: Mapping[str, Measured], summary: dict[str, Any]) -> Section:
    ar, guided = measured["AR"], measured["ST-AR"]
    gain = 100 * (guided.probe.top1[-1] - ar.probe.top1[-1])
    share = ar.probe.top1[-1]
    noise = 200 * math.sqrt(2 * share * (1 - share) / ar.probe.test_images)
    understands = (
        f"Understanding: after reading a whole image, a linear probe on ST-AR's features is right {abs(gain):.1f} points "
        f"{'more' if gain >= 0 else 'less'} often than on AR's"
        + (f"; differences under {noise:.1f} points are within the test set's noise." if abs(gain) < noise else ".")
    )
    worse = guided.validation_loss > ar.validation_loss
    predicts = (
        f"Prediction: ST-AR's loss on unseen images is {100 * abs(guided.validation_loss / ar.validation_loss - 1):.1f} % "
        f"{'higher, which is worse' if worse else 'lower, which is better'}."
    )
    draws = (
        f"Samples: ST-AR's lie {'further from' if guided.frechet > ar.frechet else 'nearer to'} the real images "
        f"({guided.frechet:.3f} against {ar.frechet:.3f}). This distance sees colours and contrasts, not objects, and is no FID."
    )
    if abs(guided.frechet / ar.frechet - 1) < SEED_NOISE:
        draws += " So small a difference is within what another seed changes."
    cost = f"Cost: a step of ST-AR takes {summary['step_time_ratio']:.2f} times as long as one of AR, at equal tokens."
    columns = [
        Column(key="last", label="Probe accuracy, last step, % (higher is better)", digits=1, factor=100),
        Column(key="best", label="Probe accuracy, best step, %", digits=1, factor=100),
        Column(key="loss", label="Validation loss, nats per token (lower)", digits=3),
        Column(key="ema", label="Validation loss, averaged weights", digits=3),
        Column(key="frechet", label=f"{features.NAME} of samples (lower)", digits=4),
        Column(key="seconds", label="Seconds per training step", digits=3),
    ]
    rows = table_columns(columns, {method: _spreads(result) for method, result in measured.items()})
    caption = (
        f"One run of each with seed {summary['seed']}, live weights unless said otherwise. {features.NAME}: "
        f"{features.DESCRIPTION}, {summary['samples']:,} samples without guidance against the test images; "
        f"{summary['frechet_of_decoded_training_images']:.4f} for training images passed "
        "through the tokenizer, which is about what a perfect model would reach."
    )
    paragraphs = [
        understands,
        predicts,
        draws,
        cost,
        "The run is a few minutes long. The paper trains for hundreds of thousands of steps, and reports better samples as well as "
        "better understanding; at this length, expect the gain in understanding alone.",
    ]
    return Section(
        title="What was measured",
        paragraphs=paragraphs,
        parts=[Table(columns=["", *measured], rows=rows, caption=caption)],
    )


def _probe_section(measured: Mapping[str, Measured], images: str) -> Section:
    curves = {
        method: ([float(step) for step in result.probe.steps], [100 * share for share in result.probe.top1])
        for method, result in measured.items()
    }
    some = next(iter(measured.values())).probe
    drawing = line_chart(
        curves, name=f"probe accuracy by step on {images}", x="tokens read", y="probe accuracy (%)", x_ticks=some.steps
    )
    apart = " from parts of the photographs never trained on" if images == "photos" else ""
    caption = (
        f"Linear probes on layer {some.layer}, one for each number of tokens read, the label hidden from the network; trained on the "
        f"centre crops of {some.train_images:,} images, tested on {some.test_images:,}{apart}."
    )
    rows = [[method, *(_points(share) for share in result.probe.top1)] for method, result in measured.items()]
    return Section(
        title="What the models understand as they read",
        parts=[
            Chart(svg=drawing.svg(), caption=caption),
            Table(columns=["tokens read", *map(str, some.steps)], rows=rows),
        ],
    )


def _training_section(out: Path) -> Section:
    logs = {method: read_log(out / prefix / "log.jsonl") for method, prefix in METHODS.items()}
    curves = {method: ([e["step"] for e in log], [e["loss_ar"] for e in log]) for method, log in logs.items()}
    drawing = line_chart(
        curves, name="training loss", x="optimizer step", y="next-token loss (nats per token)", markers=False
    )
    last = logs["ST-AR"][-1]
    caption = (
        "The next-token loss of both while they train; ST-AR's is computed with a quarter of the keys masked, AR's without a mask, "
        f"so compare the validation losses above instead. At the end ST-AR's other terms are: MIM {last['loss_mim']:.3f}, "
        f"inter-step {last['loss_step']:.3f}, inter-view {last['loss_view']:.3f}."
    )
    return Section(title="Training", parts=[Chart(svg=drawing.svg(), caption=caption)])


def _attention_section(shown: Shown, measured: Mapping[str, Measured], test_store: TokenStore) -> Section:
    config, real = shown.models["AR"].config, shown.real
    layer = max(1, config.n_layers // 2)
    contrast = real.std(axis=(1, 2, 3))
    wanted = np.argsort(contrast)[-len(contrast) // 5 :]  # pictures with something to look at
    chosen = wanted[_first_of_classes(test_store.labels[wanted], 3)]
    codes = torch.from_numpy(test_store.center_codes(chosen).astype(np.int64))
    labels = torch.from_numpy(test_store.labels[chosen])
    maps = {
        method: attention_maps(model, codes[:, :-1], labels, layers=[layer])[layer].mean(1).numpy()
        for method, model in shown.models.items()
    }
    steps = attention_steps(config.sequence_length)
    drawing = attention_figure(real[chosen], maps, grid=config.grid, steps=steps, name=f"attention at layer {layer}")
    caption = (
        f"Where layer {layer} of each model looks after so many tokens, all heads averaged. Framed: the newest token. "
        "Brighter: more weight. Blank: not read yet."
    )
    rows = [
        [
            f"{method}, layer {number}",
            _points(a.class_weight),
            _points(a.neighbour_weight),
            f"{a.distance:.2f}",
            f"{a.entropy:.2f}",
        ]
        for method, result in measured.items()
        for number, a in result.attention.items()
    ]
    table = Table(
        columns=["", "on the class", "on the 3 x 3 around", "mean distance (tokens)", "entropy (nats)"],
        rows=rows,
        caption="Averages over heads, steps and 256 test images.",
    )
    return Section(title="What the models look at", parts=[Chart(svg=drawing.svg(), caption=caption), table])


def _first_of_classes(labels: np.ndarray, count: int) -> np.ndarray:
    """Indices of one example each of `count` different classes."""
    _, first = np.unique(labels, return_index=True)
    return np.sort(first)[:count]


def _samples_section(shown: Shown, test_store: TokenStore, per_class: int = 6) -> Section:
    drawn = np.array(shown.labels)
    rows = [
        (
            name,
            [
                png_uri(strip(shown.real[test_store.labels == index][:per_class], per_class)),
                *(png_uri(strip(images[drawn == index][:per_class], per_class)) for images in shown.samples.values()),
            ],
        )
        for index, name in enumerate(test_store.meta.class_names)
    ]
    caption = (
        "Test images, and the first samples of each class: no guidance, temperature 1, "
        "the same seed for both models, nothing picked by hand."
    )
    return Section(
        title="What the models draw",
        parts=[Gallery(columns=["test images", *shown.samples], rows=rows, caption=caption)],
    )


def _method_section(out: Path, configs: Mapping[str, TrainConfig], summary: dict[str, Any]) -> Section:
    config, guided, images = configs["AR"], configs["ST-AR"].selfguided, summary["images"]
    larger = 10 * summary["steps"]
    machine = summary["environment"]
    return Section(
        title="How it was made, and how to go on",
        paragraphs=[
            f"Both: {config.steps} steps of {config.batch_size} images x {config.views} crops x {config.model.sequence_length} tokens "
            f"(k-means on 4 x 4 pixels, {config.model.vocab_size} codes), AdamW with learning rate {config.optim.lr}, "
            "no dropout. AR sees the same two crops as ST-AR, so that augmentation is not what is compared.",
            f"ST-AR: mask ratio {guided.mask_ratio}, alpha {guided.alpha}, beta {guided.beta}, {guided.positions} positions, temperature "
            f"{guided.temperature}, teacher decay up to {guided.ema_decay}.",
            f"Machine: {machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}. This page's numbers are in summary.json; "
            "every model, store and tokenizer lies beside it for the other commands. A longer run, and a sample from it:",
        ],
        commands=[
            f"st-ar train st-ar-{images} --tokens {out / 'tokens-train'} --out st-ar-long --steps {larger}",
            f"st-ar probe --model st-ar-long --tokens {out / 'tokens-train'} --test-tokens {out / 'tokens-test'}",
            f"st-ar sample --model st-ar-long --tokenizer {out / 'tokenizer'} --out samples --num 64",
        ],
    )
