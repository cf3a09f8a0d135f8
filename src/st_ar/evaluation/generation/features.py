"""Feature networks, and the pass over a set of images that collects features and statistics."""

import hashlib
import heapq
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from st_ar.config import ExtractorName
from st_ar.data.skipped import SkippedImages
from st_ar.distributed import Ranks, all_gather_ragged
from st_ar.errors import UserError, cause, require
from st_ar.evaluation.generation.image_sets import ImageSet, image_digest
from st_ar.evaluation.metrics import FeatureStatistics, InceptionScore, require_bounded
from st_ar.hardware import freed_memory_kept, full_precision
from st_ar.progress import progress
from st_ar.randomness import RandomStream
from st_ar.settings import Checked, Count

CLASSIFIER = "classifier"
"""Name of the extractors of `st-ar train-classifier`."""
REFERENCE = "reference.npz"
"""Statistics of the decoded test images in a classifier's folder."""
DINOV2 = "facebook/dinov2-large"
"""ViT-L/14 on the Hugging Face hub."""


class Extracted(NamedTuple):
    """A network's float32 outputs for images uint8 [B, H, W, 3]."""

    features: Tensor
    """[B, D]."""
    spatial: Tensor | None = None
    """[B, S], for sFID."""
    logits: Tensor | None = None
    """[B, C], for IS and class accuracy."""


@dataclass(frozen=True, kw_only=True)
class Extractor:
    """A feature network, and the labels of its metrics."""

    name: str
    weights: str
    """SHA-256 of its weights. Features of different weights are not comparable."""
    dim: int
    """D."""
    run: Callable[[Tensor], Extracted]
    """The network. Call `extract`, which sets the precision."""
    spatial_dim: int = 0
    """S; 0 without spatial features."""
    classes: int = 0
    """C; 0 without logits."""
    class_names: tuple[str, ...] = ()
    """Names of the classes, if known."""

    def extract(self, images: Tensor) -> Extracted:
        """Run the network on images uint8 [B, H, W, 3] in full float32 precision."""
        with full_precision(), torch.autocast(images.device.type, enabled=False):
            return self.run(images)

    @property
    def identity(self) -> dict[str, str]:
        """What results and references record of it."""
        return {"name": self.name, "sha256": self.weights}

    @property
    def is_inception(self) -> bool:
        """Whether its FD is FID."""
        return self.name == "Inception"

    def label(self, metric: str) -> str:
        """Return the label of a metric with this network, such as FID or FD-DINOv2."""
        if self.is_inception:
            labels = {"fd": "FID", "fid": "FID", "sfid": "sFID", "is": "IS", "kid": "KID", "kid std": "KID std"}
            return labels.get(metric, metric)
        labels = {
            "fd": f"FD-{self.name}",
            "is": f"IS-{self.name}",
            "kid": f"KD-{self.name}",
            "kid std": f"KD-{self.name} std",
        }
        return labels.get(metric, f"{metric} ({self.name})")


def resize_bicubic(images: Tensor, side: int) -> Tensor:
    """Resize bicubically with antialiasing and rounding as in Pillow: uint8 [B, H, W, 3] -> float32 [B, 3, side, side]."""
    pixels = images.permute(0, 3, 1, 2).float()
    if pixels.shape[2:] == (side, side):
        return pixels
    resized = F.interpolate(pixels, (side, side), mode="bicubic", antialias=True, align_corners=False)
    return resized.add_(0.5).floor_().clamp_(0, 255)


def load_extractor(name: ExtractorName, device: torch.device, *, inception: Path | None = None) -> Extractor:
    """Load a network and its weights onto a device.

    Args:
        inception: file or folder of Inception's weights; by default the cache, else a download.

    Raises:
        UserError: the weights or a package are missing.
    """
    if inception is not None and name != "inception":
        raise UserError(f"--inception names Inception's weights, and --extractor is {name}: leave one of them out")
    if name == "efficientnet":
        return _efficientnet(device)
    if name == "dinov2":
        return _dinov2(device)
    from st_ar.evaluation.generation.inception import SHA256, load_inception

    network = load_inception(inception, device)

    def run(images: Tensor) -> Extracted:
        return Extracted(*network(images))

    return Extractor(name="Inception", weights=SHA256, dim=2048, spatial_dim=2023, classes=1008, run=run)


def _efficientnet(device: torch.device) -> Extractor:
    from st_ar.evaluation.efficientnet import SHA256, load_efficientnet

    network = load_efficientnet(device)

    @torch.no_grad()
    def run(images: Tensor) -> Extracted:
        pooled = network(resize_bicubic(images, 224) / 127.5 - 1).pooled
        return Extracted(pooled, logits=network.fc(pooled))

    return Extractor(name="EfficientNet-Lite0", weights=SHA256, dim=1280, classes=1000, run=run)


