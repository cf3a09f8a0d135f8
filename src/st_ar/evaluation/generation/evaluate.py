"""`st-ar evaluate` and `st-ar reference`: statistics of images, and metrics of samples against them."""

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from st_ar.config import Metric
from st_ar.data.skipped import SkippedImages
from st_ar.errors import UserError, damaged
from st_ar.evaluation.generation.features import NEIGHBOURS, Collected, Compute, Extractor, collect
from st_ar.evaluation.generation.image_sets import ImageSet, array_names, open_set, read_array
from st_ar.evaluation.metrics import (
    Gaussian,
    compare,
    count_blocks,
    frechet_distance,
    kernel_distance,
    require_bounded,
)
from st_ar.files import atomic_write, parse_json, require_absent, sha256
from st_ar.hardware import describe
from st_ar.progress import progress
from st_ar.report import Gallery, Section, Table, png_uri, provenance, write_report
from st_ar.settings import matches_type

FORMAT_VERSION = 1
META = "st_ar"
"""The array that holds a reference file's description: JSON as text."""
META_FIELDS: dict[str, Any] = {
    "format_version": int,
    "extractor": dict[str, str],
    "size": list[int],
    "content": str,
    "images": int,
    "source": str,
    "skipped": int,
    "skipped_images": list[dict[str, Any]],
    "notes": list[str],
}
NONE_SKIPPED: dict[str, Any] = SkippedImages().describe()
KEEP = 10_000
"""Reference images for precision, recall, density, coverage and KID, as in ADM's batches."""


@dataclass(frozen=True, kw_only=True)
class Reference:
    """The statistics and features that samples are compared with."""

    name: str
    content: str
    """SHA-256 of the file for ADM's batches, else of the images (Collected.content)."""
    statistics: str
    """Source of the mean and covariance, for the reader."""
    size: tuple[int, int] | None
    """Height and width of the images in pixels; None if unknown."""
    gaussian: Gaussian
    spatial: Gaussian | None
    features: Tensor
    """float32 [n, D]; empty if no metric needs them."""
    skipped: Mapping[str, Any] = field(default_factory=lambda: NONE_SKIPPED)
    """The images left out (SkippedImages.describe)."""
    notes: Sequence[str] = ()
    """What the user should know about its images."""


def open_reference(
    spec: str,
    extractor: Extractor,
    metrics: Collection[str],
    compute: Compute,
    *,
    size: int | None = None,
    seed: int = 0,
    max_skipped: float = 0.01,
    check: Callable[[tuple[int, int]], None] = lambda _: None,
) -> Reference:
    """Open a file of `st-ar reference`, an ADM batch, statistics (mu and sigma), or images, whose features are computed here.

    Args:
        size, max_skipped: as for `open_set`. seed: selects KEEP images for the metrics that compare features.
        check: called with the images' height and width before any feature is computed; raises if they do not fit.

    Raises:
        UserError: the file is missing, damaged, or made with another extractor.
    """
    path = Path(spec).expanduser()
    names = array_names(path) if path.is_file() and path.suffix == ".npz" else set[str]()
    if META in names:
        return _read_ours(path, extractor, metrics, size, check)
    needed = NEIGHBOURS.intersection(metrics)
    adm = {"mu", "sigma"} <= names and extractor.is_inception
    if adm and needed and "arr_0" not in names:
        raise UserError(f"{path} has statistics but no images: leave {' '.join(sorted(needed))} out of --metrics")
    images = None if adm and "arr_0" not in names else open_set(spec, size=size, max_skipped=max_skipped)
    if images is not None:
        check(images.size)
    if adm or images is None:
        if "sfid" in metrics and not {"mu_s", "sigma_s"} <= names:
            raise UserError(f"{path} has mu and sigma but no mu_s and sigma_s: leave sfid out of --metrics")
        features = collect(images, extractor, needed, compute).features if images and needed else None
        return _read_statistics(path, extractor, metrics, images.size if images else None, features)
    keep = KEEP if needed else 0
    collected = collect(images, extractor, {m for m in metrics if m != "is"}, compute, keep=keep, seed=seed)
    return Reference(
        name=images.name,
        content=collected.content,
        statistics=f"{collected.count:,} images",
        size=images.size,
        gaussian=collected.statistics.result(),
        spatial=collected.spatial.result() if collected.spatial else None,
        features=collected.features,
        skipped=collected.skipped.describe(),
        notes=collected.notes,
    )


