"""The whole pipeline on images that are already on the machine: AR, ST-AR and its contrast alone, side by side, in minutes.

Every stage leaves the artefact that the matching command would leave, so the other commands work on what is here. A stopped
quickstart continues where it was.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from st_ar.config import SampleSettings, TrainConfig
from st_ar.data.images import open_images
from st_ar.data.source import Crops, ImageSource
from st_ar.data.store import META, TokenStore
from st_ar.evaluation import metrics as features
from st_ar.evaluation.attention import AttentionStatistics, attention_maps, attention_statistics, attention_steps
from st_ar.evaluation.likelihood import validation_loss
from st_ar.evaluation.metrics import frechet_distance, mean_and_covariance
from st_ar.evaluation.probe import ProbeResult, probe
from st_ar.evaluation.probe_classifiers import ProbeConfig
from st_ar.evaluation.probe_features import batches
from st_ar.figures import Drawing, attention_figure, line_chart, overview_figure, strip
from st_ar.files import claim, read_json, write_json
from st_ar.hardware import describe
from st_ar.model.transformer import Transformer
from st_ar.model.weights import load_model
from st_ar.presets import get_preset
from st_ar.report import Chart, Column, Gallery, Section, Spread, Table, png_uri, table_columns, write_report
from st_ar.sampling import sample_images
from st_ar.settings import to_dict
from st_ar.tokenizer import CONFIG as TOKENIZER_CONFIG
from st_ar.tokenizer import Tokenizer, decode_to_images, load_tokenizer
from st_ar.tokenizer.kmeans import train_kmeans
from st_ar.tokenizer.tokenize import tokenize
from st_ar.training.loop import train
from st_ar.training.run import read_log, seconds_per_step

Images = Literal["photos", "digits"]


@dataclass(frozen=True)
class Method:
    """One of the three trainings that the quickstart compares."""

    folder: str
    """Its run's folder in the quickstart's."""
    preset: str
    """Its preset; {} stands for the images' name."""


METHODS = {
    "AR": Method("llamagen", "llamagen-{}"),
    "ST-AR": Method("st-ar", "st-ar-{}"),
    "Contrast alone": Method("contrast", "st-ar-{}-view"),
}
PROBE = ProbeConfig()
SAMPLES = 1024
CENTRE = 4
"""The centre among the ten crops. The probes train on it alone, which is quick."""
SEED_NOISE = 0.2
"""FD-regions differs by up to this share between seeds (twice the standard deviation; docs/results.md)."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What the quickstart measures of one model."""

    validation_loss: float
    """Nats per token on the test images, live weights."""
    validation_loss_ema: float
    """The same with the EMA weights."""
    probe: ProbeResult
    frechet: float
    """FD-regions between samples and test images."""
    attention: dict[int, AttentionStatistics]
    """By layer."""
    seconds_per_step: float
    """Median over the log's intervals."""


@dataclass(frozen=True, kw_only=True)
class Results:
    """Everything that the report shows. Mappings go from method to value."""

    images: str
    configs: Mapping[str, TrainConfig]
    measured: Mapping[str, Measured]
    models: Mapping[str, Transformer]
    samples: Mapping[str, np.ndarray]
    """uint8 [N, S, S, 3]."""
    labels: Sequence[int]
    """Labels of the samples."""
    real: np.ndarray
    """Test images, uint8 [N, S, S, 3]."""
    store: TokenStore
    test_store: TokenStore
    decoded_frechet: float
    """FD-regions between decoded training images and test images: the tokenizer's lower bound."""


