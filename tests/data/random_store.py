"""Token stores of random codes, written as docs/formats.md says: by NumPy and json alone."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from st_ar.data.store import StoreMeta

FINGERPRINT = "0123456789abcdef" * 4


def write_store(
    folder: Path,
    codes: np.ndarray,
    labels: np.ndarray,
    *,
    vocab_size: int,
    num_classes: int,
    shards: int = 1,
    crop_names: Sequence[str] = (),
) -> Path:
    """Write codes [n, crops, T] and labels [n] as a store of `shards` shards, as even as can be; with such names of the crops."""
    folder.mkdir(parents=True)
    entries: list[dict[str, str | int]] = []
    cut = zip(np.array_split(codes, shards), np.array_split(labels, shards), strict=True)
    for index, (some_codes, some_labels) in enumerate(cut):
        names = {what: f"{what}-{index:05d}-of-{shards:05d}.npy" for what in ("codes", "labels")}
        np.save(folder / names["codes"], some_codes.astype(np.uint16))
        np.save(folder / names["labels"], some_labels.astype(np.int32))
        sums = {f"{what}_sha256": checksum(folder / name) for what, name in names.items()}
        entries.append({"images": len(some_codes), **names, **sums})
    StoreMeta(
        source="random",
        tokenizer=FINGERPRINT,
        vocab_size=vocab_size,
        grid=round(codes.shape[2] ** 0.5),
        crops=list(crop_names) or [f"crop-{crop}" for crop in range(codes.shape[1])],
        class_names=[f"class-{label}" for label in range(num_classes)],
        images=len(codes),
        shards=entries,
    ).write(folder)
    return folder


def random_store(
    folder: Path,
    *,
    images: int = 40,
    crops: int = 10,
    grid: int = 4,
    vocab_size: int = 16,
    num_classes: int = 3,
    shards: int = 1,
    seed: int = 0,
    crop_names: Sequence[str] = (),
) -> tuple[Path, np.ndarray, np.ndarray]:
    """A store of uniform codes; the codes [n, crops, T] and labels [n] come with it."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, vocab_size, (images, crops, grid**2)).astype(np.uint16)
    labels = rng.integers(0, num_classes, images)
    write_store(
        folder, codes, labels, vocab_size=vocab_size, num_classes=num_classes, shards=shards, crop_names=crop_names
    )
    return folder, codes, labels


def checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