def _gaussian(path: Path, suffix: str, dim: int) -> Gaussian:
    """Read the arrays mu and sigma, or mu_s and sigma_s."""
    names = f"mu{suffix}", f"sigma{suffix}"
    mean, covariance = (read_array(path, name) for name in names)
    if mean.shape != (dim,) or covariance.shape != (dim, dim):
        shapes = f"{list(mean.shape)} and {list(covariance.shape)}"
        raise UserError(f"{path}: {' and '.join(names)} have the shapes {shapes}, not [{dim}] and [{dim}, {dim}]")
    if not all(array.dtype.kind == "f" and np.isfinite(array).all() for array in (mean, covariance)):
        raise UserError(f"{path}: {' or '.join(names)} holds NaN, infinity or integers: copy or make it again")
    return Gaussian(mean.astype(np.float64), covariance.astype(np.float64))


def _read_statistics(
    path: Path,
    extractor: Extractor,
    metrics: Collection[str],
    size: tuple[int, int] | None,
    features: Tensor | None,
    meta: Mapping[str, Any] | None = None,
) -> Reference:
    """Return a reference with a file's mean and covariance; `meta` is the description in a file of `st-ar reference`."""
    return Reference(
        name=f"{path} ({meta['source']})" if meta else str(path),
        content=meta["content"] if meta else sha256(path),
        statistics=f"{meta['images']:,} images" if meta else "mu and sigma in the file",
        size=size,
        gaussian=_gaussian(path, "", extractor.dim),
        spatial=_gaussian(path, "_s", extractor.spatial_dim) if "sfid" in metrics else None,
        features=torch.empty(0, extractor.dim) if features is None else features,
        skipped={name: meta[name] for name in ("skipped", "skipped_images")} if meta else NONE_SKIPPED,
        notes=meta["notes"] if meta else (),
    )


def _read_ours(
    path: Path,
    extractor: Extractor,
    metrics: Collection[str],
    size: int | None,
    check: Callable[[tuple[int, int]], None],
) -> Reference:
    meta = read_meta(path)
    if meta["extractor"] != extractor.identity:
        raise UserError(
            f"{path} was made with {meta['extractor']['name']} (weights {meta['extractor']['sha256'][:8]}), not with {extractor.name} "
            f"({extractor.weights[:8]}): make it again, or give its --extractor"
        )
    height, width = meta["size"]
    if size is not None and (height, width) != (size, size):
        raise UserError(f"{path} has images of {height} x {width} pixels, --size is {size}: leave --size out")
    check((height, width))
    features = None
    if NEIGHBOURS.intersection(metrics):
        array = read_array(path, "features")
        if array.dtype != np.float32 or array.ndim != 2 or array.shape[1] != extractor.dim:
            found = f"{array.dtype} {list(array.shape)}"
            raise UserError(f"{path}: features are {found}, not float32 [n, {extractor.dim}]: make it again")
        features = torch.from_numpy(array)
        require_bounded(features, lambda row: f"image {row} of {path}", "make it again")
    return _read_statistics(path, extractor, metrics, (height, width), features, meta)


def read_meta(path: Path) -> dict[str, Any]:
    """Return the description in a file of `st-ar reference`."""
    text = str(read_array(path, META))
    try:
        meta: dict[str, Any] = {**NONE_SKIPPED, "notes": [], **parse_json(text)}  # older files lack the first
    except (ValueError, TypeError):
        meta = {}
    if (
        not all(matches_type(meta.get(name), kind) for name, kind in META_FIELDS.items())
        or len(meta["size"]) != 2
        or not {"name", "sha256"} <= meta["extractor"].keys()
    ):
        raise damaged(path, "its description is invalid", "make it again with `st-ar reference`")
    if meta["format_version"] != FORMAT_VERSION:
        raise UserError(f"{path} has format {meta['format_version']}; this st-ar reads {FORMAT_VERSION}")
    return meta