def quickstart(out: Path, *, images: Images = "photos", steps: int | None = None, seed: int = 0) -> Path:
    """Train, probe, sample and compare AR, ST-AR and the contrast alone at equal tokens; returns the report's path.

    Args:
        out: folder for all artefacts. The same call continues a stopped quickstart.
        images: which of the embedded sources.
        steps: optimizer steps of each model; the preset's if None.
        seed: seed of everything.

    Raises:
        UserError: `out` holds something else, or a quickstart with other settings.
    """
    started = time.perf_counter()
    presets = {name: method.preset.format(images) for name, method in METHODS.items()}
    configs = {name: _config(preset, steps, seed) for name, preset in presets.items()}
    _claim(out, images, configs)
    source, test_source = open_images(f"{images}:train"), open_images(f"{images}:test")
    tokenizer = _tokenizer(out / "tokenizer", source)
    store = _store(out / "tokens-train", source, tokenizer, "ten")
    test_store = _store(out / "tokens-test", test_source, tokenizer, "center")
    runs = {name: out / method.folder for name, method in METHODS.items()}
    for name, run in runs.items():
        train(configs[name], store.folder, run, resume=(run / "config.json").exists(), preset=presets[name])

    order = np.random.default_rng(seed).permutation(len(test_store))
    labels = test_store.labels[np.resize(order, SAMPLES)].tolist()
    real = np.concatenate([_center(example.read(), test_source) for example in test_source.examples(0)])
    models = {name: load_model(run) for name, run in runs.items()}
    settings = SampleSettings(seed=seed, cfg_scale=1.0)
    samples = {name: sample_images(model, tokenizer, labels, settings) for name, model in models.items()}
    results = Results(
        images=images,
        configs=configs,
        measured={name: _measure(models[name], runs[name], store, test_store, samples[name], real) for name in runs},
        models=models,
        samples=samples,
        labels=labels,
        real=real,
        store=store,
        test_store=test_store,
        decoded_frechet=_frechet(_decoded(tokenizer, store, 1024), real),
    )
    summary = _summary(results, seed, time.perf_counter() - started)
    write_json(out / "summary.json", summary)
    write_page(out / "report.html", results, summary)
    _overview(results).save(out / "overview.svg")
    return out / "report.html"


def token_budget(config: TrainConfig) -> int:
    """Tokens that a run of a given number of steps trains on."""
    assert config.steps is not None
    return config.steps * config.batch_size * config.views * config.model.sequence_length


# Stages


def _config(preset: str, steps: int | None, seed: int) -> TrainConfig:
    config = replace(get_preset(preset), seed=seed)
    return config if steps is None else replace(config, steps=steps)


def _claim(out: Path, images: str, configs: Mapping[str, TrainConfig]) -> None:
    settings = {"images": images, **{name: to_dict(config) for name, config in configs.items()}}
    file = out / "quickstart.json"
    earlier = read_json(file, "a quickstart") if file.exists() else settings
    claim(file, {name: value for name, value in settings.items() if name in earlier}, "a quickstart")
    write_json(file, settings)  # an earlier version compared two methods


def _tokenizer(folder: Path, source: ImageSource) -> Tokenizer:
    if not (folder / TOKENIZER_CONFIG).exists():
        train_kmeans(source).save(folder)
    return load_tokenizer(folder)


def _store(folder: Path, source: ImageSource, tokenizer: Tokenizer, kind: Literal["ten", "center"]) -> TokenStore:
    if (folder / META).exists():
        store = TokenStore(folder)
        store.verify()
        return store
    crops = Crops(kind=kind, size=source.size, range=source.crop_range, mirror=source.mirror)
    return tokenize(source, tokenizer, crops, folder)


def _center(image: Any, source: ImageSource) -> np.ndarray:
    return Crops(kind="center", size=source.size, range=source.crop_range).cut(image)


def _decoded(tokenizer: Tokenizer, store: TokenStore, count: int) -> np.ndarray:
    """Decoded training images: the best that a model of these tokens can draw."""
    codes = store.center_codes(np.arange(min(count, len(store))))
    return decode_to_images(tokenizer, torch.from_numpy(codes.astype(np.int64)))


def _frechet(images: np.ndarray, reference: np.ndarray) -> float:
    statistics_of = [mean_and_covariance(features.region_statistics(x)) for x in (images, reference)]
    return frechet_distance(*statistics_of[0], *statistics_of[1])