def _dinov2(device: torch.device) -> Extractor:
    library = require("transformers")
    try:  # no pickles, and no code from the hub
        network = library.Dinov2Model.from_pretrained(DINOV2, use_safetensors=True).eval().to(device)
    except OSError as error:
        raise UserError(
            f"{DINOV2} cannot be loaded ({cause(error)}): download it on a machine with a network and copy the Hugging Face cache"
        ) from error
    digest = hashlib.sha256()
    for key, tensor in sorted(network.state_dict().items()):
        digest.update(key.encode() + tensor.detach().float().cpu().contiguous().numpy().tobytes())
    mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))

    @torch.no_grad()
    def run(images: Tensor) -> Extracted:
        pixels = (resize_bicubic(images, 224) / 255 - mean) / std
        class_token = network(pixel_values=pixels).last_hidden_state[:, 0]  # after the last norm
        return Extracted(class_token.float())

    return Extractor(name="DINOv2", weights=digest.hexdigest(), dim=int(network.config.hidden_size), run=run)


NEIGHBOURS = frozenset({"precision", "recall", "density", "coverage", "kid"})
"""Metrics that need the features themselves, not only their statistics."""


@dataclass(frozen=True, kw_only=True)
class Compute(Checked):
    """Device, ranks and batch size of an evaluation."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    ranks: Ranks = field(default_factory=Ranks)
    batch_size: Count = 64
    """Changes features only by rounding."""


@dataclass(kw_only=True)
class Collected:
    """The result of one pass over a set of images; the same on all ranks."""

    count: int
    """Usable images."""
    content: str
    """SHA-256 over the SHA-256 of each image's size and pixels, in order. It does not depend on the file format."""
    statistics: FeatureStatistics
    spatial: FeatureStatistics | None
    score: InceptionScore | None
    features: Tensor
    """float32 [n, D] of the kept images, in order."""
    logits: Tensor
    """float32 [n, C] of the kept images if class accuracy is asked for, else [n, 0]."""
    pixels: Tensor
    """uint8 [n, H, W, 3] of the kept images, if asked for."""
    skipped: SkippedImages
    notes: tuple[str, ...]
    """Notes for the user on the images."""


def resize_as_llamagen(images: Tensor, side: int) -> Tensor:
    """Resize bicubically without antialiasing, as in LlamaGen's evaluation; from and to uint8 [B, H, W, 3]."""
    resized = F.interpolate(images.permute(0, 3, 1, 2).float(), (side, side), mode="bicubic", align_corners=False)
    return resized.add_(0.5).clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


