"""`st-ar evaluate`: metrics of samples against a reference."""

from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from st_ar.config import Metric
from st_ar.errors import UserError
from st_ar.evaluation.generation.features import CLASSIFIER, Collected, Compute, Extractor, collect
from st_ar.evaluation.generation.image_sets import ImageSet
from st_ar.evaluation.generation.references import Reference
from st_ar.evaluation.metrics import (
    compare,
    count_blocks,
    frechet_distance,
    inception_score,
    kernel_distance,
    mean_and_covariance,
)
from st_ar.hardware import describe
from st_ar.progress import progress
from st_ar.randomness import RandomStream, numpy_generator
from st_ar.report import Gallery, Section, Table, png_uri, provenance, write_report

K, DENSITY_K = 3, 5
"""The neighbour whose distance is a ball's radius: for precision and recall, for density and coverage."""
SPLIT = 5000
"""Images per split of IS."""
SUBSETS, SUBSET_SIZE = 100, 1000
"""Subsets of KID, and images per subset."""


DEFAULT_METRICS: dict[str, tuple[Metric, ...]] = {
    "inception": ("fid", "sfid", "is", "precision", "recall"),
    CLASSIFIER: ("fd", "is", "class-accuracy", "precision", "recall"),
}
"""ADM's suite; for other extractors the part that they support."""


def choose_metrics(metrics: Sequence[Metric], extractor: str) -> list[Metric]:
    """Return the metrics in a fixed order, without repeats; by default those of the extractor (its option, or CLASSIFIER)."""
    metrics = metrics or DEFAULT_METRICS.get(extractor, ("fd", "precision", "recall"))
    able = {"fid": ("inception",), "sfid": ("inception",), "is": ("inception", CLASSIFIER)}
    able["class-accuracy"] = (CLASSIFIER, "efficientnet")
    for metric in metrics:
        if extractor not in able.get(metric, (extractor,)):
            give = [f"--{name} FOLDER" if name == CLASSIFIER else f"--extractor {name}" for name in able[metric]]
            instead = " or --metrics fd" if metric == "fid" else ""
            raise UserError(f"--metrics {metric} needs another network: give {' or '.join(give)}{instead}")
    order: list[Metric] = ["class-accuracy", "fid", "fd", "sfid", "is", "kid", "precision", "recall"]
    order += "density", "coverage"
    return [metric for metric in order if metric in metrics and not (metric == "fd" and "fid" in metrics)]


def sample_labels(samples: ImageSet, classes: int) -> np.ndarray:
    """Return the classes [N] that samples were generated for; UserError if they are unknown or not among `classes`."""
    if samples.labels is None:
        raise UserError(
            f"{samples.name} has no labels: class accuracy needs arr_1, or the .json file that `st-ar sample` writes beside samples"
        )
    if samples.labels.min() < 0 or samples.labels.max() >= classes:
        raise UserError(
            f"{samples.name} has labels from {samples.labels.min()} to {samples.labels.max()}, the classifier {classes} classes: "
            "give a classifier of the data that the model was trained on"
        )
    return samples.labels


def is_class_sorted(images: ImageSet) -> bool:
    """Whether each class is one block, in any order of the classes, so that each split of IS lacks classes."""
    labels = images.labels
    if labels is None or len(labels) <= SPLIT:
        return False
    classes = len(np.unique(labels))
    return np.count_nonzero(np.diff(labels)) + 1 == classes and 1 < classes < len(labels) / 2


def check_sizes(samples: tuple[int, int], size: tuple[int, int], resize: int | None) -> None:
    """Refuse samples whose height and width, after `resize`, are not the reference's `size`."""
    if (samples if resize is None else (resize, resize)) != size:
        given = "x".join(map(str, samples)) + (f" (resized to {resize})" if resize is not None else "")
        raise UserError(
            f"the samples have {given} pixels, the reference {size[0]}x{size[1]}: give a reference of the samples' size, or --resize "
            f"{size[0]} for a bicubic resize as in LlamaGen's evaluation"
        )


