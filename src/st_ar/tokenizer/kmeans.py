"""A tokenizer with a k-means codebook of pixel patches. It trains in seconds, for quick starts and tests."""

import hashlib
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from st_ar.data.skipped import SkippedImages
from st_ar.data.source import BrokenImageError, Crops, ImageSource
from st_ar.errors import UserError, damaged, require
from st_ar.files import read_tensors, require_absent, save_tensors, write_json
from st_ar.progress import progress
from st_ar.tokenizer.vq import CONFIG, FORMAT_VERSION, count_patches

MAX_IMAGES = 50_000
"""Images whose patches are clustered."""
CODEBOOK = "codebook.safetensors"


class KMeansTokenizer:
    """Encodes each patch of pixels as the index of the nearest codebook entry.

    The codebook is float32 [V, 3 * patch^2] in [-1, 1], channels first within a patch.
    """

    kind: ClassVar[str] = "kmeans"

    def __init__(self, codebook: Tensor, patch: int) -> None:
        assert codebook.shape[1:] == (3 * patch**2,)
        self.codebook, self.patch = codebook.float().contiguous(), patch

    @property
    def vocab_size(self) -> int:
        return len(self.codebook)

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(f"kmeans {self.patch} ".encode() + self.codebook.numpy().tobytes()).hexdigest()

    def grid(self, size: int) -> int:
        return count_patches(size, self.patch)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        h, w = self.grid(images.shape[2]), self.grid(images.shape[3])
        cut = images.unflatten(3, (w, self.patch)).unflatten(2, (h, self.patch))  # (B, 3, h, patch, w, patch)
        patches = cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # (B, h * w, 3 * patch^2)
        closeness = patches @ self.codebook.T - self.codebook.square().sum(1) / 2
        return closeness.argmax(-1).unflatten(1, (h, w))

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        size = (codes.shape[1] * self.patch, codes.shape[2] * self.patch)
        patches = self.codebook[codes.flatten(1)].transpose(1, 2)
        return F.fold(patches, size, self.patch, stride=self.patch)

    def save(self, folder: Path) -> None:
        """Write the tokenizer's folder; tokenizer.json, written last, completes it."""
        require_absent(folder, "a tokenizer", besides=[CODEBOOK])
        save_tensors(folder / CODEBOOK, {"codebook": self.codebook})
        config = {"format_version": FORMAT_VERSION, "kind": self.kind, "patch": self.patch}
        write_json(folder / CONFIG, {**config, "vocab_size": self.vocab_size, "fingerprint": self.fingerprint})

    @classmethod
    def load(cls, folder: Path, patch: Any) -> "KMeansTokenizer":
        """Load the codebook that `save` wrote; `patch` is that of tokenizer.json."""
        try:
            return cls(read_tensors(folder / CODEBOOK)["codebook"], patch)
        except (KeyError, TypeError, AssertionError) as error:
            raise damaged(folder, f"its codebook does not match its {CONFIG}", "train the tokenizer again") from error


def train_kmeans(
    source: ImageSource,
    *,
    vocab_size: int = 256,
    patch: int = 4,
    size: int | None = None,
    max_patches: int = 200_000,
    seed: int = 0,
) -> KMeansTokenizer:
    """Train a codebook on patches of a source's images, by scikit-learn's MiniBatchKMeans.

    Images are resized and centre-cropped as before ten crops. Broken images are ignored. Up to 50,000 evenly spaced images are
    used, or the first 10,000 of a source of unknown length.

    Args:
        size: side in pixels of the crops to tokenize; the source's by default.

    Raises:
        UserError: scikit-learn is not installed, or there are fewer distinct patches than codes.
    """
    size = source.size if size is None else size
    if not 1 <= patch <= size:
        raise UserError(f"--patch must lie between 1 and the {size} pixels of a crop, not {patch}")
    if not 1 <= vocab_size <= 1 << 16:
        raise UserError(f"--vocab-size must lie between 1 and 65536, the store's 16 bits, not {vocab_size}")
    if seed < 0:
        raise UserError(f"--seed must be 0 or more, not {seed}")
    if seed >= 1 << 32:
        raise UserError(f"--seed must be at most {(1 << 32) - 1}, scikit-learn's largest, not {seed}")
    require("sklearn")
    from sklearn.cluster import MiniBatchKMeans

    rows, skipped = list[np.ndarray](), SkippedImages(source.name, max_skipped=1)
    rng = np.random.default_rng(seed)
    side = Crops(kind="ten", size=size, range=source.crop_range).side
    images = source.count or min(source.expected or 10_000, 10_000)
    stride = -(-images // MAX_IMAGES)
    total = -(-images // stride)
    fraction = min(1.0, max_patches / (total * (size // patch) ** 2))
    with progress("train tokenizer", total, unit="images") as bar:
        for index, example in islice(enumerate(source.examples(0)), 0, images, stride):
            bar.advance(1)
            try:
                pixels = example.read_cropped(side).astype(np.float32) / 127.5 - 1
            except BrokenImageError as error:
                skipped.add(index, example.name, str(error), None)
                continue
            n = side // patch
            grid = pixels[: n * patch, : n * patch].reshape(n, patch, n, patch, 3).transpose(0, 2, 4, 1, 3)
            flat = grid.reshape(n**2, -1)
            rows.append(flat[rng.random(len(flat)) < fraction])
        if not rows:
            raise UserError(f"{source.name} has no readable image among {total} of its first {images}: give another")
        skipped.report(len(rows))
        patches = np.concatenate(rows)
        distinct = len(np.unique(patches, axis=0))
        if distinct < vocab_size:
            raise UserError(
                f"{source.name} has {distinct} different patches, too few for {vocab_size} codes: lower --vocab-size"
            )
        bar.note("k-means")
        settings: dict[str, Any] = {"random_state": seed, "batch_size": 4096, "n_init": 1, "max_iter": 10}
        kmeans = MiniBatchKMeans(vocab_size, **settings).fit(patches)
    return KMeansTokenizer(torch.from_numpy(np.asarray(kmeans.cluster_centers_, np.float32)), patch)
