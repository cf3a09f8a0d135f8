"""Samples against a reference: the numbers that papers quote, each named for what it is, with all that identifies it."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from st_ar.errors import UserError
from st_ar.evaluation.collect import NEIGHBOURS, Collected, Place, collect
from st_ar.evaluation.extractors import Extractor
from st_ar.evaluation.image_sets import ImageSet
from st_ar.evaluation.manifolds import blocks_of, compare
from st_ar.evaluation.metrics import frechet_distance, kernel_distance
from st_ar.evaluation.names import Metric
from st_ar.evaluation.references import Reference
from st_ar.hardware import describe
from st_ar.progress import progress

K, DENSITY_K = 3, 5
"""Which neighbour gives a ball its radius: for precision and recall, for density and coverage."""
SPLIT = 5000
"""Images of a split of IS."""
SUBSETS, SUBSET_SIZE = 100, 1000
"""Of KID."""


def choose_metrics(metrics: Sequence[Metric], extractor_is_inception: bool) -> list[Metric]:
    """The metrics in one order and without repeats; the five of ADM's suite by default, and of them those another network has.

    Raises:
        UserError: one that has a meaning with Inception's features alone.
    """
    if not metrics:
        metrics = (
            ["fid", "sfid", "is", "precision", "recall"] if extractor_is_inception else ["fd", "precision", "recall"]
        )
    if not extractor_is_inception:
        for metric, instead in (("fid", ": give --metrics fd for this network's own"), ("sfid", ""), ("is", "")):
            if metric in metrics:
                raise UserError(
                    f"--metrics {metric} is of Inception's features alone{instead}; or give --extractor inception"
                )
    order: list[Metric] = ["fid", "fd", "sfid", "is", "kid", "precision", "recall", "density", "coverage"]
    return [metric for metric in order if metric in metrics and not (metric == "fd" and "fid" in metrics)]


def is_class_sorted(images: ImageSet) -> bool:
    """Whether images come class by class, so that a split of IS lacks classes."""
    labels = images.labels
    if labels is None or len(labels) <= SPLIT:
        return False
    return bool((np.diff(labels) >= 0).all()) and 1 < len(np.unique(labels)) < len(labels) / 2


def check_sizes(samples: tuple[int, int], size: tuple[int, int], resize: int | None) -> None:
    """Refuse samples of another height and width than the reference's, unless a resize to just that is asked for."""
    evaluated = samples if resize is None else (resize, resize)
    if evaluated != size:
        was = "x".join(map(str, samples)) + (f" (resized to {resize})" if resize is not None else "")
        raise UserError(
            f"the samples have {was} pixels, the reference {size[0]}x{size[1]}: give a reference of the samples' size, or --resize "
            f"{size[0]} to have them resized bicubically, as LlamaGen's evaluation does"
        )


def evaluate(
    samples: ImageSet,
    reference: Reference,
    extractor: Extractor,
    metrics: Sequence[Metric],
    place: Place,
    *,
    resize: int | None = None,
    seed: int = 0,
    shuffle_seed: int | None = None,
) -> dict[str, Any]:
    """Measure samples; the same on all ranks.

    Args:
        metrics: of `choose_metrics`.
        resize: side in pixels to which the samples are resized first.
        seed: of KID's subsets.
        shuffle_seed: shuffles the order in which IS splits the samples.

    Returns:
        metrics (label -> number), samples, reference, extractor, settings, notes, environment.

    Raises:
        UserError: sizes that differ, too few images, or damaged ones.
    """
    if reference.size is not None:
        check_sizes(samples.size, reference.size, resize)
    assert samples.count is not None
    order = None if shuffle_seed is None else np.random.default_rng(shuffle_seed).permutation(samples.count)
    found = collect(samples, extractor, metrics, place, resize=resize, order=order)
    notes: list[str] = []
    if "is" in metrics and shuffle_seed is None and is_class_sorted(samples):
        notes.append(
            f"the samples are sorted by class, so that each split of {SPLIT:,} lacks classes and IS is far too low: give --shuffle-seed"
        )
    if found.count < 10_000 and not {"fid", "fd", "sfid"}.isdisjoint(metrics):
        notes.append(f"Frechet distances of {found.count:,} samples are biased upwards and compare with none of 50,000")
    numbers = _numbers(found, reference, metrics, place, seed)
    settings: dict[str, Any] = {"seed": seed, "k": K, "density_k": DENSITY_K}
    if "is" in metrics:
        shuffled = "as given" if shuffle_seed is None else f"shuffled with seed {shuffle_seed}"
        settings |= {"is_split": SPLIT, "is_order": shuffled}
    if "kid" in metrics:
        size = min(SUBSET_SIZE, found.count, len(reference.features))
        settings |= {"kid_subsets": SUBSETS, "kid_subset_size": size}
        if found.count == len(reference.features) == size:
            notes.append("KID's subsets are all images of either set, always the same: its std says nothing")
    return {
        "metrics": {extractor.label(name): value for name, value in numbers.items()},
        "samples": {
            "name": samples.name,
            "count": found.count,
            "sha256": found.content,
            "size": list(samples.size),
            "resized_to": resize,
            "metadata": samples.metadata,
        },
        "reference": {
            "name": reference.name,
            "sha256": reference.content,
            "statistics": reference.statistics,
            "neighbours": len(reference.features),
            "size": None if reference.size is None else list(reference.size),
        },
        "extractor": {"name": extractor.name, "sha256": extractor.weights},
        "settings": settings,
        "notes": notes,
        "environment": describe(),
    }