def evaluate(
    samples: ImageSet,
    reference: Reference,
    extractor: Extractor,
    metrics: Sequence[Metric],
    compute: Compute,
    *,
    resize: int | None = None,
    seed: int = 0,
    shuffle_seed: int | None = None,
) -> dict[str, Any]:
    """Measure samples. All ranks return the same result.

    Args:
        resize: side in pixels to which the samples are resized first.
        seed: seed of KID's subsets.
        shuffle_seed: shuffles the samples before IS splits them.

    Returns:
        metrics (label -> number), samples, reference, extractor, settings, notes, environment. With class accuracy also
        standard_errors (label -> number) and classes (name -> recall, samples).

    Raises:
        UserError: sizes that differ, too few images, or damaged images.
    """
    if reference.size is not None:
        check_sizes(samples.size, reference.size, resize)
    assert samples.count is not None
    labels = sample_labels(samples, extractor.classes) if "class-accuracy" in metrics else None
    order = None if shuffle_seed is None else np.random.default_rng(shuffle_seed).permutation(samples.count)
    collected = collect(samples, extractor, metrics, compute, resize=resize, order=order)
    notes = [*collected.notes, *reference.notes]
    whole, rest = divmod(samples.count, SPLIT)
    if "is" in metrics and whole and rest:
        notes.append(
            f"the last of the {whole + 1} splits of IS has {rest:,} of {SPLIT:,} images and counts as much as the others, as in ADM: "
            f"measure a multiple of {SPLIT:,}, such as {whole * SPLIT:,} or {(whole + 1) * SPLIT:,}"
        )
    if "is" in metrics and shuffle_seed is None and is_class_sorted(samples):
        notes.append(
            f"the samples are sorted by class: each split of {SPLIT:,} lacks classes and IS is far too low; give --shuffle-seed"
        )
    if collected.count < 10_000 and not {"fid", "fd", "sfid"}.isdisjoint(metrics):
        notes.append(
            f"FD of {collected.count:,} samples is biased upwards: do not compare it with numbers from 50,000 samples"
        )
    numbers = _numbers(collected, reference, metrics, compute, seed)
    settings: dict[str, Any] = {"seed": seed, "k": K, "density_k": DENSITY_K}
    errors: dict[str, float] = {}
    by_class: dict[str, Any] = {}
    if labels is not None:
        right = (collected.logits.argmax(1) == torch.from_numpy(labels)).double()
        numbers = {"class accuracy": right.mean().item(), **numbers}
        errors = {"class accuracy": (right.var(correction=0) / len(right)).sqrt().item()}
        by_class = _by_class(right, labels, extractor.class_names)
        if extractor.name == CLASSIFIER:
            errors |= _bootstrap(collected, reference, metrics, seed)
            settings["resamples"] = RESAMPLES
    if "is" in metrics:
        shuffled = "as given" if shuffle_seed is None else f"shuffled with seed {shuffle_seed}"
        settings |= {"is_split": SPLIT, "is_order": shuffled}
    if "kid" in metrics:
        size = min(SUBSET_SIZE, collected.count, len(reference.features))
        settings |= {"kid_subsets": SUBSETS, "kid_subset_size": size}
        if collected.count == len(reference.features) == size:
            notes.append("each of KID's subsets holds all images of both sets: its std means nothing")
    return {
        "metrics": {extractor.label(name): value for name, value in numbers.items()},
        **({"standard_errors": {extractor.label(name): value for name, value in errors.items()}} if errors else {}),
        **({"classes": by_class} if by_class else {}),
        "samples": {
            "name": samples.name,
            "count": collected.count,
            "sha256": collected.content,
            "size": list(samples.size),
            "resized_to": resize,
            "metadata": samples.metadata,
        },
        "reference": {
            "name": reference.name,
            "sha256": reference.content,
            "statistics": reference.statistics,
            "neighbours": len(reference.features),
            **reference.skipped,
            "size": None if reference.size is None else list(reference.size),
        },
        "extractor": extractor.identity,
        "settings": settings,
        "notes": notes,
        "environment": describe(),
    }


def _by_class(right: Tensor, labels: np.ndarray, names: Sequence[str]) -> dict[str, dict[str, float]]:
    """The recall of each class with samples: the share of its samples that are taken for it, and their number."""
    rows: dict[str, dict[str, float]] = {}
    for label in np.unique(labels):
        of_class = right[torch.from_numpy(labels == label)]
        rows[str(names[label] if names else label)] = {"recall": of_class.mean().item(), "samples": len(of_class)}
    return rows


RESAMPLES = 50
"""Bootstrap resamples of the samples, for standard errors."""


def _bootstrap(collected: Collected, reference: Reference, metrics: Sequence[Metric], seed: int) -> dict[str, float]:
    """Return standard errors of FD and IS over the choice of the samples. The reference is taken as exact."""
    statistics: dict[str, tuple[np.ndarray, Callable[[np.ndarray], float]]] = {
        "fd": (
            collected.features.double().numpy(),
            lambda rows: frechet_distance(*reference.gaussian, *mean_and_covariance(rows)),
        ),
        "is": (collected.logits.double().softmax(1).numpy(), inception_score),
    }
    errors: dict[str, float] = {}
    for name in filter(statistics.__contains__, metrics):
        rows, statistic = statistics[name]
        rng = numpy_generator(seed, RandomStream.EVALUATION)
        values = [statistic(rows[rng.integers(0, len(rows), len(rows))]) for _ in range(RESAMPLES)]
        errors[name] = float(np.std(values, ddof=1))
    return errors


