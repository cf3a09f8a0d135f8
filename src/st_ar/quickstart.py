"""`st-ar quickstart`: the whole pipeline in minutes, on images that come with the package. It compares AR, ST-AR and contrast alone.

Every stage writes the same artefacts as its own command. A stopped quickstart can be resumed.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from st_ar.config import ClassifierConfig, SampleSettings, TrainConfig
from st_ar.data.images import open_images
from st_ar.data.source import Crops, ImageSource
from st_ar.data.store import META, TokenStore
from st_ar.evaluation.attention import (
    attention_maps,
    attention_statistics,
    attention_steps,
    center_crops,
)
from st_ar.evaluation.attention_report import AXES
from st_ar.evaluation.generation.classifier import CONFIG, load_classifier, train_classifier
from st_ar.evaluation.generation.features import Extractor
from st_ar.evaluation.likelihood import validation_loss
from st_ar.evaluation.metrics import frechet_distance, mean_and_covariance, region_statistics
from st_ar.evaluation.probe import probe
from st_ar.evaluation.probe_classifiers import ProbeConfig
from st_ar.evaluation.probe_features import token_batches
from st_ar.figures import Drawing, attention_figure, line_chart, overview_figure, strip
from st_ar.files import claim, read_json, write_json
from st_ar.hardware import describe
from st_ar.model.transformer import Transformer
from st_ar.model.weights import load_model
from st_ar.presets import get_preset
from st_ar.report import Chart, Gallery, Section, Table, png_uri, write_report
from st_ar.sampling import sample_images
from st_ar.settings import to_dict
from st_ar.tokenizer import CONFIG as TOKENIZER_CONFIG
from st_ar.tokenizer import Tokenizer, decode_to_images, load_tokenizer
from st_ar.tokenizer.kmeans import train_kmeans
from st_ar.tokenizer.tokenize import tokenize
from st_ar.training.loop import train
from st_ar.training.run import read_log, seconds_per_step

Images = Literal["photos", "digits"]


METHODS = {
    "AR": ("llamagen", "llamagen-{}"),
    "ST-AR": ("st-ar", "st-ar-{}"),
    "Contrast alone": ("contrast", "st-ar-{}-view"),
}
"""Method -> folder of its run, and preset with {} for the images' name."""
LABELS = {"AR": "AR, 2 views (control)", "ST-AR": "ST-AR", "Contrast alone": "Inter-view contrast alone"}
"""Method -> its label in tables and figures."""
PROBE = ProbeConfig()
SAMPLES = 1024
CENTRE = 4
"""The centre crop among the ten crops. The probes train on it only, which is quick."""
FD = "FD-regions"
FD_DESCRIPTION = (
    "Frechet distance between means and standard deviations of colour over a 4 x 4 grid of regions, pixels in [0, 1]"
)
FD_NOISE = 0.2
"""FD-regions differs by up to this share between seeds (twice the standard deviation; docs/results/photographs.md)."""


@dataclass(frozen=True, kw_only=True)
class Results:
    """Everything that the report shows. Mappings are by method."""

    out: Path
    summary: Mapping[str, Any]
    """The content of summary.json."""
    configs: Mapping[str, TrainConfig]
    models: Mapping[str, Transformer]
    samples: Mapping[str, np.ndarray]
    """uint8 [N, S, S, 3]."""
    labels: np.ndarray
    real: np.ndarray
    """Test images, uint8 [N, S, S, 3]."""
    test_store: TokenStore

    @property
    def measured(self) -> dict[str, Any]:
        """The measurements of each method."""
        return {name: self.summary[name] for name in METHODS}


