"""Features of image sets: the networks, and the pass over the images."""

import hashlib
import heapq
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from st_ar.config import ExtractorName
from st_ar.distributed import Ranks, all_gather_ragged
from st_ar.errors import UserError, cause, require
from st_ar.evaluation.generation.image_sets import ImageSet, image_digest
from st_ar.evaluation.metrics import FeatureStatistics, InceptionScore
from st_ar.hardware import freed_memory_kept, full_precision
from st_ar.progress import progress
from st_ar.randomness import RandomStream

DINOV2 = "facebook/dinov2-large"
"""ViT-L/14 on the Hugging Face hub."""


class Extracted(NamedTuple):
    """Of images uint8 [B, H, W, 3], float32."""

    features: Tensor
    """[B, D]."""
    spatial: Tensor | None = None
    """[B, S], for sFID."""
    logits: Tensor | None = None
    """[B, C], for IS."""


@dataclass(frozen=True, kw_only=True)
class Extractor:
    """A network and what its numbers are called."""

    name: str
    """As it stands in tables."""
    weights: str
    """SHA-256 of its weights: features of others do not compare."""
    dim: int
    """D."""
    run: Callable[[Tensor], Extracted]
    """The network: takes images on its device; see `extract`."""
    spatial_dim: int = 0
    """S; 0 if there are none."""
    classes: int = 0
    """C; 0 if there are none."""

    def extract(self, images: Tensor) -> Extracted:
        """Features of images uint8 [B, H, W, 3], computed in float32 to the full."""
        with full_precision(), torch.autocast(images.device.type, enabled=False):
            return self.run(images)

    @property
    def is_inception(self) -> bool:
        """Whether its Frechet distance is the FID."""
        return self.name == "Inception"

    def label(self, metric: str) -> str:
        """What a metric is called with this network."""
        if self.is_inception:
            named = {"fd": "FID", "fid": "FID", "sfid": "sFID", "is": "IS", "kid": "KID", "kid std": "KID std"}
            return named.get(metric, metric)
        named = {"fd": f"FD-{self.name}", "kid": f"KD-{self.name}", "kid std": f"KD-{self.name} std"}
        return named.get(metric, f"{metric} ({self.name})")


def resize_bicubic(images: Tensor, side: int) -> Tensor:
    """Bicubic resize with Pillow's smoothing and rounding: uint8 [B, H, W, 3] -> float32 [B, 3, side, side], whole numbers."""
    pixels = images.permute(0, 3, 1, 2).float()
    if pixels.shape[2:] == (side, side):
        return pixels
    resized = F.interpolate(pixels, (side, side), mode="bicubic", antialias=True, align_corners=False)
    return resized.add_(0.5).floor_().clamp_(0, 255)


def load_extractor(name: ExtractorName, device: torch.device, *, inception: Path | None = None) -> Extractor:
    """A network with its weights on a device.

    Args:
        inception: Inception's file of weights or its folder; by default the cache, or a download.

    Raises:
        UserError: weights or a package are not there.
    """
    if inception is not None and name != "inception":
        raise UserError(f"--inception names Inception's weights, and --extractor is {name}: leave one of them out")
    return {"inception": _inception, "efficientnet": _efficientnet, "dinov2": _dinov2}[name](device, inception)


def _inception(device: torch.device, path: Path | None) -> Extractor:
    from st_ar.evaluation.generation.inception import SHA256, load_inception

    network = load_inception(path, device)

    def run(images: Tensor) -> Extracted:
        return Extracted(*network(images))

    return Extractor(name="Inception", weights=SHA256, dim=2048, spatial_dim=2023, classes=1008, run=run)


def _efficientnet(device: torch.device, _: Path | None) -> Extractor:
    from st_ar.evaluation.efficientnet import SHA256, load_efficientnet

    network = load_efficientnet(device)

    @torch.no_grad()
    def run(images: Tensor) -> Extracted:
        return Extracted(network(resize_bicubic(images, 224) / 127.5 - 1).pooled)

    return Extractor(name="EfficientNet-Lite0", weights=SHA256, dim=1280, run=run)


def _dinov2(device: torch.device, _: Path | None) -> Extractor:
    library = require("transformers")
    try:  # weights as .safetensors, code from the library alone
        network = library.Dinov2Model.from_pretrained(DINOV2, use_safetensors=True).eval().to(device)
    except OSError as error:
        raise UserError(
            f"{DINOV2} cannot be had ({cause(error)}): download it where there is a network and copy the cache of the Hugging Face hub"
        ) from error
    digest = hashlib.sha256()
    for key, tensor in sorted(network.state_dict().items()):
        digest.update(key.encode() + tensor.detach().float().cpu().contiguous().numpy().tobytes())
    mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))

    @torch.no_grad()
    def run(images: Tensor) -> Extracted:
        pixels = (resize_bicubic(images, 224) / 255 - mean) / std
        return Extracted(
            network(pixel_values=pixels).last_hidden_state[:, 0].float()
        )  # the class token, after the last norm

    return Extractor(name="DINOv2", weights=digest.hexdigest(), dim=int(network.config.hidden_size), run=run)


NEIGHBOURS = frozenset({"precision", "recall", "density", "coverage", "kid"})
"""Metrics that need features, not only their statistics."""


@dataclass(frozen=True, kw_only=True)
class Compute:
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
        drawn = np.random.SeedSequence([self.seed, RandomStream.EVALUATION, index]).generate_state(1, np.uint64)[0]
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
        numbers, features = (all_gather_ragged(t.to(device)).cpu() for t in (numbers, features))
        best = numbers[:, 0].argsort()[: self.keep]
        best = best[numbers[best, 1].argsort()]
        if self.with_pixels:
            pixels = all_gather_ragged(pixels.to(device)).cpu()[best]
        return features[best], pixels


def batches(images: ImageSet, place: Compute) -> Iterator[tuple[list[int], np.ndarray]]:
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
    place: Compute,
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


def content_hash(digests: list[tuple[int, bytes]], place: Compute) -> str:
    """The set's hash from the images' on all ranks."""
    indices = torch.tensor([index for index, _ in digests], dtype=torch.int64)
    rows = torch.from_numpy(np.frombuffer(b"".join(d for _, d in digests), np.uint8).reshape(-1, 32).copy())
    indices, rows = (all_gather_ragged(tensor.to(place.device)).cpu() for tensor in (indices, rows))
    return hashlib.sha256(rows[indices.argsort()].numpy().tobytes()).hexdigest()
