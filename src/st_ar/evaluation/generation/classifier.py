"""A classifier of decoded images, trained on a token store, to measure whether samples show the class that was asked for.

It is trained on real images, encoded and decoded: the upper bound for a generator of these tokens. Class accuracy of samples goes back to
the classification accuracy score (CAS, arXiv 1905.10887), with the roles swapped: trained on real images, tested on samples.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from st_ar.config import ClassifierConfig
from st_ar.data.store import TokenBatches, TokenStore, note_same_images
from st_ar.errors import UserError, damaged
from st_ar.evaluation.generation.features import CLASSIFIER, REFERENCE, Compute, Extracted, Extractor, collect
from st_ar.evaluation.generation.image_sets import CHUNK, ImageSet
from st_ar.evaluation.generation.references import write_reference
from st_ar.files import atomic_folder, read_json, read_safetensors, require_absent, save_tensors, sha256, write_json
from st_ar.hardware import choose_dtype, describe, freed_memory_kept
from st_ar.progress import progress
from st_ar.randomness import RandomStream, torch_seed
from st_ar.settings import matches_type, to_dict
from st_ar.tokenizer import Tokenizer, decode_to_images

FORMAT_VERSION = 1
CONFIG, WEIGHTS = "config.json", "model.safetensors"
WIDTHS = (16, 32, 64, 128)
"""Channels of the stem and of each stage. The last is the number of features."""
EPSILON = 1e-6
NORMALISING_IMAGES = 10_000
"""Training images, evenly spaced, whose features give the mean and deviation that normalise all others."""


class Classifier(nn.Module):
    """A residual network of 0.3M parameters. Three stages halve the resolution; then a mean over positions."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.stem = _convolution(3, WIDTHS[0])
        self.stages = nn.ModuleList(map(_Stage, WIDTHS, WIDTHS[1:]))
        self.head = nn.Linear(WIDTHS[-1], classes)
        self.register_buffer("mean", torch.zeros(WIDTHS[-1]))
        self.register_buffer("deviation", torch.ones(WIDTHS[-1]))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return features [B, D], normalised over the training images, and logits [B, C] of images uint8 [B, H, W, 3]."""
        x = F.relu(self.stem(images.permute(0, 3, 1, 2) / 127.5 - 1))
        for stage in self.stages:
            x = stage(x)
        pooled = x.mean(dim=(2, 3))
        return (pooled.float() - self.mean) / self.deviation, self.head(pooled).float()


class _Stage(nn.Module):
    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        self.first, self.second = _convolution(width_in, width, stride=2), _convolution(width, width)
        self.shortcut = nn.Conv2d(width_in, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.second(F.relu(self.first(x))) + self.shortcut(F.avg_pool2d(x, 2, ceil_mode=True)))


def _convolution(width_in: int, width: int, stride: int = 1) -> nn.Module:
    return nn.Sequential(nn.Conv2d(width_in, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width))


def decoded_images(store: TokenStore, tokenizer: Tokenizer) -> ImageSet:
    """The centre crops of a token store's images as the tokenizer decodes them."""
    side = store.meta.grid * tokenizer.patch

    def read(rank: int, world: int) -> Iterator[tuple[int, np.ndarray]]:
        first, end = len(store) * rank // world, len(store) * (rank + 1) // world
        for start in range(first, end, CHUNK):
            codes = store.center_codes(np.arange(start, min(start + CHUNK, end))).astype(np.int64)
            yield from enumerate(decode_to_images(tokenizer, torch.from_numpy(codes)), start)

    name = f"the decoded tokens of {store.meta.source}"
    return ImageSet(name=name, count=len(store), size=(side, side), read=read, labels=store.labels)