def quickstart(out: Path, *, images: Images = "photos", steps: int | None = None, seed: int = 0) -> Path:
    """Train, probe, sample and compare AR, ST-AR and contrast alone at equal tokens; returns the report's path.

    Args:
        out: folder for all artefacts. The same call resumes a stopped quickstart.
        images: the built-in images to train on.
        steps: optimizer steps of each model; the preset's if None.

    Raises:
        UserError: `out` holds other files, or a quickstart with other settings.
    """
    started = time.perf_counter()
    presets = {name: preset.format(images) for name, (_, preset) in METHODS.items()}
    changes = {"seed": seed} | ({} if steps is None else {"steps": steps})
    configs = {name: replace(get_preset(preset), **changes) for name, preset in presets.items()}
    _claim(out, images, configs)
    source, test_source = open_images(f"{images}:train"), open_images(f"{images}:test")
    if not (out / "tokenizer" / TOKENIZER_CONFIG).exists():
        train_kmeans(source).save(out / "tokenizer")
    tokenizer = load_tokenizer(out / "tokenizer")
    store = _store(out / "tokens-train", source, tokenizer, "ten")
    test_store = _store(out / "tokens-test", test_source, tokenizer, "center")
    runs = {name: out / folder for name, (folder, _) in METHODS.items()}
    for name, run in runs.items():
        train(configs[name], store.folder, run, resume=(run / "config.json").exists(), preset=presets[name])

    order = np.random.default_rng(seed).permutation(len(test_store))
    labels = test_store.labels[np.resize(order, SAMPLES)]
    center = Crops(kind="center", size=test_source.size, range=test_source.crop_range)
    real = np.concatenate([center.cut(example.read()) for example in test_source.examples(0)])
    decoded = decode_to_images(tokenizer, center_crops(store, range(min(1024, len(store))))[0])
    models = {name: load_model(run) for name, run in runs.items()}
    settings = SampleSettings(seed=seed, cfg_scale=1.0)
    samples = {name: sample_images(model, tokenizer, labels.tolist(), settings) for name, model in models.items()}
    config = configs["AR"]
    assert config.steps is not None
    folder, cpu = out / "classifier", torch.device("cpu")
    if not folder.exists():
        train_classifier(store, test_store, tokenizer, folder, ClassifierConfig(steps=config.steps, seed=seed), cpu)
    classifier = load_classifier(folder, cpu)
    measured = {
        name: _measure(models[name], run, store, test_store)
        | {
            "frechet": _frechet(samples[name], real),
            "class_accuracy": _class_accuracy(classifier, samples[name], labels),
        }
        for name, run in runs.items()
    }
    base = measured["AR"]["seconds_per_step"]
    summary = {
        "images": images,
        "steps": config.steps,
        "tokens_per_method": config.steps * config.batch_size * config.views * config.model.sequence_length,
        "seed": seed,
        "samples": SAMPLES,
        "frechet_distance": FD_DESCRIPTION,
        "frechet_of_decoded_training_images": _frechet(decoded, real),
        "class_accuracy_of_decoded_test_images": read_json(folder / CONFIG, "a classifier")["test_accuracy"],
        **measured,
        "step_time_ratio": measured["ST-AR"]["seconds_per_step"] / base,
        "step_time_ratio_contrast": measured["Contrast alone"]["seconds_per_step"] / base,
        "seconds_of_this_call": time.perf_counter() - started,
        "environment": describe(),
    }
    write_json(out / "summary.json", summary)
    results = Results(
        out=out,
        summary=summary,
        configs=configs,
        models=models,
        samples=samples,
        labels=labels,
        real=real,
        test_store=test_store,
    )
    _write_report(results, len(store))
    _overview(results).save(out / "overview.svg")
    return out / "report.html"


# Stages


def _claim(out: Path, images: str, configs: Mapping[str, TrainConfig]) -> None:
    settings = {"images": images, **{name: to_dict(config) for name, config in configs.items()}}
    file = out / "quickstart.json"
    earlier = read_json(file, "a quickstart") if file.exists() else settings
    claim(file, {name: value for name, value in settings.items() if name in earlier}, "a quickstart")
    write_json(file, settings)  # adds the third method to a quickstart of an earlier version


def _store(folder: Path, source: ImageSource, tokenizer: Tokenizer, kind: Literal["ten", "center"]) -> TokenStore:
    if (folder / META).exists():
        store = TokenStore(folder)
        store.verify()
        return store
    crops = Crops(kind=kind, size=source.size, range=source.crop_range, mirror=source.mirror)
    return tokenize(source, tokenizer, crops, folder)


def _frechet(images: np.ndarray, reference: np.ndarray) -> float:
    statistics = [mean_and_covariance(region_statistics(x)) for x in (images, reference)]
    return frechet_distance(*statistics[0], *statistics[1])


