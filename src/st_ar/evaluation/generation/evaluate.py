"""`st-ar evaluate` and `st-ar reference`: statistics of images, and metrics of samples against them."""

import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from st_ar.config import Metric
from st_ar.errors import UserError, damaged
from st_ar.evaluation.generation.features import NEIGHBOURS, Collected, Compute, Extractor, collect
from st_ar.evaluation.generation.image_sets import ImageSet, array_names, open_set, read_array
from st_ar.evaluation.metrics import Gaussian, blocks_of, compare, frechet_distance, kernel_distance
from st_ar.files import atomic_write, parse_json, require_absent, sha256
from st_ar.hardware import describe
from st_ar.progress import progress
from st_ar.report import Gallery, Section, Table, identified, png_uri, write_report
from st_ar.settings import matches_type

FORMAT_VERSION = 1
META = "st_ar"
"""The array that marks a file of ours: JSON as text."""
DESCRIBED: dict[str, Any] = {
    "format_version": int,
    "extractor": dict[str, str],
    "size": list[int],
    "content": str,
    "images": int,
    "source": str,
}
"""What it has to say."""
KEEP = 10_000
"""Images of the reference that precision, recall, density, coverage and KID read, as in ADM's batches."""


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What an evaluation compares with."""

    name: str
    content: str
    """SHA-256: of the file for a batch of ADM's, else over the images (Collected.content)."""
    statistics: str
    """What mean and covariance are of."""
    size: tuple[int, int] | None
    """Height and width of its images in pixels; None of statistics that say nothing of it."""
    gaussian: Gaussian
    spatial: Gaussian | None
    features: Tensor
    """float32 [n, D]; empty if no metric needs them."""


def open_reference(
    spec: str,
    extractor: Extractor,
    metrics: Collection[str],
    place: Compute,
    *,
    size: int | None = None,
    seed: int = 0,
    check: Callable[[tuple[int, int]], None] = lambda _: None,
) -> Reference:
    """Statistics made by `st-ar reference`, a batch of ADM's, statistics for FID alone (mu and sigma), or any images, whose
    features are computed here.

    Args:
        size: as for `open_set`. seed: draws the images that neighbours are looked for among, if there are more than KEEP.
        check: refuses images of a height and width that do not suit, before any feature is computed.

    Raises:
        UserError: nothing there, damaged, or made with another extractor.
    """
    path = Path(spec).expanduser()
    names = array_names(path) if path.is_file() and path.suffix == ".npz" else set[str]()
    if META in names:
        return _read_ours(path, extractor, metrics, size, check)
    adm = {"mu", "sigma"} <= names and extractor.is_inception
    if adm and "arr_0" not in names:
        if needed := NEIGHBOURS.intersection(metrics):
            raise UserError(f"{path} has statistics and no images: leave {' '.join(sorted(needed))} out of --metrics")
        return _read_adm(path, names, None, extractor, metrics, place)
    images = open_set(spec, size=size)
    check(images.size)
    keep = KEEP if NEIGHBOURS.intersection(metrics) else 0
    if adm:
        return _read_adm(path, names, images, extractor, metrics, place)
    found = collect(images, extractor, {m for m in metrics if m != "is"}, place, keep=keep, seed=seed)
    return Reference(
        name=images.name,
        content=found.content,
        statistics=f"{found.count:,} images",
        size=images.size,
        gaussian=found.statistics.result(),
        spatial=found.spatial.result() if found.spatial else None,
        features=found.features,
    )


def _gaussian(path: Path, mean: str, covariance: str, dim: int) -> Gaussian:
    found = Gaussian(read_array(path, mean), read_array(path, covariance))
    if found.mean.shape != (dim,) or found.covariance.shape != (dim, dim):
        shapes = f"{list(found.mean.shape)} and {list(found.covariance.shape)}"
        raise UserError(f"{path}: {mean} and {covariance} have the shapes {shapes}, not [{dim}] and [{dim}, {dim}]")
    if not all(array.dtype.kind == "f" and np.isfinite(array).all() for array in found):
        raise UserError(f"{path}: {mean} or {covariance} holds NaN or infinity, or no floats: copy or make it again")
    return Gaussian(*(array.astype(np.float64) for array in found))


def _read_adm(
    path: Path, names: set[str], images: ImageSet | None, extractor: Extractor, metrics: Collection[str], place: Compute
) -> Reference:
    if "sfid" in metrics and not {"mu_s", "sigma_s"} <= names:
        raise UserError(f"{path} has mu and sigma but no mu_s and sigma_s: leave sfid out of --metrics")
    features = torch.empty(0, extractor.dim)
    if images and (needed := NEIGHBOURS.intersection(metrics)):
        features = collect(images, extractor, needed, place).features
    return Reference(
        name=str(path),
        content=sha256(path),
        statistics="mu and sigma in the file",
        size=images.size if images else None,
        gaussian=_gaussian(path, "mu", "sigma", extractor.dim),
        spatial=_gaussian(path, "mu_s", "sigma_s", extractor.spatial_dim) if "sfid" in metrics else None,
        features=features,
    )


