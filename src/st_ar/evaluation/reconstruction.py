"""How faithful a tokenizer is: PSNR, SSIM, and how much of its codebook it uses."""

import math
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from st_ar.data.loading import decode
from st_ar.data.source import ImageSource
from st_ar.distributed import all_gather_ragged, all_reduce_sum
from st_ar.errors import UserError
from st_ar.evaluation.generation.features import Compute, Extractor, content_hash, image_batches
from st_ar.evaluation.generation.image_sets import ImageSet, image_digest
from st_ar.evaluation.metrics import FeatureStatistics, frechet_distance
from st_ar.figures import strip
from st_ar.files import atomic_write
from st_ar.hardware import describe
from st_ar.progress import progress
from st_ar.tokenizer import Tokenizer, to_pixels, to_uint8


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each pair: uint8 [B, H, W, 3] twice -> float [B]; infinite if they are equal."""
    error = (a.float() - b.float()).square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(255**2 / error)


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity of each pair, mean over colours and places: uint8 [B, H, W, 3] twice -> float [B].

    Wang et al. 2004: a Gaussian window of 11 pixels with deviation 1.5, K1 0.01, K2 0.03; windows do not leave the image.

    Raises:
        UserError: images smaller than the window.
    """
    if min(a.shape[1:3]) < 11:
        raise UserError(f"SSIM compares windows of 11 pixels: images of {a.shape[1]} x {a.shape[2]} are too small")
    offsets = torch.arange(11, device=a.device, dtype=torch.float64) - 5
    line = torch.exp(-(offsets**2) / (2 * 1.5**2))
    line = line / line.sum()

    def blur(x: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(x, line.view(1, 1, 11, 1)), line.view(1, 1, 1, 11))

    x, y = (image.permute(0, 3, 1, 2).reshape(-1, 1, *image.shape[1:3]).double() for image in (a, b))
    mean_x, mean_y = blur(x), blur(y)
    variance_x, variance_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    covariance = blur(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    likeness = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    likeness = likeness / ((mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2))
    return likeness.reshape(len(a), -1).mean(dim=1).float()


class Faithfulness(NamedTuple):
    """Of a tokenizer on some images."""

    psnr: float
    """Mean over images, dB; an image that comes back exactly counts as if one of its values were off by one level."""
    ssim: float
    """Mean over images."""
    usage: float
    """Share of the codebook that some image uses."""
    perplexity: float
    """exp of the entropy of the codes' frequencies: how many codes there would be if all were used alike."""


class FaithfulnessMeter:
    """Faithfulness of images that come in batches, and use of a codebook of `vocab_size` codes."""

    def __init__(self, vocab_size: int) -> None:
        self._codes = torch.zeros(vocab_size, dtype=torch.int64)
        self._sums = torch.zeros(3, dtype=torch.float64)  # PSNR, SSIM, images

    def update(self, codes: Tensor, images: Tensor, made: Tensor) -> None:
        """Take codes int64 [B, h, w], and uint8 [B, H, W, 3] before and after."""
        self._codes += torch.bincount(codes.flatten().cpu(), minlength=len(self._codes))
        exact = 10 * math.log10(
            255**2 * images[0].numel()
        )  # as if one value were off by one level, so that means are finite
        sums = [
            psnr(images, made).clamp(max=exact).double().sum().item(),
            ssim(images, made).double().sum().item(),
            len(images),
        ]
        self._sums += torch.tensor(sums, dtype=torch.float64)

    def reduce(self, device: torch.device | str = "cpu") -> None:
        """Take over what all ranks have seen, by way of their devices; every rank has to call it."""
        self._codes, self._sums = (all_reduce_sum(tensor.to(device)).cpu() for tensor in (self._codes, self._sums))

    @property
    def count(self) -> int:
        """Images so far."""
        return int(self._sums[2])

    def result(self) -> Faithfulness:
        """Of all images so far, one or more."""
        shares = self._codes.double() / self._codes.sum()
        return Faithfulness(
            psnr=(self._sums[0] / self._sums[2]).item(),
            ssim=(self._sums[1] / self._sums[2]).item(),
            usage=(self._codes > 0).double().mean().item(),
            perplexity=torch.special.entr(shares).sum().exp().item(),
        )


def reconstruct(tokenizer: Tokenizer, images: np.ndarray, batch_size: int = 64) -> tuple[np.ndarray, Faithfulness]:
    """Encode and decode images uint8 [N, S, S, 3]; the reconstructions, and how faithful they are."""
    pictures: list[Tensor] = []
    meter = FaithfulnessMeter(tokenizer.vocab_size)
    for start in range(0, len(images), batch_size):
        some = torch.from_numpy(images[start : start + batch_size])
        codes = tokenizer.encode(to_pixels(some))
        pictures.append(to_uint8(tokenizer.decode(codes)))
        meter.update(codes, some, pictures[-1])
    return torch.cat(pictures).numpy(), meter.result()


def evaluation_images(source: ImageSource, size: int, count: int, places: int = 16) -> np.ndarray:
    """Centre crops uint8 [n, size, size, 3] of up to `count` readable images, from some places all over the source.

    Raises:
        UserError: none of them can be read.
    """
    bounds, starts = np.array([0, count]), np.array([0])
    if not source.streaming and source.count and source.count > count:
        bounds = np.linspace(0, count, places + 1).astype(int)
        starts = bounds[:-1] + np.linspace(0, source.count - count, places).astype(int)
    found = [
        decode(list(islice(source.examples(int(start)), int(share))), size).pixels
        for start, share in zip(starts, np.diff(bounds), strict=True)
    ]
    images = np.concatenate(found)
    if not len(images):
        raise UserError(f"{source.name} has no image that can be read")
    return images


def save_picture(path: Path, images: np.ndarray, made: np.ndarray, count: int = 32, columns: int = 8) -> None:
    """Some of the images uint8 [N, S, S, 3], each above its reconstruction, as a PNG."""
    shown = min(count, len(images))
    shown -= shown % columns if shown > columns else 0
    chosen = np.linspace(0, len(images) - 1, shown).astype(int)
    rows = [chosen[start : start + columns] for start in range(0, shown, columns)]
    pairs = np.concatenate([pixels[row] for row in rows for pixels in (images, made)])
    with atomic_write(path) as aside:
        Image.fromarray(strip(pairs, min(columns, shown))).save(aside, format="PNG")


SHOWN = 32
"""Images in the picture."""


class _Picture:
    """Some images all over the set, with what became of them."""

    def __init__(self, images: ImageSet) -> None:
        last = SHOWN if images.count is None else images.count
        self.wanted = set(np.linspace(0, last - 1, min(SHOWN, last)).astype(int).tolist())
        self.found: list[tuple[int, Tensor]] = []

    def add(self, indices: list[int], images: Tensor, made: Tensor) -> None:
        for place, index in enumerate(indices):
            if index in self.wanted:
                self.found.append((index, torch.stack([images[place], made[place].cpu()])))

    def save(self, path: Path, size: tuple[int, int], compute: Compute) -> None:
        indices = torch.tensor([index for index, _ in self.found], dtype=torch.int64)
        pairs = torch.stack([pair for _, pair in self.found]) if self.found else torch.empty(0, 2, *size, 3).byte()
        indices, pairs = (all_gather_ragged(tensor.to(compute.device)).cpu() for tensor in (indices, pairs))
        if compute.ranks.rank == 0 and len(pairs):
            images, made = pairs[indices.argsort()].unbind(1)
            save_picture(path, images.numpy(), made.numpy(), SHOWN)


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
    """Encode and decode every image; the same on all ranks.

    Args:
        extractor: whose Frechet distance is taken; none if None.
        picture: PNG file for some of the images, each above its reconstruction (rank 0 writes it).
        folder: for every reconstruction as a PNG, named by the image's number; each rank writes its own.

    Returns:
        metrics (label -> number), images, tokenizer, extractor, environment.

    Raises:
        UserError: images that do not suit the tokenizer, are too few, or of which none can be used.
    """
    if images.size[0] != images.size[1]:
        raise UserError(
            f"{images.name} has images of {images.size[0]} x {images.size[1]} pixels: tokenizers take squares"
        )
    tokenizer.grid(images.size[0])
    meter, digests, shown = FaithfulnessMeter(tokenizer.vocab_size), list[tuple[int, bytes]](), _Picture(images)
    real, drawn = (FeatureStatistics(extractor.dim if extractor else 1, compute.device) for _ in range(2))
    share = images.count // compute.ranks.world if images.count is not None else None
    with progress("reconstruct", share, unit="images", shown=compute.ranks.rank == 0) as bar:
        for indices, pixels in image_batches(images, compute):
            digests += [(index, image_digest(image)) for index, image in zip(indices, pixels, strict=True)]
            there = torch.from_numpy(pixels)
            codes = tokenizer.encode(to_pixels(there))
            made = to_uint8(tokenizer.decode(codes)).cpu()
            meter.update(codes, there, made)
            shown.add(indices, there, made)
            if folder:
                for index, image in zip(indices, made.numpy(), strict=True):
                    Image.fromarray(image).save(folder / f"{index:06d}.png")
            if extractor:
                real.update(extractor.extract(there.to(compute.device)).features)
                drawn.update(extractor.extract(made.to(compute.device)).features)
            bar.advance(len(indices))
    meter.reduce(compute.device)
    if not meter.count:
        raise UserError(f"{images.name} has no usable image")
    if picture:
        shown.save(picture, images.size, compute)
    metrics: dict[str, float] = {}
    if extractor:
        real.reduce()
        drawn.reduce()
        metrics[f"r{extractor.label('fd')}"] = frechet_distance(*real.result(), *drawn.result())
    faithfulness = meter.result()
    metrics |= {"PSNR (dB)": faithfulness.psnr, "SSIM": faithfulness.ssim}
    metrics |= {"codebook usage": faithfulness.usage, "codebook perplexity": faithfulness.perplexity}
    content = content_hash(digests, compute)
    return {
        "metrics": metrics,
        "images": {"name": images.name, "count": meter.count, "size": list(images.size), "sha256": content},
        "tokenizer": {"fingerprint": tokenizer.fingerprint, "kind": tokenizer.kind, "codes": tokenizer.vocab_size},
        "extractor": {"name": extractor.name, "sha256": extractor.weights} if extractor else None,
        "environment": describe(),
    }