def _class_accuracy(classifier: Extractor, images: np.ndarray, labels: np.ndarray) -> float:
    """Return the share of the images that the classifier puts into their class."""
    logits = classifier.extract(torch.from_numpy(images)).logits
    assert logits is not None
    return float((logits.argmax(1).numpy() == labels).mean())


def _measure(model: Transformer, run: Path, store: TokenStore, test_store: TokenStore) -> dict[str, Any]:
    """Return losses in nats per token on the test images, probe, attention, and the median of the log's seconds per step."""
    tokens, labels = next(token_batches(test_store, [0], 256))
    layers = range(1, model.config.n_layers + 1)
    maps = attention_maps(model, tokens[:, :-1], labels, layers=layers)
    return {
        "validation_loss": validation_loss(model, test_store),
        "validation_loss_ema": validation_loss(load_model(run, ema=True), test_store),
        "probe": asdict(probe(model, store, test_store, train_crops=[CENTRE], config=PROBE)),
        "attention": {layer: asdict(attention_statistics(maps[layer], model.config.grid)) for layer in layers},
        "seconds_per_step": seconds_per_step(run),
    }


# The report


def _write_report(results: Results, images: int) -> None:
    summary = results.summary
    parameters = sum(parameter.numel() for parameter in results.models["AR"].parameters())
    lead = (
        f"Three transformers of {parameters / 1e6:.2f} million parameters with the same data, order, initialisation and "
        f"{summary['tokens_per_method'] / 1e6:.1f} million training tokens: one without guidance (the control), one with the paper's "
        "self-guidance (ST-AR), and one with only its inter-view contrast and no masks."
    )
    sections = [
        _results_section(results),
        _probe_section(results),
        _training_section(results.out),
        _attention_section(results),
        _samples_section(results),
        _method_section(results),
    ]
    title = f"AR and ST-AR on {images:,} images ({summary['images']})"
    write_report(results.out / "report.html", title=title, lead=lead, sections=sections)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _results_section(results: Results) -> Section:
    summary = results.summary
    numbers: list[tuple[str, int, Callable[[Any], float]]] = [
        ("Probe accuracy, last step, % (higher is better)", 1, lambda m: 100 * m["probe"]["top1"][-1]),
        ("Probe accuracy, best step, %", 1, lambda m: 100 * max(m["probe"]["top1"])),
        ("Validation loss, nats per token (lower is better)", 3, lambda m: m["validation_loss"]),
        ("Validation loss, EMA weights", 3, lambda m: m["validation_loss_ema"]),
        ("Class accuracy of samples, % (higher is better)", 1, lambda m: 100 * m["class_accuracy"]),
        (f"{FD} of samples (lower is better)", 4, lambda m: m["frechet"]),
        ("Seconds per training step", 3, lambda m: m["seconds_per_step"]),
    ]
    rows = [
        [label, *(f"{number(measured):.{digits}f}" for measured in results.measured.values())]
        for label, digits, number in numbers
    ]
    caption = (
        f"One run each, seed {summary['seed']}, live weights unless stated. {FD} is the "
        f"{FD_DESCRIPTION}: {summary['samples']:,} samples without guidance against the test images. "
        f"Decoded training images have {summary['frechet_of_decoded_training_images']:.4f}, the tokenizer's lower bound. Class accuracy: "
        f"the share of these samples that a small classifier puts into the class that was asked for. It is right about "
        f"{_percent(summary['class_accuracy_of_decoded_test_images'])} of the decoded test images."
    )
    paragraphs = [
        _finding("ST-AR", summary, summary["step_time_ratio"]),
        _finding("Contrast alone", summary, summary["step_time_ratio_contrast"]),
        f"{FD} measures colours and contrasts, not objects, and is not FID.",
        "These runs take minutes. The paper trains on ImageNet for 50 to 300 epochs and reports better samples as well as better "
        "understanding. At this length, expect better understanding. Samples may also show their class more often.",
    ]
    table = Table(columns=["", *LABELS.values()], rows=rows, caption=caption)
    return Section(title="Results", paragraphs=paragraphs, parts=[table])