def _measure(
    model: Transformer, run: Path, store: TokenStore, test_store: TokenStore, samples: np.ndarray, real: np.ndarray
) -> Measured:
    tokens, labels = next(batches(test_store, [0], 256))
    layers = range(1, model.config.n_layers + 1)
    maps = attention_maps(model, tokens[:, :-1], labels, layers=layers)
    return Measured(
        validation_loss=validation_loss(model, test_store),
        validation_loss_ema=validation_loss(load_model(run, ema=True), test_store),
        probe=probe(model, store, test_store, train_crops=[CENTRE], config=PROBE),
        frechet=_frechet(samples, real),
        attention={layer: attention_statistics(maps[layer], model.config.grid) for layer in layers},
        seconds_per_step=seconds_per_step(run),
    )


def _summary(results: Results, seed: int, seconds: float) -> dict[str, Any]:
    measured, config = results.measured, results.configs["AR"]
    base = measured["AR"].seconds_per_step
    return {
        "images": results.images,
        "steps": config.steps,
        "tokens_per_method": token_budget(config),
        "seed": seed,
        "samples": SAMPLES,
        "frechet_distance": features.DESCRIPTION,
        "frechet_of_decoded_training_images": results.decoded_frechet,
        **{name: asdict(result) for name, result in measured.items()},
        "step_time_ratio": measured["ST-AR"].seconds_per_step / base,
        "step_time_ratio_contrast": measured["Contrast alone"].seconds_per_step / base,
        "seconds_of_this_call": seconds,
        "environment": describe(),
    }


# The report


def write_page(path: Path, results: Results, summary: Mapping[str, Any]) -> None:
    """Write the report."""
    config = results.configs["AR"]
    parameters = sum(parameter.numel() for parameter in results.models["AR"].parameters())
    lead = (
        f"Three transformers of {parameters / 1e6:.2f} million parameters with the same data, order, initialisation and "
        f"{token_budget(config) / 1e6:.1f} million training tokens. One trains plainly (AR), one with the paper's "
        "self-guidance (ST-AR), one with its inter-view contrast alone and nothing masked."
    )
    sections = [
        _results_section(results, summary),
        _probe_section(results),
        _training_section(path.parent),
        _attention_section(results),
        _samples_section(results),
        _method_section(path.parent, results, summary),
    ]
    title = f"AR and ST-AR on {len(results.store):,} images of {results.images}"
    write_report(path, title=title, lead=lead, sections=sections)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _results_section(results: Results, summary: Mapping[str, Any]) -> Section:
    columns = [
        Column(key="last", label="Probe accuracy, last step, % (higher is better)", digits=1, factor=100),
        Column(key="best", label="Probe accuracy, best step, %", digits=1, factor=100),
        Column(key="loss", label="Validation loss, nats per token (lower is better)", digits=3),
        Column(key="ema", label="Validation loss, EMA weights", digits=3),
        Column(key="frechet", label=f"{features.NAME} of samples (lower is better)", digits=4),
        Column(key="seconds", label="Seconds per training step", digits=3),
    ]
    caption = (
        f"One run each, seed {summary['seed']}, live weights unless stated. {features.NAME} is the "
        f"{features.DESCRIPTION}: {summary['samples']:,} samples without guidance against the test images. "
        f"Decoded training images have {results.decoded_frechet:.4f}, the tokenizer's lower bound."
    )
    paragraphs = [
        *(_finding(name, results, summary) for name in METHODS if name != "AR"),
        f"{features.NAME} sees colours and contrasts, not objects, and is no FID.",
        "These runs take minutes. The paper trains on ImageNet for 50 to 300 epochs and reports better samples as well as better "
        "understanding. At this length, expect the gain in understanding alone.",
    ]
    rows = table_columns(columns, {name: _spreads(result) for name, result in results.measured.items()})
    table = Table(columns=["", *results.measured], rows=rows, caption=caption)
    return Section(title="Results", paragraphs=paragraphs, parts=[table])


