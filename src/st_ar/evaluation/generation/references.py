"""References of `st-ar evaluate`: statistics and features of real images, computed, written and read."""

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from st_ar.data.skipped import SkippedImages
from st_ar.errors import UserError, damaged
from st_ar.evaluation.generation.features import NEIGHBOURS, Compute, Extractor, collect
from st_ar.evaluation.generation.image_sets import ImageSet, array_names, open_set, read_array
from st_ar.evaluation.metrics import Gaussian, require_bounded
from st_ar.files import atomic_write, parse_json, require_absent, sha256
from st_ar.hardware import describe
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
    """Notes for the user on its images."""


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
    needed = set(metrics) - {"is", "class-accuracy"}  # which need no reference
    collected = collect(images, extractor, needed, compute, keep=keep, seed=seed)
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
    images: ImageSet,
    out: Path,
    extractor: Extractor,
    compute: Compute,
    *,
    seed: int = 0,
) -> dict[str, Any]:
    """Compute a data set's statistics and write them to a .npz file (on rank 0); returns the file's description.

    The file has the arrays of ADM's batches: mu, sigma, arr_0 with a random subset of KEEP images, and for Inception mu_s and
    sigma_s. It also has the subset's features and the description.

    Raises:
        UserError: `out` exists or is not a .npz file; or as `collect`.
    """
    if out.suffix != ".npz":
        raise UserError(f"--out {out} is not a .npz file: give a name that ends in .npz")
    if compute.ranks.rank == 0:
        require_absent(out, "a reference")
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