def _finding(name: str, summary: Mapping[str, Any], time_ratio: float) -> str:
    """Compare a method with the control in one sentence."""
    ar, guided = summary["AR"], summary[name]
    gain = _gain(guided["probe"]["top1"][-1], ar["probe"]["top1"][-1], ar["probe"]["test_images"])
    classes = _gain(guided["class_accuracy"], ar["class_accuracy"], summary["samples"])
    loss = 100 * (guided["validation_loss"] / ar["validation_loss"] - 1)
    frechet = guided["frechet"] / ar["frechet"] - 1
    samples = f"{100 * abs(frechet):.0f} % {'higher' if frechet > 0 else 'lower'}"
    seeds = ", within the noise between seeds" if abs(frechet) < FD_NOISE else ""
    return (
        f"{LABELS[name]} compared with the control: probe accuracy after the whole image {gain}; class accuracy of samples {classes}; "
        f"validation loss {loss:+.1f} %; {FD} {samples}{seeds}; a training step takes {time_ratio:.2f} times as long at equal tokens."
    )


def _gain(share: float, base: float, images: int) -> str:
    """Say how many points a share is above another, and whether that is within the noise of so many images."""
    gain, noise = 100 * (share - base), 200 * math.sqrt(2 * base * (1 - base) / images)
    return f"{gain:+.1f} points" + (f", within the noise of {noise:.1f} points" if abs(gain) < noise else "")


def _probe_curves(results: Results) -> dict[str, tuple[list[float], list[float]]]:
    probes = {name: measured["probe"] for name, measured in results.measured.items()}
    return {LABELS[name]: (probe["steps"], [100 * share for share in probe["top1"]]) for name, probe in probes.items()}


def _probe_section(results: Results) -> Section:
    images, probe = results.summary["images"], results.measured["AR"]["probe"]
    drawing = line_chart(
        _probe_curves(results),
        name=f"probe accuracy by step on {images}",
        x="step",
        y="probe accuracy (%)",
        x_ticks=probe["steps"],
    )
    unseen = ", cut from regions of the photographs that no model trained on" if images == "photos" else ""
    caption = (
        f"Linear probes on layer {probe['layer']}, one per step: at step t the network has read t - 1 tokens. It does not see the "
        f"label. Trained on the centre crops of {probe['train_images']:,} images, tested on {probe['test_images']:,}{unseen}."
    )
    rows = [[LABELS[name], *map(_percent, measured["probe"]["top1"])] for name, measured in results.measured.items()]
    table = Table(columns=["step", *map(str, probe["steps"])], rows=rows)
    return Section(title="Probe accuracy by step", parts=[Chart(svg=drawing.svg(), caption=caption), table])


def _training_section(out: Path) -> Section:
    logs = {name: read_log(out / folder / "log.jsonl") for name, (folder, _) in METHODS.items()}
    curves = {LABELS[name]: ([e["step"] for e in log], [e["loss_ar"] for e in log]) for name, log in logs.items()}
    drawing = line_chart(
        curves, name="training loss", x="optimizer step", y="next-token loss (nats per token)", markers=False
    )
    last = logs["ST-AR"][-1]
    caption = (
        "Next-token loss during training. ST-AR's is computed with a quarter of the keys masked, so compare the validation losses above "
        f"instead. ST-AR's other losses at the end: MIM {last['loss_mim']:.3f}, inter-step {last['loss_step']:.3f}, "
        f"inter-view {last['loss_view']:.3f}."
    )
    return Section(title="Training", parts=[Chart(svg=drawing.svg(), caption=caption)])