def _read_ours(
    path: Path,
    extractor: Extractor,
    metrics: Collection[str],
    size: int | None,
    check: Callable[[tuple[int, int]], None],
) -> Reference:
    meta = read_meta(path)
    if meta["extractor"] != {"name": extractor.name, "sha256": extractor.weights}:
        raise UserError(
            f"{path} was made with {meta['extractor']['name']} (weights {meta['extractor']['sha256'][:8]}), and this is {extractor.name} "
            f"({extractor.weights[:8]}): make it again, or give its --extractor"
        )
    height, width = meta["size"]
    if size is not None and (height, width) != (size, size):
        raise UserError(f"{path} is of images of {height} x {width} pixels, --size is {size}: leave --size out")
    check((height, width))
    features = _features(path, extractor.dim) if NEIGHBOURS.intersection(metrics) else None
    return Reference(
        name=f"{path} ({meta['source']})",
        content=meta["content"],
        statistics=f"{meta['images']:,} images",
        size=(height, width),
        gaussian=_gaussian(path, "mu", "sigma", extractor.dim),
        spatial=_gaussian(path, "mu_s", "sigma_s", extractor.spatial_dim) if "sfid" in metrics else None,
        features=torch.empty(0, extractor.dim) if features is None else features,
    )


def _features(path: Path, dim: int) -> Tensor:
    found = read_array(path, "features")
    if found.dtype != np.float32 or found.ndim != 2 or found.shape[1] != dim:
        raise UserError(
            f"{path}: features are {found.dtype} {list(found.shape)}, not float32 [n, {dim}]: make it again"
        )
    return torch.from_numpy(found)


def read_meta(path: Path) -> dict[str, Any]:
    """What a file of `st-ar reference` says of itself."""
    try:
        meta = parse_json(str(read_array(path, META)))
        complete = matches_type(meta, dict) and all(
            matches_type(meta.get(name), kind) for name, kind in DESCRIBED.items()
        )
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        meta, complete = {}, False
    if not complete or len(meta["size"]) != 2 or not {"name", "sha256"} <= meta["extractor"].keys():
        raise damaged(path, "its description is no JSON of ours", "make it again by `st-ar reference`")
    if meta["format_version"] != FORMAT_VERSION:
        raise UserError(f"{path} has format {meta['format_version']}; this st-ar reads {FORMAT_VERSION}")
    return meta


def write_reference(
    spec: str, out: Path, extractor: Extractor, place: Compute, *, size: int | None = None, seed: int = 0
) -> dict[str, Any]:
    """Compute a data set's statistics once and write them (rank 0), whole or not at all; returns the file's description.

    The file has the arrays of ADM's batches (mu, sigma, with Inception mu_s and sigma_s, and arr_0: up to KEEP images drawn with
    the seed), their features, and a description.

    Raises:
        UserError: `out` exists or is no .npz file, or as `open_set` and `collect`.
    """
    if out.suffix != ".npz":
        raise UserError(f"--out {out}: statistics are written to a .npz file")
    if place.ranks.rank == 0:
        require_absent(out, "a reference")
    images = open_set(spec, size=size)
    metrics = {"precision", *(["sfid"] if extractor.spatial_dim else [])}
    found = collect(images, extractor, metrics, place, keep=KEEP, seed=seed, with_pixels=True)
    meta = {
        "format_version": FORMAT_VERSION,
        "source": images.name,
        "images": found.count,
        "size": list(images.size),
        "content": found.content,
        "extractor": {"name": extractor.name, "sha256": extractor.weights},
        "seed": seed,
        "environment": describe(),
    }
    arrays = _arrays(found) | {META: np.array(json.dumps(meta))}
    if place.ranks.rank == 0:
        with atomic_write(out) as aside, open(aside, "wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
    return meta


def _arrays(found: Collected) -> dict[str, np.ndarray]:
    arrays = {"arr_0": found.pixels.numpy(), "features": found.features.numpy()}
    arrays["mu"], arrays["sigma"] = found.statistics.result()
    if found.spatial is not None:
        arrays["mu_s"], arrays["sigma_s"] = found.spatial.result()
    return arrays


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
    place: Compute,
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
    found: Collected, reference: Reference, metrics: Sequence[Metric], place: Compute, seed: int
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


SHOWN = 16
"""Samples on the page of an evaluation."""


def evaluation_page(path: Path, result: dict[str, Any], samples: ImageSet) -> None:
    """Write the page of `evaluate`'s result, with the first samples.

    Raises:
        UserError: jinja2 is not installed, or the page cannot be written.
    """
    numbers = [[name, format_number(name, value)] for name, value in result["metrics"].items()]
    pictures = [png_uri(pixels) for _, pixels in islice(samples.read(0, 1), SHOWN)]
    rows = [(f"from {first}", pictures[first : first + 8]) for first in range(0, len(pictures), 8)]
    gallery = Gallery(columns=[str(n) for n in range(min(8, len(pictures)))], rows=rows, caption="The first samples.")
    sections = [
        Section(title="Numbers", paragraphs=result["notes"], parts=[Table(columns=["", "value"], rows=numbers)]),
        Section(title="In a line, for a paper", commands=[one_line(result)]),
        Section(title="Samples", parts=[gallery]),
        identified(result, ["samples", "reference", "extractor", "settings", "environment"]),
    ]
    about = result["samples"], result["reference"]
    lead = f"{about[0]['count']:,} samples of {about[0]['name']}, measured against {about[1]['name']}."
    write_report(path, title="Samples against a reference", lead=lead, sections=sections)