class _RandomSubset:
    """A random subset of this rank's images. The seed and an image's index decide whether it is kept."""

    def __init__(self, keep: int | None, seed: int, with_pixels: bool) -> None:
        self.keep, self.seed, self.with_pixels = keep, seed, with_pixels
        self.heap: list[tuple[int, int, Tensor, Tensor]] = []  # (negated random number, index, features, pixels)

    def add(self, index: int, features: Tensor, pixels: Tensor) -> None:
        state = np.random.SeedSequence([self.seed, RandomStream.EVALUATION, index]).generate_state(1, np.uint64)[0]
        # clone: a view would keep its whole batch in memory
        kept = pixels.clone() if self.with_pixels else torch.empty(0, *pixels.shape[1:], dtype=pixels.dtype)
        entry = -(int(state) >> 1), index, features.clone(), kept
        push = heapq.heappush if self.keep is None or len(self.heap) < self.keep else heapq.heappushpop
        push(self.heap, entry)

    def gather(self, dim: int, size: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
        """Return features and pixels of the subset of all ranks' images, in the order of the images."""
        numbers = torch.tensor([(-entry[0], entry[1]) for entry in self.heap], dtype=torch.int64).reshape(-1, 2)
        features = torch.stack([e[2] for e in self.heap]) if self.heap else torch.empty(0, dim)
        pixels = torch.stack([e[3] for e in self.heap]) if self.heap else torch.empty(0, *size, 3, dtype=torch.uint8)
        self.heap = []
        numbers, features = (all_gather_ragged(t.to(device)).cpu() for t in (numbers, features))
        kept = numbers[:, 0].argsort()[: self.keep]
        kept = kept[numbers[kept, 1].argsort()]
        if self.with_pixels:
            pixels = all_gather_ragged(pixels.to(device)).cpu()[kept]
        return features[kept], pixels


def image_batches(images: ImageSet, compute: Compute) -> Iterator[tuple[list[int], np.ndarray]]:
    """Yield batches of this rank's images: their indices, and uint8 [b, H, W, 3]."""
    shard = images.read(compute.ranks.rank, compute.ranks.world)
    while batch := list(islice(shard, compute.batch_size)):
        yield [index for index, _ in batch], np.stack([image for _, image in batch])


def extract_checked(extractor: Extractor, batch: Tensor, images: ImageSet, indices: list[int]) -> Extracted:
    """Run the network on images of a set; refuse features that are not finite or huge, and name the image."""
    extracted = extractor.extract(batch)
    for output in filter(torch.is_tensor, extracted):
        require_bounded(output, lambda row: f"{images.name_of(indices[row])} of {images.name}")
    return extracted


@freed_memory_kept()
def collect(
    images: ImageSet,
    extractor: Extractor,
    metrics: Collection[str],
    compute: Compute,
    *,
    keep: int | None = None,
    seed: int = 0,
    with_pixels: bool = False,
    resize: int | None = None,
    order: np.ndarray | None = None,
) -> Collected:
    """Read all images once and compute what the metrics need.

    Args:
        keep: images of a random subset, drawn with `seed`, whose features (and pixels) are kept if a metric needs them; None keeps all.
        resize: side in pixels to which images are resized first, as LlamaGen does.
        order: int64 [N], each image's position in the order that the splits of IS follow; by default its index.

    Raises:
        UserError: no usable image, too many unusable ones, or damaged images or features.
    """
    statistics = FeatureStatistics(extractor.dim, compute.device)
    spatial = FeatureStatistics(extractor.spatial_dim, compute.device) if "sfid" in metrics else None
    score = InceptionScore(images.count or 1, extractor.classes, device=compute.device) if "is" in metrics else None
    classes = extractor.classes if "class-accuracy" in metrics else 0
    subset = _RandomSubset(keep, seed, with_pixels)
    digests: list[tuple[int, bytes]] = []
    share = images.count // compute.ranks.world if images.count is not None else None
    with progress(f"{extractor.name} features", share, unit="images", shown=compute.ranks.rank == 0) as bar:
        for indices, pixels in image_batches(images, compute):
            digests += [(index, image_digest(image)) for index, image in zip(indices, pixels, strict=True)]
            batch = torch.from_numpy(pixels).to(compute.device)
            batch = batch if resize is None else resize_as_llamagen(batch, resize)
            extracted = extract_checked(extractor, batch, images, indices)
            statistics.update(extracted.features)
            if spatial is not None and extracted.spatial is not None:
                spatial.update(extracted.spatial)
            if score is not None and extracted.logits is not None:
                positions = torch.tensor(indices) if order is None else torch.from_numpy(order[indices])
                score.update(extracted.logits.double().softmax(1), positions)
            if with_pixels or (keep != 0 and (classes or NEIGHBOURS.intersection(metrics))):
                rows = extracted.features.float()
                if classes and extracted.logits is not None:
                    rows = torch.cat([rows, extracted.logits], dim=1)
                for index, row, image in zip(indices, rows.cpu(), pixels, strict=True):
                    subset.add(index, row, torch.from_numpy(image))
            bar.advance(len(indices))
    for each in (statistics, spatial, score):
        if each is not None:
            each.reduce()
    rows, kept_pixels = subset.gather(extractor.dim + classes, images.size, compute.device)
    notes = (*images.notes, *images.skipped.finish(statistics.count))
    if not statistics.count:
        raise UserError(f"{images.name} has no usable image")
    return Collected(
        count=statistics.count,
        content=content_hash(digests, compute),
        statistics=statistics,
        spatial=spatial,
        score=score,
        features=rows[:, : extractor.dim],
        logits=rows[:, extractor.dim :],
        pixels=kept_pixels,
        skipped=images.skipped,
        notes=notes,
    )


def content_hash(digests: list[tuple[int, bytes]], compute: Compute) -> str:
    """Return the hash of a set from the indices and digests of each rank's images."""
    rows = torch.from_numpy(np.frombuffer(b"".join(d for _, d in digests), np.uint8).reshape(-1, 32).copy())
    return hashlib.sha256(gather_sorted([index for index, _ in digests], rows, compute).numpy().tobytes()).hexdigest()


def gather_sorted(indices: list[int], rows: Tensor, compute: Compute) -> Tensor:
    """Return the rows of all ranks' images, sorted by their indices, on the CPU."""
    pair = torch.tensor(indices, dtype=torch.int64), rows
    numbers, gathered = (all_gather_ragged(tensor.to(compute.device)).cpu() for tensor in pair)
    return gathered[numbers.argsort()]