def _numbers(
    collected: Collected, reference: Reference, metrics: Sequence[Metric], compute: Compute, seed: int
) -> dict[str, float]:
    numbers: dict[str, float] = {}
    for name in ("fid", "fd"):
        if name in metrics:
            numbers[name] = frechet_distance(*reference.gaussian, *collected.statistics.result())
    if collected.spatial is not None and reference.spatial is not None:
        numbers["sfid"] = frechet_distance(*reference.spatial, *collected.spatial.result())
    if collected.score is not None:
        numbers["is"] = collected.score.result()
    shown = compute.ranks.rank == 0
    real, generated = reference.features.to(compute.device), collected.features.to(compute.device)
    if "kid" in metrics:
        with progress("KID", SUBSETS, unit="subsets", shown=shown) as bar:
            numbers["kid"], numbers["kid std"] = kernel_distance(
                real, generated, subsets=SUBSETS, subset_size=SUBSET_SIZE, seed=seed, advance=bar.advance
            )
    k = None if {"precision", "recall"}.isdisjoint(metrics) else K
    density_k = None if {"density", "coverage"}.isdisjoint(metrics) else DENSITY_K
    if k or density_k:
        total = count_blocks(len(real), len(generated), k is not None)
        with progress("neighbours", total, unit="blocks", shown=shown) as bar:
            pairs = compare(real, generated, k=k, density_k=density_k, advance=bar.advance)
        for pair in filter(None, pairs):
            numbers |= {name: value for name, value in pair._asdict().items() if name in metrics}
    return numbers


def describe_samples(metadata: dict[str, Any]) -> list[str]:
    """Return what identifies samples, from the metadata that `st-ar sample` writes beside them."""
    settings, weights = metadata.get("settings"), metadata.get("weights")
    settings = settings if isinstance(settings, dict) else {}
    names = {"cfg_scale": "guidance", "temperature": "temperature", "top_k": "top-k", "top_p": "top-p", "seed": "seed"}
    parts = [f"{name} {settings[key]}" for key, name in names.items() if key in settings]
    if (schedule := settings.get("cfg_schedule", "constant")) != "constant":
        power = f" of power {settings.get('cfg_power')}" if schedule == "power-cosine" else ""
        parts.append(f"{schedule} guidance schedule{power}")
    if settings.get("cfg_interval", -1) != -1:
        parts.append(f"guidance interval {settings['cfg_interval']}")
    if (mode := metadata.get("label_mode", settings.get("label_mode"))) is not None:
        parts.append(f"{mode} labels")
    if isinstance(weights, dict):
        parts.append(f"{'EMA' if weights.get('ema') else 'live'} weights {str(weights.get('sha256'))[:8]}")
    return parts


def format_number(label: str, value: float) -> str:
    """Return a metric with the decimals that papers print."""
    if label.startswith(("precision", "class accuracy", "recall", "density", "coverage", "SSIM", "codebook usage")):
        return f"{value:.4f}"
    return f"{value:.5f}" if label.startswith(("KID", "KD", "kid")) else f"{value:.3f}"


def number_rows(result: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the labels and values of a result's metrics, with standard errors where they are known."""
    errors = result.get("standard_errors", {})
    return [
        (label, format_number(label, value) + (f" ± {format_number(label, errors[label])}" if label in errors else ""))
        for label, value in result["metrics"].items()
    ]


def one_line(result: dict[str, Any]) -> str:
    """Return a result in one line: the numbers and all that identifies them."""
    numbers = ", ".join(f"{label} {value}" for label, value in number_rows(result))
    samples, reference = result["samples"], result["reference"]
    resized = f" resized to {samples['resized_to']} px" if samples["resized_to"] else ""
    how = "".join(f", {part}" for part in describe_samples(samples["metadata"]))
    return (
        f"{numbers} ({samples['count']:,} samples {samples['sha256'][:8]}{resized}{how}; reference "
        f"{reference['name']} {reference['sha256'][:8]}, {reference['statistics']}; {result['extractor']['name']} "
        f"{result['extractor']['sha256'][:8]}; st-ar {result['environment']['st_ar']}, torch {result['environment']['torch']})"
    )


SHOWN = 16
"""Samples in the HTML report of an evaluation."""


def evaluation_page(path: Path, result: dict[str, Any], samples: ImageSet) -> None:
    """Write the HTML report of `evaluate`'s result, with the first samples."""
    numbers = number_rows(result)
    classes = [
        [name, f"{of_class['recall']:.3f}", f"{of_class['samples']:,}"]
        for name, of_class in sorted(result.get("classes", {}).items(), key=lambda item: item[1]["recall"])
    ]
    pictures = [png_uri(pixels) for _, pixels in islice(samples.read(0, 1), SHOWN)]
    rows = [(f"from {first}", pictures[first : first + 8]) for first in range(0, len(pictures), 8)]
    gallery = Gallery(columns=[str(n) for n in range(min(8, len(pictures)))], rows=rows, caption="The first samples.")
    by_class = Table(columns=["class", "recall", "samples"], rows=classes)
    sections = [
        Section(title="Metrics", paragraphs=result["notes"], parts=[Table(columns=["", "value"], rows=numbers)]),
        *([Section(title="Classes, the least recognised first", parts=[by_class])] if classes else []),
        Section(title="To cite", commands=[one_line(result)]),
        Section(title="Samples", parts=[gallery]),
        provenance(result, ["samples", "reference", "extractor", "settings", "environment"]),
    ]
    measured, reference = result["samples"], result["reference"]
    lead = f"{measured['count']:,} samples of {measured['name']}, measured against {reference['name']}."
    write_report(path, title="Samples against a reference", lead=lead, sections=sections)
