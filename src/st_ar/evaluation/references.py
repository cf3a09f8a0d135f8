"""What samples are measured against: statistics of a data set, and some of its images for precision, recall and the like."""

import json
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from st_ar.errors import UserError
from st_ar.evaluation.collect import NEIGHBOURS, Collected, Place, collect
from st_ar.evaluation.extractors import Extractor
from st_ar.evaluation.image_sets import ImageSet, array_names, open_set, read_array
from st_ar.evaluation.statistics import Gaussian
from st_ar.files import parse_json, require_absent, sha256, written_aside
from st_ar.hardware import describe
from st_ar.settings import fits

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
    place: Place,
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
    path: Path, names: set[str], images: ImageSet | None, extractor: Extractor, metrics: Collection[str], place: Place
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
        complete = fits(meta, dict) and all(fits(meta.get(name), kind) for name, kind in DESCRIBED.items())
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        meta, complete = {}, False
    if not complete or len(meta["size"]) != 2 or not {"name", "sha256"} <= meta["extractor"].keys():
        raise UserError(f"{path} is damaged: its description is no JSON of ours; make it again by `st-ar reference`")
    if meta["format_version"] != FORMAT_VERSION:
        raise UserError(f"{path} has format {meta['format_version']}; this st-ar reads {FORMAT_VERSION}")
    return meta


def write_reference(
    spec: str, out: Path, extractor: Extractor, place: Place, *, size: int | None = None, seed: int = 0
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
        with written_aside(out) as aside, open(aside, "wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
    return meta


def _arrays(found: Collected) -> dict[str, np.ndarray]:
    arrays = {"arr_0": found.pixels.numpy(), "features": found.features.numpy()}
    arrays["mu"], arrays["sigma"] = found.statistics.result()
    if found.spatial is not None:
        arrays["mu_s"], arrays["sigma_s"] = found.spatial.result()
    return arrays
