"""One pass over a set of images: statistics of their features, some of the features themselves, and the set's content hash.

Works on one rank or on several, each with its share of the images; what comes out is the same on all of them.
"""

import hashlib
import heapq
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from st_ar.distributed import Ranks, joined
from st_ar.errors import UserError
from st_ar.evaluation.extractors import Extractor
from st_ar.evaluation.image_sets import ImageSet
from st_ar.evaluation.statistics import FeatureStatistics, InceptionScore
from st_ar.hardware import freed_memory_kept
from st_ar.progress import progress
from st_ar.randomness import Purpose

NEIGHBOURS = frozenset({"precision", "recall", "density", "coverage", "kid"})
"""Metrics that need features, not only their statistics."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where and in what portions to compute."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    ranks: Ranks = field(default_factory=Ranks)
    batch_size: int = 64
    """Images at once; features depend on it by rounding alone."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UserError(f"--batch-size must be at least 1, not {self.batch_size}")


@dataclass(kw_only=True)
class Collected:
    """What one pass found; the same on all ranks."""

    count: int
    """Images that could be used."""
    content: str
    """SHA-256 over the SHA-256 of each image's size and pixels, in order: whatever the images are stored in."""
    statistics: FeatureStatistics
    spatial: FeatureStatistics | None
    score: InceptionScore | None
    features: Tensor
    """float32 [n, D], those that were to be kept, in the order of their images."""
    pixels: Tensor
    """uint8 [n, H, W, 3], the same images', if they were to be kept."""


def image_digest(pixels: np.ndarray) -> bytes:
    """SHA-256 of an image uint8 [H, W, 3]: its size as text and its bytes."""
    header = f"{pixels.shape[0]} {pixels.shape[1]} ".encode()
    return hashlib.sha256(header + np.ascontiguousarray(pixels).tobytes()).digest()


def resize_as_llamagen(images: Tensor, side: int) -> Tensor:
    """LlamaGen's bicubic resize before evaluation (no smoothing), from and to uint8 [B, H, W, 3]."""
    resized = F.interpolate(images.permute(0, 3, 1, 2).float(), (side, side), mode="bicubic", align_corners=False)
    return resized.add_(0.5).clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