def _numbers(
    found: Collected, reference: Reference, metrics: Sequence[Metric], place: Place, seed: int
) -> dict[str, float]:
    numbers: dict[str, float] = {}
    for name in ("fid", "fd"):
        if name in metrics:
            numbers[name] = frechet_distance(*reference.gaussian, *found.statistics.result())
    if found.spatial is not None and reference.spatial is not None:
        numbers["sfid"] = frechet_distance(*reference.spatial, *found.spatial.result())
    if found.score is not None:
        numbers["is"] = found.score.result()
    first = place.ranks.rank == 0
    if NEIGHBOURS.intersection(metrics):
        real, drawn = reference.features.to(place.device), found.features.to(place.device)
        if "kid" in metrics:
            with progress("KID", SUBSETS, unit="subsets", shown=first) as bar:
                numbers["kid"], numbers["kid std"] = kernel_distance(
                    real, drawn, subsets=SUBSETS, subset_size=SUBSET_SIZE, seed=seed, advance=bar.advance
                )
        wants = [{"precision", "recall"}.intersection(metrics), {"density", "coverage"}.intersection(metrics)]
        if any(wants):
            chosen = {"k": K if wants[0] else None, "density_k": DENSITY_K if wants[1] else None}
            total = blocks_of(len(real), len(drawn), bool(wants[0]))
            with progress("neighbours", total, unit="blocks", shown=first) as bar:
                pairs = compare(real, drawn, **chosen, advance=bar.advance)
            for pair in pairs:
                numbers |= {name: value for name, value in (pair._asdict() if pair else {}).items() if name in metrics}
    return numbers


def describe_samples(metadata: dict[str, Any]) -> list[str]:
    """What identifies samples, from the metadata that `st-ar sample` leaves beside them."""
    settings, weights = metadata.get("settings"), metadata.get("weights")
    parts: list[str] = []
    if isinstance(settings, dict):
        names = {
            "cfg_scale": "guidance",
            "temperature": "temperature",
            "top_k": "top-k",
            "top_p": "top-p",
            "seed": "seed",
        }
        parts += [f"{name} {settings[key]}" for key, name in names.items() if key in settings]
        if (schedule := settings.get("cfg_schedule", "constant")) != "constant":
            power = f" of power {settings.get('cfg_power')}" if schedule == "power-cosine" else ""
            parts.append(f"{schedule} guidance schedule{power}")
        if settings.get("cfg_interval", -1) != -1:
            parts.append(f"guidance interval {settings['cfg_interval']}")
    mode = metadata.get("label_mode", settings.get("label_mode") if isinstance(settings, dict) else None)
    if mode is not None:
        parts.append(f"{mode} labels")
    if isinstance(weights, dict):
        parts.append(f"{'EMA' if weights.get('ema') else 'live'} weights {str(weights.get('sha256'))[:8]}")
    return parts


def format_number(label: str, value: float) -> str:
    """A metric as tables have it."""
    if label.startswith(("precision", "recall", "density", "coverage", "SSIM", "codebook usage")):
        return f"{value:.4f}"
    return f"{value:.5f}" if label.startswith(("KID", "KD", "kid")) else f"{value:.3f}"


def one_line(result: dict[str, Any]) -> str:
    """All of a result that a paper needs, in a line."""
    numbers = ", ".join(f"{label} {format_number(label, value)}" for label, value in result["metrics"].items())
    samples, reference = result["samples"], result["reference"]
    resized = f" resized to {samples['resized_to']} px" if samples["resized_to"] else ""
    how = "".join(f", {part}" for part in describe_samples(samples["metadata"]))
    return (
        f"{numbers} ({samples['count']:,} samples {samples['sha256'][:8]}{resized}{how}; reference "
        f"{reference['name']} {reference['sha256'][:8]}, {reference['statistics']}; {result['extractor']['name']} "
        f"{result['extractor']['sha256'][:8]}; st-ar {result['environment']['st_ar']}, torch {result['environment']['torch']})"
    )
