"""`st-ar reconstruct`: a tokenizer's PSNR, SSIM, rFID and codebook usage."""

import math
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from st_ar.data.decoding import decode
from st_ar.data.skipped import SkippedImages
from st_ar.data.source import ImageSource
from st_ar.distributed import all_reduce_sum
from st_ar.errors import UserError
from st_ar.evaluation.generation.features import (
    Compute,
    Extractor,
    content_hash,
    extract_checked,
    gather_sorted,
    image_batches,
)
from st_ar.evaluation.generation.image_sets import ImageSet, image_digest
from st_ar.evaluation.metrics import FeatureStatistics, frechet_distance
from st_ar.figures import save_png, strip
from st_ar.hardware import describe
from st_ar.progress import progress
from st_ar.tokenizer import Tokenizer, to_pixels, to_uint8


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio in dB of pairs of uint8 [B, H, W, 3]: float [B], infinite for equal images."""
    error = (a.float() - b.float()).square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(255**2 / error)


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Return the structural similarity of pairs of uint8 [B, H, W, 3], averaged over colours and pixels: float [B].

    Wang et al. 2004: a Gaussian window of 11 pixels with deviation 1.5, K1 0.01, K2 0.03, without padding.
    """
    if min(a.shape[1:3]) < 11:
        raise UserError(f"SSIM compares windows of 11 pixels: images of {a.shape[1]} x {a.shape[2]} are too small")
    offsets = torch.arange(11, device=a.device, dtype=torch.float64) - 5
    window = torch.exp(-(offsets**2) / (2 * 1.5**2))
    window = window / window.sum()

    def blur(x: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(x, window.view(1, 1, 11, 1)), window.view(1, 1, 1, 11))

    x, y = (image.permute(0, 3, 1, 2).reshape(-1, 1, *image.shape[1:3]).double() for image in (a, b))
    mean_x, mean_y = blur(x), blur(y)
    variance_x, variance_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    covariance = blur(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    similarity = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    similarity = similarity / ((mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2))
    return similarity.reshape(len(a), -1).mean(dim=1).float()


class Faithfulness(NamedTuple):
    """How faithfully a tokenizer reconstructs images."""

    psnr: float
    """Mean over images in dB. An exact reconstruction counts as if one value were off by one level."""
    ssim: float
    usage: float
    """Share of the codebook that is used."""
    perplexity: float
    """exp of the entropy of the codes' frequencies."""


class FaithfulnessMeter:
    """Running faithfulness of reconstructions with a codebook of `vocab_size` codes."""

    def __init__(self, vocab_size: int) -> None:
        self._codes = torch.zeros(vocab_size, dtype=torch.int64)
        self._sums = torch.zeros(3, dtype=torch.float64)  # PSNR, SSIM, images

    def update(self, codes: Tensor, images: Tensor, reconstructions: Tensor) -> None:
        """Add codes int64 [B, h, w], images and reconstructions uint8 [B, H, W, 3]."""
        self._codes += torch.bincount(codes.flatten().cpu(), minlength=len(self._codes))
        largest = 10 * math.log10(255**2 * images[0].numel())  # keeps the mean finite
        sums = [
            psnr(images, reconstructions).clamp(max=largest).double().sum().item(),
            ssim(images, reconstructions).double().sum().item(),
            len(images),
        ]
        self._sums += torch.tensor(sums, dtype=torch.float64)

    def reduce(self, device: torch.device | str = "cpu") -> None:
        """Combine the sums of all ranks, on `device`. Every rank must call it."""
        self._codes, self._sums = (all_reduce_sum(tensor.to(device)).cpu() for tensor in (self._codes, self._sums))

    @property
    def count(self) -> int:
        """Images so far."""
        return int(self._sums[2])

    def result(self) -> Faithfulness:
        """Return the faithfulness of all images so far. There must be at least one."""
        shares = self._codes.double() / self._codes.sum()
        return Faithfulness(
            psnr=(self._sums[0] / self._sums[2]).item(),
            ssim=(self._sums[1] / self._sums[2]).item(),
            usage=(self._codes > 0).double().mean().item(),
            perplexity=torch.special.entr(shares).sum().exp().item(),
        )


def reconstruct(tokenizer: Tokenizer, images: np.ndarray, batch_size: int = 64) -> tuple[np.ndarray, Faithfulness]:
    """Encode and decode images uint8 [N, S, S, 3]; returns the reconstructions and their faithfulness."""
    reconstructions: list[Tensor] = []
    meter = FaithfulnessMeter(tokenizer.vocab_size)
    for start in range(0, len(images), batch_size):
        batch = torch.from_numpy(images[start : start + batch_size])
        codes = tokenizer.encode(to_pixels(batch))
        reconstructions.append(to_uint8(tokenizer.decode(codes)))
        meter.update(codes, batch, reconstructions[-1])
    return torch.cat(reconstructions).numpy(), meter.result()


def evaluation_images(source: ImageSource, size: int, count: int, chunks: int = 16) -> np.ndarray:
    """Return centre crops uint8 [n, size, size, 3] of up to `count` readable images, from evenly spaced chunks of the source."""
    bounds, starts = np.array([0, count]), np.array([0])
    if not source.streaming and source.count and source.count > count:
        bounds = np.linspace(0, count, chunks + 1).astype(int)
        starts = bounds[:-1] + np.linspace(0, source.count - count, chunks).astype(int)
    chosen = zip(starts.tolist(), np.diff(bounds).tolist(), strict=True)
    pixels, skipped = list[np.ndarray](), SkippedImages(source.name, max_skipped=1)
    for start, length in chosen:
        chunk = list(islice(source.examples(start), length))
        decoded = decode(chunk, size)
        pixels.append(decoded.pixels)
        for offset, reason in decoded.broken:
            skipped.add(start + offset, chunk[offset].name, reason, None)
    images = np.concatenate(pixels)
    if not len(images):
        raise UserError(f"{source.name} has no readable image")
    skipped.report(len(images))
    return images


SHOWN = 32
"""Images in the PNG file."""


def save_picture(path: Path, images: np.ndarray, reconstructions: np.ndarray, columns: int = 8) -> None:
    """Write up to SHOWN of the images uint8 [N, S, S, 3], each above its reconstruction, as a PNG."""
    shown = min(SHOWN, len(images))
    shown -= shown % columns if shown > columns else 0
    chosen = np.linspace(0, len(images) - 1, shown).astype(int)
    rows = [chosen[start : start + columns] for start in range(0, shown, columns)]
    pairs = np.concatenate([pixels[row] for row in rows for pixels in (images, reconstructions)])
    save_png(path, strip(pairs, min(columns, shown)))


@torch.no_grad()
def measure_tokenizer(
    tokenizer: Tokenizer,
    images: ImageSet,
    extractor: Extractor | None,
    compute: Compute,
    *,
    picture: Path | None = None,
    folder: Path | None = None,
) -> dict[str, Any]:
    """Encode and decode every image. All ranks return the same result.

    Args:
        extractor: network of the reconstruction FD; None leaves it out.
        picture: PNG file for some of the images, each above its reconstruction; rank 0 writes it.
        folder: folder for every reconstruction as a PNG, named by the image's index.

    Returns:
        metrics (label -> number), images, tokenizer, extractor, notes, environment.

    Raises:
        UserError: images that the tokenizer cannot encode, too few images, or too many that are unusable.
    """
    if images.size[0] != images.size[1]:
        raise UserError(
            f"{images.name} has images of {images.size[0]} x {images.size[1]} pixels, not squares: give --size for square crops"
        )
    tokenizer.grid(images.size[0])
    meter, digests = FaithfulnessMeter(tokenizer.vocab_size), list[tuple[int, bytes]]()
    total = SHOWN if images.count is None else images.count
    wanted = set(np.linspace(0, total - 1, min(SHOWN, total)).astype(int).tolist())
    shown: dict[int, Tensor] = {}  # index -> image and reconstruction
    real, reconstructed = (FeatureStatistics(extractor.dim if extractor else 1, compute.device) for _ in range(2))
    share = images.count // compute.ranks.world if images.count is not None else None
    with progress("reconstruct", share, unit="images", shown=compute.ranks.rank == 0) as bar:
        for indices, pixels in image_batches(images, compute):
            digests += [(index, image_digest(image)) for index, image in zip(indices, pixels, strict=True)]
            batch = torch.from_numpy(pixels)
            codes = tokenizer.encode(to_pixels(batch))
            decoded = to_uint8(tokenizer.decode(codes)).cpu()
            meter.update(codes, batch, decoded)
            for index, image, made in zip(indices, batch, decoded, strict=True):
                if index in wanted:
                    shown[index] = torch.stack([image, made])
                if folder:
                    Image.fromarray(made.numpy()).save(folder / f"{index:06d}.png")
            if extractor:
                for statistics, each in ((real, batch), (reconstructed, decoded)):
                    features = extract_checked(extractor, each.to(compute.device), images, indices).features
                    statistics.update(features)
            bar.advance(len(indices))
    meter.reduce(compute.device)
    notes = [*images.notes, *images.skipped.finish(meter.count)]
    if not meter.count:
        raise UserError(f"{images.name} has no usable image")
    if picture:
        rows = torch.stack([*shown.values()]) if shown else torch.empty(0, 2, *images.size, 3).byte()
        rows = gather_sorted(list(shown), rows, compute)
        if compute.ranks.rank == 0 and len(rows):
            save_picture(picture, rows[:, 0].numpy(), rows[:, 1].numpy())
    metrics: dict[str, float] = {}
    if extractor:
        real.reduce()
        reconstructed.reduce()
        metrics[f"r{extractor.label('fd')}"] = frechet_distance(*real.result(), *reconstructed.result())
    labels = ("PSNR (dB)", "SSIM", "codebook usage", "codebook perplexity")
    metrics |= dict(zip(labels, meter.result(), strict=True))
    content = content_hash(digests, compute)
    return {
        "metrics": metrics,
        "images": {
            "name": images.name,
            "count": meter.count,
            "size": list(images.size),
            "sha256": content,
            **images.skipped.describe(),
        },
        "tokenizer": {"fingerprint": tokenizer.fingerprint, "kind": tokenizer.kind, "codes": tokenizer.vocab_size},
        "extractor": extractor.identity if extractor else None,
        "notes": notes,
        "environment": describe(),
    }