def _finding(name: str, results: Results, summary: Mapping[str, Any]) -> str:
    """A method against AR, in words."""
    ar, guided = results.measured["AR"], results.measured[name]
    share, gain = ar.probe.top1[-1], 100 * (guided.probe.top1[-1] - ar.probe.top1[-1])
    noise = 200 * math.sqrt(2 * share * (1 - share) / ar.probe.test_images)
    within = f", which is within the test set's noise of {noise:.1f} points" if abs(gain) < noise else ""
    loss = 100 * (guided.validation_loss / ar.validation_loss - 1)
    frechet = guided.frechet / ar.frechet - 1
    samples = f"{100 * abs(frechet):.0f} % {'higher' if frechet > 0 else 'lower'}"
    seeds = ", within the noise of seeds" if abs(frechet) < SEED_NOISE else ""
    time_ratio = summary["step_time_ratio" if name == "ST-AR" else "step_time_ratio_contrast"]
    return (
        f"{name} against AR: probe accuracy after the whole image {gain:+.1f} points{within}; validation loss {loss:+.1f} %; "
        f"{features.NAME} {samples}{seeds}; a training step takes {time_ratio:.2f} times as long at equal tokens."
    )


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


def _probe_curves(results: Results) -> dict[str, tuple[list[float], list[float]]]:
    return {
        name: ([float(step) for step in result.probe.steps], [100 * share for share in result.probe.top1])
        for name, result in results.measured.items()
    }


def _probe_section(results: Results) -> Section:
    some = results.measured["AR"].probe
    drawing = line_chart(
        _probe_curves(results),
        name=f"probe accuracy by step on {results.images}",
        x="tokens read",
        y="probe accuracy (%)",
        x_ticks=some.steps,
    )
    unseen = ", cut from regions of the photographs that no model trained on" if results.images == "photos" else ""
    caption = (
        f"Linear probes on layer {some.layer}, one per number of tokens read. The network does not see the label. Trained on the centre "
        f"crops of {some.train_images:,} images, tested on {some.test_images:,}{unseen}."
    )
    rows = [[name, *map(_percent, result.probe.top1)] for name, result in results.measured.items()]
    table = Table(columns=["tokens read", *map(str, some.steps)], rows=rows)
    return Section(
        title="What the models understand as they read", parts=[Chart(svg=drawing.svg(), caption=caption), table]
    )


def _training_section(out: Path) -> Section:
    logs = {name: read_log(out / method.folder / "log.jsonl") for name, method in METHODS.items()}
    curves = {name: ([e["step"] for e in log], [e["loss_ar"] for e in log]) for name, log in logs.items()}
    drawing = line_chart(
        curves, name="training loss", x="optimizer step", y="next-token loss (nats per token)", markers=False
    )
    last = logs["ST-AR"][-1]
    caption = (
        "Next-token loss during training. ST-AR's is computed with a quarter of the keys masked, so compare the validation losses above "
        f"instead. At the end ST-AR's other losses are: MIM {last['loss_mim']:.3f}, inter-step {last['loss_step']:.3f}, "
        f"inter-view {last['loss_view']:.3f}."
    )
    return Section(title="Training", parts=[Chart(svg=drawing.svg(), caption=caption)])


