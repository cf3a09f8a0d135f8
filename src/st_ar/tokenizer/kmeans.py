"""A codebook of pixel patches: trained in seconds, for quick starts and tests. A tokenizer like any other."""

import hashlib
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from st_ar.data.source import BrokenImageError, Crops, ImageSource, center_crop, check_pixels
from st_ar.errors import UserError, damaged, require
from st_ar.files import read_json, read_tensors, require_absent, save_tensors, write_json
from st_ar.progress import progress

FORMAT_VERSION = 1
MOST_IMAGES = 50_000
"""Whose patches are clustered."""
CONFIG, CODEBOOK = "tokenizer.json", "codebook.safetensors"


class KMeansTokenizer:
    """Each patch of pixels becomes the index of the nearest of V patches.

    Args:
        codebook: float32 [V, 3 * patch^2], values in [-1, 1], channels first within a patch.
        patch: side of a patch in pixels.
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
        if size % self.patch:
            raise UserError(
                f"images of {size} pixels are no whole number of {self.patch}-pixel patches: choose another --size"
            )
        return size // self.patch

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
        """Write the tokenizer's folder; tokenizer.json, written last, marks it complete."""
        require_absent(folder, "a tokenizer", besides=[CODEBOOK])
        save_tensors(folder / CODEBOOK, {"codebook": self.codebook})
        config = {
            "kind": self.kind,
            "patch": self.patch,
            "vocab_size": self.vocab_size,
            "fingerprint": self.fingerprint,
        }
        write_json(folder / CONFIG, {"format_version": FORMAT_VERSION, **config})

    @classmethod
    def load(cls, folder: Path) -> "KMeansTokenizer":
        """Read what `save` wrote, and check it against its fingerprint."""
        config = read_json(folder / CONFIG, "a tokenizer")
        if config.get("format_version") != FORMAT_VERSION:
            raise UserError(
                f"{folder / CONFIG} has format {config.get('format_version')}; this st-ar reads {FORMAT_VERSION}"
            )
        try:
            tokenizer = cls(read_tensors(folder / CODEBOOK)["codebook"], config["patch"])
        except (KeyError, TypeError, AssertionError) as error:
            raise damaged(
                folder, error, f"its codebook and its {CONFIG} do not fit; train the tokenizer again"
            ) from error
        if tokenizer.fingerprint != config.get("fingerprint"):
            raise damaged(folder, "its codebook does not match its fingerprint", "train the tokenizer again")
        return tokenizer


def train_kmeans(
    source: ImageSource,
    *,
    vocab_size: int = 256,
    patch: int = 4,
    size: int | None = None,
    max_patches: int = 200_000,
    seed: int = 0,
) -> KMeansTokenizer:
    """A codebook from the patches of a source's images, by scikit-learn's MiniBatchKMeans.

    Images are resized and centre-cropped as they are before ten crops are cut. Those that cannot be decoded are passed
    over. At most 50,000 are taken, evenly spaced, of a source that does not know its length the first 10,000.

    Args:
        size: side in pixels of the crops that will be tokenized; by default the source's.

    Raises:
        UserError: scikit-learn is not installed, or there are fewer different patches than codes.
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

    rows: list[np.ndarray] = []
    rng = np.random.default_rng(seed)
    side = Crops(kind="ten", size=size, range=source.crop_range).side
    images = source.count or min(source.expected or 10_000, 10_000)
    apart = -(-images // MOST_IMAGES)
    taken = -(-images // apart)
    share = min(1.0, max_patches / (taken * (size // patch) ** 2))
    with progress("train tokenizer", taken, unit="images") as bar:
        for example in islice(source.examples(0), 0, images, apart):
            bar.advance(1)
            try:
                image = example.read()
                scale = side / min(image.size)
                check_pixels(image.width * scale, image.height * scale)
            except BrokenImageError:
                continue
            pixels = np.asarray(center_crop(image, side), np.float32) / 127.5 - 1
            h, w = pixels.shape[0] // patch, pixels.shape[1] // patch
            cut = pixels[: h * patch, : w * patch].reshape(h, patch, w, patch, 3).transpose(0, 2, 4, 1, 3)
            cut = cut.reshape(h * w, -1)
            rows.append(cut[rng.random(len(cut)) < share])
        if not rows:
            raise UserError(f"{source.name} has no image that can be decoded among {taken} of its first {images}")
        patches = np.concatenate(rows)
        distinct = len(np.unique(patches, axis=0))
        if distinct < vocab_size:
            raise UserError(
                f"{source.name} has {distinct} different patches, too few for {vocab_size} codes: lower --vocab-size"
            )
        bar.note("k-means")
        settings: dict[str, Any] = {"random_state": seed, "batch_size": 4096, "n_init": 1, "max_iter": 10}
        kmeans = MiniBatchKMeans(vocab_size, **settings).fit(patches)
        codebook = np.asarray(kmeans.cluster_centers_, np.float32)
    return KMeansTokenizer(torch.from_numpy(codebook), patch)