class _Chosen:
    """Of a rank's images those with the smallest of random numbers that depend on the seed and an image's index alone."""

    def __init__(self, keep: int | None, seed: int, with_pixels: bool) -> None:
        self.keep, self.seed, self.with_pixels = keep, seed, with_pixels
        self.heap: list[tuple[int, int, Tensor, Tensor]] = []  # (less the number, index, features, pixels)

    def add(self, index: int, features: Tensor, pixels: Tensor) -> None:
        drawn = np.random.SeedSequence([self.seed, Purpose.EVALUATION, index]).generate_state(1, np.uint64)[0]
        number = -(int(drawn) >> 1)
        full = self.keep is not None and len(self.heap) >= self.keep
        if full and (not self.heap or (number, index) < self.heap[0][:2]):
            return
        # copies: a view would keep its whole batch alive
        kept = pixels.clone() if self.with_pixels else torch.empty(0, *pixels.shape[1:], dtype=pixels.dtype)
        push = heapq.heapreplace if full else heapq.heappush
        push(self.heap, (number, index, features.clone(), kept))

    def gather(self, dim: int, size: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
        """Features and pixels of the chosen of all ranks, in the order of their images."""
        numbers = torch.tensor([(-entry[0], entry[1]) for entry in self.heap], dtype=torch.int64).reshape(-1, 2)
        features = torch.stack([e[2] for e in self.heap]) if self.heap else torch.empty(0, dim)
        pixels = torch.stack([e[3] for e in self.heap]) if self.heap else torch.empty(0, *size, 3, dtype=torch.uint8)
        self.heap = []
        numbers, features = (joined(t.to(device)).cpu() for t in (numbers, features))
        best = numbers[:, 0].argsort()[: self.keep]
        best = best[numbers[best, 1].argsort()]
        if self.with_pixels:
            pixels = joined(pixels.to(device)).cpu()[best]
        return features[best], pixels


def batches(images: ImageSet, place: Place) -> Iterator[tuple[list[int], np.ndarray]]:
    """A rank's images with their indices, `batch_size` at once: uint8 [b, H, W, 3]."""
    indices: list[int] = []
    pixels: list[np.ndarray] = []
    for index, image in images.read(place.ranks.rank, place.ranks.world):
        indices.append(index)
        pixels.append(image)
        if len(indices) == place.batch_size:
            yield indices, np.stack(pixels)
            indices, pixels = [], []
    if indices:
        yield indices, np.stack(pixels)


@freed_memory_kept()
def collect(
    images: ImageSet,
    extractor: Extractor,
    metrics: Collection[str],
    place: Place,
    *,
    keep: int | None = None,
    seed: int = 0,
    with_pixels: bool = False,
    resize: int | None = None,
    order: np.ndarray | None = None,
) -> Collected:
    """Read all images once and take what the metrics need.

    Args:
        keep: features (and pixels) of so many images are kept, drawn with `seed`; of all if None; none if no metric needs them.
        resize: side in pixels to which images are resized first, LlamaGen's way.
        order: int64 [N], each image's place in the splits of IS; by default its index.

    Raises:
        UserError: no image that can be used, or images or features that are damaged.
    """
    statistics = FeatureStatistics(extractor.dim, place.device)
    spatial = FeatureStatistics(extractor.spatial_dim, place.device) if "sfid" in metrics else None
    score = InceptionScore(images.count or 1, extractor.classes, device=place.device) if "is" in metrics else None
    chosen = _Chosen(keep, seed, with_pixels)
    digests: list[tuple[int, bytes]] = []
    share = images.count // place.ranks.world if images.count is not None else None
    with progress(f"{extractor.name} features", share, unit="images", shown=place.ranks.rank == 0) as bar:
        for indices, pixels in batches(images, place):
            digests += [(index, image_digest(image)) for index, image in zip(indices, pixels, strict=True)]
            there = torch.from_numpy(pixels).to(place.device)
            found = extractor.extract(there if resize is None else resize_as_llamagen(there, resize))
            statistics.update(found.features)
            if spatial is not None and found.spatial is not None:
                spatial.update(found.spatial)
            if score is not None and found.logits is not None:
                places = torch.tensor(indices) if order is None else torch.from_numpy(order[indices])
                score.update(found.logits.double().softmax(1), places)
            if with_pixels or (keep != 0 and NEIGHBOURS.intersection(metrics)):
                for place_in, (index, row) in enumerate(zip(indices, found.features.float().cpu(), strict=True)):
                    chosen.add(index, row, torch.from_numpy(pixels[place_in]))
            bar.advance(len(indices))
    for each in (statistics, spatial, score):
        if each is not None:
            each.reduce()
    features, kept = chosen.gather(extractor.dim, images.size, place.device)
    if not statistics.count:
        raise UserError(f"{images.name} has no image that can be used")
    return Collected(
        count=statistics.count,
        content=content_hash(digests, place),
        statistics=statistics,
        spatial=spatial,
        score=score,
        features=features,
        pixels=kept,
    )


def content_hash(digests: list[tuple[int, bytes]], place: Place) -> str:
    """The set's hash from the images' on all ranks."""
    indices = torch.tensor([index for index, _ in digests], dtype=torch.int64)
    rows = torch.from_numpy(np.frombuffer(b"".join(d for _, d in digests), np.uint8).reshape(-1, 32).copy())
    indices, rows = (joined(tensor.to(place.device)).cpu() for tensor in (indices, rows))
    return hashlib.sha256(rows[indices.argsort()].numpy().tobytes()).hexdigest()