def _attention(results: Results, count: int) -> tuple[int, dict[str, Any]]:
    """Return the layer in the middle, and the arguments of figures of its maps over `count` test images of high contrast."""
    config, real, test_store = results.configs["AR"].model, results.real, results.test_store
    layer = max(1, config.n_layers // 2)
    by_contrast = np.argsort(-real.std(axis=(1, 2, 3)))
    _, first = np.unique(test_store.labels[by_contrast], return_index=True)
    chosen = by_contrast[np.sort(first)[:count]]
    codes, labels = center_crops(test_store, chosen.tolist())
    maps = {
        LABELS[name]: attention_maps(model, codes[:, :-1], labels, layers=[layer])[layer].mean(1).numpy()
        for name, model in results.models.items()
    }
    steps = attention_steps(config.sequence_length)
    return layer, {"images": real[chosen], "maps": maps, "grid": config.grid, "steps": steps}


def _attention_section(results: Results) -> Section:
    layer, shown = _attention(results, 3)
    drawing = attention_figure(**shown, name=f"attention at layer {layer}")
    caption = (
        f"Attention of layer {layer}, mean over heads, by number of tokens read. Framed: the newest token. Brighter: more weight. "
        "Blank: not read yet."
    )
    rows = [
        [LABELS[name], str(number), _percent(on_class), _percent(near), f"{distance:.2f}", f"{entropy:.2f}"]
        for name, measured in results.measured.items()
        for number, statistics in measured["attention"].items()
        for on_class, near, distance, entropy in [statistics.values()]
    ]
    table = Table(columns=["", "layer", *AXES], rows=rows, caption="Means over heads, steps and 256 test images.")
    return Section(title="Attention", parts=[Chart(svg=drawing.svg(), caption=caption), table])


def _samples_section(results: Results, per_class: int = 6) -> Section:
    test_store = results.test_store
    columns = {"test images": (results.real, test_store.labels)}
    columns |= {LABELS[name]: (pixels, results.labels) for name, pixels in results.samples.items()}
    rows = [
        (
            name,
            [png_uri(strip(pixels[labels == index][:per_class], per_class)) for pixels, labels in columns.values()],
        )
        for index, name in enumerate(test_store.meta.class_names)
    ]
    caption = (
        "Test images, and the first samples of each class: no guidance, temperature 1, the same seed for all models, "
        "not selected."
    )
    return Section(title="Samples", parts=[Gallery(columns=list(columns), rows=rows, caption=caption)])


def _method_section(results: Results) -> Section:
    config, guided, out = results.configs["AR"], results.configs["ST-AR"].selfguided, results.out
    images, machine = results.summary["images"], results.summary["environment"]
    return Section(
        title="Settings and next steps",
        paragraphs=[
            f"All: {config.steps} steps of {config.batch_size} images x {config.views} crops x {config.model.sequence_length} tokens "
            f"(k-means on 4 x 4 pixels, {config.model.vocab_size} codes), AdamW with learning rate {config.optim.lr}, no dropout. "
            "The control trains on the same two crops as the others, so augmentation does not differ.",
            f"ST-AR: mask ratio {guided.mask_ratio}, alpha {guided.alpha}, beta {guided.beta}, {guided.positions} positions, temperature "
            f"{guided.temperature}, teacher decay up to {guided.ema_decay}. Inter-view contrast "
            "alone: mask ratio 0, alpha 0, no inter-step loss.",
            f"Machine: {machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}. The numbers above are in summary.json. "
            "The models, stores and tokenizer are beside it, for the other commands. A longer run, its probe and samples:",
        ],
        commands=[
            f"st-ar train st-ar-{images} --tokens {out / 'tokens-train'} --out st-ar-long --steps {10 * results.summary['steps']}",
            f"st-ar probe --model st-ar-long --tokens {out / 'tokens-train'} --test-tokens {out / 'tokens-test'}",
            f"st-ar sample --model st-ar-long --tokenizer {out / 'tokenizer'} --out samples --num 64",
        ],
    )


def _overview(results: Results) -> Drawing:
    """Draw probe curves, attention and samples in one figure."""
    layer, shown = _attention(results, 1)
    order = _spread_over_classes(results.labels, 16)
    return overview_figure(
        _probe_curves(results),
        **shown,
        layer=layer,
        samples={LABELS[name]: found[order] for name, found in results.samples.items()},
        name=f"AR, ST-AR and contrast alone on {results.summary['images']}",
    )


def _spread_over_classes(labels: np.ndarray, count: int) -> np.ndarray:
    """Return the indices of `count` samples: the first of each class, then the second of each, and so on."""
    number = np.tril(labels[:, None] == labels).sum(1)  # within its class
    return np.lexsort((labels, number))[:count]