@freed_memory_kept()
def train_classifier(
    store: TokenStore,
    test_store: TokenStore,
    tokenizer: Tokenizer,
    out: Path,
    config: ClassifierConfig,
    device: torch.device,
) -> dict[str, Any]:
    """Train a classifier on a store's decoded images, and write it with the statistics of the decoded test images.

    Returns:
        The content of config.json: classes, accuracy on the test images, data, settings, environment.

    Raises:
        UserError: `out` exists, stores of other classes or of another tokenizer, or a single class.
    """
    require_absent(out, "a classifier")
    store.check_classes(test_store.meta.class_names, test_store.folder)
    for each in (store, test_store):
        if each.meta.tokenizer != tokenizer.fingerprint:
            raise UserError(f"{each.folder} was made by another tokenizer: give the tokenizer that made both stores")
    if len(np.unique(store.labels)) < 2:
        raise UserError(f"{store.folder} has images of one class: a classifier needs two or more")
    note_same_images(store, test_store)
    network = _train(store, tokenizer, config, device)
    metadata = {"classes": len(store.meta.class_names), "format_version": FORMAT_VERSION}
    with atomic_folder(out) as folder:
        save_tensors(folder / WEIGHTS, network.state_dict(), **metadata)
        extractor = _extractor(network, sha256(folder / WEIGHTS))
        decoded, compute = decoded_images(test_store, tokenizer), Compute(device=device, batch_size=256)
        reference = write_reference(decoded, folder / REFERENCE, extractor, compute, seed=config.seed)
        accuracy = _accuracy(extractor, decoded, test_store.labels, compute)
        record = {
            **metadata,
            "class_names": store.meta.class_names,
            "size": decoded.size[0],
            "weights": extractor.weights,
            "test_accuracy": accuracy,
            "test_images": len(test_store),
            "test_content": reference["content"],
            "tokens": store.describe(),
            "test_tokens": test_store.describe(),
            "config": to_dict(config),
            "environment": describe(),
        }
        write_json(folder / CONFIG, record)
    return record


def _train(store: TokenStore, tokenizer: Tokenizer, config: ClassifierConfig, device: torch.device) -> Classifier:
    torch.manual_seed(torch_seed(config.seed, RandomStream.INITIALISATION))
    network = Classifier(len(store.meta.class_names)).to(device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue] -- torch documents it
    batches = TokenBatches(store, batch_size=config.batch_size, views=1, seed=config.seed)
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.lr, config.steps)
    dtype = choose_dtype("auto", device)
    with progress("classifier", config.steps, unit="steps") as bar:
        for step in range(config.steps):
            tokens, labels = batches.batch(step)
            images = torch.from_numpy(decode_to_images(tokenizer, tokens[:, 0])).to(device)
            with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
                _, logits = network(images)
            F.cross_entropy(logits, labels.to(device)).backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            bar.advance(1)
    network.eval().requires_grad_(False)
    chosen = np.unique(np.linspace(0, len(store) - 1, NORMALISING_IMAGES).round().astype(np.int64))
    features: list[Tensor] = []
    for part in np.array_split(chosen, -(-len(chosen) // 256)):
        codes = torch.from_numpy(store.center_codes(part).astype(np.int64))
        features.append(network(torch.from_numpy(decode_to_images(tokenizer, codes)).to(device))[0])
    deviation, mean = torch.std_mean(torch.cat(features), dim=0)
    network.mean.copy_(mean)
    network.deviation.copy_(deviation.clamp_min(EPSILON))
    return network


def _accuracy(extractor: Extractor, images: ImageSet, labels: np.ndarray, compute: Compute) -> float:
    found = collect(images, extractor, ["class-accuracy"], compute)
    return float((found.logits.argmax(1).numpy() == labels).mean())


def _extractor(network: Classifier, weights: str, class_names: tuple[str, ...] = ()) -> Extractor:
    @torch.no_grad()
    def run(images: Tensor) -> Extracted:
        features, logits = network(images)
        return Extracted(features, logits=logits)

    return Extractor(
        name=CLASSIFIER,
        weights=weights,
        dim=WIDTHS[-1],
        classes=network.head.out_features,
        class_names=class_names,
        run=run,
    )


def load_classifier(folder: Path, device: torch.device) -> Extractor:
    """Load a classifier of `st-ar train-classifier` as a feature network with logits.

    Raises:
        UserError: not a classifier, damaged, or of another format.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a classifier: no such folder; `st-ar train-classifier` makes one")
    record = read_json(folder / CONFIG, "a classifier")
    names = record.get("class_names")
    if record.get("format_version") != FORMAT_VERSION:
        raise UserError(f"{folder} has format {record.get('format_version')}; this st-ar reads {FORMAT_VERSION}")
    tensors, _ = read_safetensors(folder / WEIGHTS)
    digest = sha256(folder / WEIGHTS)
    if not matches_type(names, list[str]) or record.get("weights") != digest:
        raise damaged(folder, "its weights do not match config.json", "copy or train the classifier again")
    network = Classifier(len(names))
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        raise damaged(folder / WEIGHTS, error, "copy or train the classifier again") from error
    network = network.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)  # pyright: ignore[reportCallIssue] -- torch documents it
    return _extractor(network, digest, tuple(names))
