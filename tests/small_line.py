"""A tokenizer, a store and a model that belong together, each made by the real thing in milliseconds."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from st_ar.data.source import Crops, Example, ImageSource
from st_ar.tokenizer.kmeans import KMeansTokenizer
from st_ar.tokenizer.tokenize import tokenize
from tests.toys import TINY, random_model, save_export


@dataclass(frozen=True)
class SmallLine:
    """Paths of what belongs together: TINY's vocabulary of 11, grid of 3 and 3 classes."""

    tokenizer: Path
    tokens: Path
    model: Path


def random_tokenizer(vocab_size: int = 11, seed: int = 0) -> KMeansTokenizer:
    """Random patches of 2 x 2 pixels."""
    codebook = torch.rand(vocab_size, 12, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return KMeansTokenizer(codebook, 2)


def random_source(count: int = 8, size: int = 6) -> ImageSource:
    """Noise, of the classes in turn."""
    pixels = np.random.default_rng(0).integers(0, 256, (count, size, size, 3)).astype(np.uint8)

    def examples(start: int) -> Iterator[Example]:
        for index in range(start, count):
            yield Example(Image.fromarray(pixels[index]), index % 3)

    names = ["ant", "bee", "cow"]
    return ImageSource(
        name="noise", class_names=names, count=count, examples=examples, size=size, crop_range=1.0, mirror=True
    )


def make_line(folder: Path) -> SmallLine:
    """Write all three below a folder."""
    tokenizer = random_tokenizer()
    tokenizer.save(folder / "tokenizer")
    tokenize(random_source(), tokenizer, Crops(kind="center", size=6, range=1.0), folder / "tokens")
    info = {"step": 7, "preset": "toy", "class_names": ["ant", "bee", "cow"], "tokenizer": tokenizer.fingerprint}
    save_export(folder / "model", random_model(TINY, 0), random_model(TINY, 1), info)
    return SmallLine(folder / "tokenizer", folder / "tokens", folder / "model")