def write_reference(
    spec: str,
    out: Path,
    extractor: Extractor,
    compute: Compute,
    *,
    size: int | None = None,
    seed: int = 0,
    max_skipped: float = 0.01,
) -> dict[str, Any]:
    """Compute a data set's statistics and write them to a .npz file (on rank 0); returns the file's description.

    The file has the arrays of ADM's batches: mu, sigma, arr_0 with a random subset of KEEP images, and for Inception mu_s and
    sigma_s. It also has the subset's features and the description.

    Raises:
        UserError: `out` exists or is not a .npz file; or as `open_set` and `collect`.
    """
    if out.suffix != ".npz":
        raise UserError(f"--out {out} is not a .npz file: give a name that ends in .npz")
    if compute.ranks.rank == 0:
        require_absent(out, "a reference")
    images = open_set(spec, size=size, max_skipped=max_skipped)
    metrics = {"precision", *(["sfid"] if extractor.spatial_dim else [])}
    collected = collect(images, extractor, metrics, compute, keep=KEEP, seed=seed, with_pixels=True)
    meta = {
        "format_version": FORMAT_VERSION,
        "source": images.name,
        "images": collected.count,
        "size": list(images.size),
        "content": collected.content,
        "extractor": extractor.identity,
        "seed": seed,
        **collected.skipped.describe(),
        "notes": list(collected.notes),
        "environment": describe(),
    }
    arrays = {"arr_0": collected.pixels.numpy(), "features": collected.features.numpy()}
    arrays["mu"], arrays["sigma"] = collected.statistics.result()
    if collected.spatial is not None:
        arrays["mu_s"], arrays["sigma_s"] = collected.spatial.result()
    arrays[META] = np.array(json.dumps(meta))
    if compute.ranks.rank == 0:
        with atomic_write(out) as aside, open(aside, "wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
    return meta


K, DENSITY_K = 3, 5
"""The neighbour whose distance is a ball's radius: for precision and recall, for density and coverage."""
SPLIT = 5000
"""Images per split of IS."""
SUBSETS, SUBSET_SIZE = 100, 1000
"""Subsets of KID, and images per subset."""


def choose_metrics(metrics: Sequence[Metric], extractor_is_inception: bool) -> list[Metric]:
    """Return the metrics in a fixed order, without repeats. The default is ADM's suite, or the part that the extractor supports."""
    if not metrics:
        metrics = (
            ["fid", "sfid", "is", "precision", "recall"] if extractor_is_inception else ["fd", "precision", "recall"]
        )
    if not extractor_is_inception:
        for metric, instead in (("fid", " or --metrics fd"), ("sfid", ""), ("is", "")):
            if metric in metrics:
                raise UserError(f"--metrics {metric} needs Inception's features: give --extractor inception{instead}")
    order: list[Metric] = ["fid", "fd", "sfid", "is", "kid", "precision", "recall", "density", "coverage"]
    return [metric for metric in order if metric in metrics and not (metric == "fd" and "fid" in metrics)]


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
        metrics (label -> number), samples, reference, extractor, settings, notes, environment.

    Raises:
        UserError: sizes that differ, too few images, or damaged images.
    """
    if reference.size is not None:
        check_sizes(samples.size, reference.size, resize)
    assert samples.count is not None
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
    if label.startswith(("precision", "recall", "density", "coverage", "SSIM", "codebook usage")):
        return f"{value:.4f}"
    return f"{value:.5f}" if label.startswith(("KID", "KD", "kid")) else f"{value:.3f}"


def one_line(result: dict[str, Any]) -> str:
    """Return a result in one line: the numbers and all that identifies them."""
    numbers = ", ".join(f"{label} {format_number(label, value)}" for label, value in result["metrics"].items())
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
    numbers = [[name, format_number(name, value)] for name, value in result["metrics"].items()]
    pictures = [png_uri(pixels) for _, pixels in islice(samples.read(0, 1), SHOWN)]
    rows = [(f"from {first}", pictures[first : first + 8]) for first in range(0, len(pictures), 8)]
    gallery = Gallery(columns=[str(n) for n in range(min(8, len(pictures)))], rows=rows, caption="The first samples.")
    sections = [
        Section(title="Metrics", paragraphs=result["notes"], parts=[Table(columns=["", "value"], rows=numbers)]),
        Section(title="To cite", commands=[one_line(result)]),
        Section(title="Samples", parts=[gallery]),
        provenance(result, ["samples", "reference", "extractor", "settings", "environment"]),
    ]
    measured, reference = result["samples"], result["reference"]
    lead = f"{measured['count']:,} samples of {measured['name']}, measured against {reference['name']}."
    write_report(path, title="Samples against a reference", lead=lead, sections=sections)
