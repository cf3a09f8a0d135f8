"""How faithful a tokenizer is on a set of images of any size, in one pass: rFID, PSNR, SSIM, use of the codebook.

rFID compares reconstructions with their originals; it says nothing on a generator (whose FID is gFID, see generation.py).
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from st_ar.distributed import joined
from st_ar.errors import UserError
from st_ar.evaluation.collect import Place, batches, content_hash, image_digest
from st_ar.evaluation.extractors import Extractor
from st_ar.evaluation.image_sets import ImageSet
from st_ar.evaluation.metrics import frechet_distance
from st_ar.evaluation.reconstruction import FaithfulnessMeter, save_picture
from st_ar.evaluation.statistics import FeatureStatistics
from st_ar.hardware import describe
from st_ar.progress import progress
from st_ar.tokenizer import Tokenizer, to_pixels, to_uint8

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

    def save(self, path: Path, size: tuple[int, int], place: Place) -> None:
        indices = torch.tensor([index for index, _ in self.found], dtype=torch.int64)
        pairs = torch.stack([pair for _, pair in self.found]) if self.found else torch.empty(0, 2, *size, 3).byte()
        indices, pairs = (joined(tensor.to(place.device)).cpu() for tensor in (indices, pairs))
        if place.ranks.rank == 0 and len(pairs):
            images, made = pairs[indices.argsort()].unbind(1)
            save_picture(path, images.numpy(), made.numpy(), SHOWN)


@torch.no_grad()
def measure_tokenizer(
    tokenizer: Tokenizer,
    images: ImageSet,
    extractor: Extractor | None,
    place: Place,
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
    real, drawn = (FeatureStatistics(extractor.dim if extractor else 1, place.device) for _ in range(2))
    share = images.count // place.ranks.world if images.count is not None else None
    with progress("reconstruct", share, unit="images", shown=place.ranks.rank == 0) as bar:
        for indices, pixels in batches(images, place):
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
                real.update(extractor.extract(there.to(place.device)).features)
                drawn.update(extractor.extract(made.to(place.device)).features)
            bar.advance(len(indices))
    meter.reduce(place.device)
    if not meter.count:
        raise UserError(f"{images.name} has no image that can be used")
    if picture:
        shown.save(picture, images.size, place)
    metrics: dict[str, float] = {}
    if extractor:
        real.reduce()
        drawn.reduce()
        metrics[f"r{extractor.label('fd')}"] = frechet_distance(*real.result(), *drawn.result())
    faithfulness = meter.result()
    metrics |= {"PSNR (dB)": faithfulness.psnr, "SSIM": faithfulness.ssim}
    metrics |= {"codebook usage": faithfulness.usage, "codebook perplexity": faithfulness.perplexity}
    content = content_hash(digests, place)
    return {
        "metrics": metrics,
        "images": {"name": images.name, "count": meter.count, "size": list(images.size), "sha256": content},
        "tokenizer": {"fingerprint": tokenizer.fingerprint, "kind": tokenizer.kind, "codes": tokenizer.vocab_size},
        "extractor": {"name": extractor.name, "sha256": extractor.weights} if extractor else None,
        "environment": describe(),
    }