def _attention(results: Results, count: int) -> tuple[np.ndarray, dict[str, np.ndarray], int]:
    """The test images of highest contrast, each of another class; each model's maps of them; the layer, at half depth."""
    config, real, test_store = results.models["AR"].config, results.real, results.test_store
    layer = max(1, config.n_layers // 2)
    contrast = real.std(axis=(1, 2, 3))
    lively = np.argsort(-contrast)
    _, first = np.unique(test_store.labels[lively], return_index=True)
    chosen = lively[np.sort(first)[:count]]
    codes = torch.from_numpy(test_store.center_codes(chosen).astype(np.int64))
    labels = torch.from_numpy(test_store.labels[chosen])
    maps = {
        name: attention_maps(model, codes[:, :-1], labels, layers=[layer])[layer].mean(1).numpy()
        for name, model in results.models.items()
    }
    return real[chosen], maps, layer


def _attention_section(results: Results) -> Section:
    images, maps, layer = _attention(results, 3)
    config = results.models["AR"].config
    steps = attention_steps(config.sequence_length)
    drawing = attention_figure(images, maps, grid=config.grid, steps=steps, name=f"attention at layer {layer}")
    caption = (
        f"Attention of layer {layer}, mean over heads, after so many tokens. Framed: the newest token. Brighter: more weight. "
        "Blank: not read yet."
    )
    rows = [
        [
            f"{name}, layer {number}",
            _percent(a.class_weight),
            _percent(a.neighbour_weight),
            f"{a.distance:.2f}",
            f"{a.entropy:.2f}",
        ]
        for name, result in results.measured.items()
        for number, a in result.attention.items()
    ]
    table = Table(
        columns=["", "weight on the class", "weight on the 3 x 3 around", "mean distance (tokens)", "entropy (nats)"],
        rows=rows,
        caption="Means over heads, steps and 256 test images.",
    )
    return Section(title="Where the models look", parts=[Chart(svg=drawing.svg(), caption=caption), table])


def _samples_section(results: Results, per_class: int = 6) -> Section:
    labels, real, test_store = np.array(results.labels), results.real, results.test_store
    rows = [
        (
            name,
            [
                png_uri(strip(real[test_store.labels == index][:per_class], per_class)),
                *(
                    png_uri(strip(images[labels == index][:per_class], per_class))
                    for images in results.samples.values()
                ),
            ],
        )
        for index, name in enumerate(test_store.meta.class_names)
    ]
    caption = (
        "Test images, and the first samples of each class: no guidance, temperature 1, the same seed for all models, "
        "not selected."
    )
    gallery = Gallery(columns=["test images", *results.samples], rows=rows, caption=caption)
    return Section(title="Samples", parts=[gallery])


def _method_section(out: Path, results: Results, summary: Mapping[str, Any]) -> Section:
    config, guided, images = results.configs["AR"], results.configs["ST-AR"].selfguided, results.images
    machine = summary["environment"]
    return Section(
        title="Settings and next steps",
        paragraphs=[
            f"All: {config.steps} steps of {config.batch_size} images x {config.views} crops x {config.model.sequence_length} tokens "
            f"(k-means on 4 x 4 pixels, {config.model.vocab_size} codes), AdamW with learning rate {config.optim.lr}, no dropout. "
            "AR reads the same two crops as the others, so the comparison is not about augmentation.",
            f"ST-AR: mask ratio {guided.mask_ratio}, alpha {guided.alpha}, beta {guided.beta}, {guided.positions} positions, temperature "
            f"{guided.temperature}, teacher decay up to {guided.ema_decay}. Contrast alone: mask ratio 0, alpha 0, no inter-step loss.",
            f"Machine: {machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}. This page's numbers are in summary.json. "
            "Every model, store and tokenizer lies beside it for the other commands. A longer run, its probe and samples:",
        ],
        commands=[
            f"st-ar train st-ar-{images} --tokens {out / 'tokens-train'} --out st-ar-long --steps {10 * summary['steps']}",
            f"st-ar probe --model st-ar-long --tokens {out / 'tokens-train'} --test-tokens {out / 'tokens-test'}",
            f"st-ar sample --model st-ar-long --tokenizer {out / 'tokenizer'} --out samples --num 64",
        ],
    )


def _overview(results: Results) -> Drawing:
    """Probe curves, attention and samples in one picture."""
    images, maps, layer = _attention(results, 1)
    config = results.models["AR"].config
    order = _spread_over_classes(np.array(results.labels), 16)
    return overview_figure(
        _probe_curves(results),
        attention=(images, maps),
        grid=config.grid,
        steps=attention_steps(config.sequence_length),
        layer=layer,
        samples={name: found[order] for name, found in results.samples.items()},
        name=f"AR, ST-AR and the contrast alone on {results.images}",
    )


def _spread_over_classes(labels: np.ndarray, count: int) -> np.ndarray:
    """Indices of `count` samples: the first of each class, then the second of each, and so on."""
    rank = np.empty(len(labels), np.int64)
    for label in np.unique(labels):
        of_class = np.flatnonzero(labels == label)
        rank[of_class] = np.arange(len(of_class))
    return np.lexsort((labels, rank))[:count]
