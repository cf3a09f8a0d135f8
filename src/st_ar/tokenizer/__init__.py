"""Tokenizers: images [B, 3, H, W] in [-1, 1] <-> codes [B, h, w]. Each is a folder that says what it is."""

from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from st_ar.errors import UserError
from st_ar.files import read_json

CONFIG = "tokenizer.json"


class Tokenizer(Protocol):
    """What every tokenizer offers."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what defines the codes' meaning."""
        ...

    @property
    def vocab_size(self) -> int:
        """Entries of the codebook."""
        ...

    def grid(self, size: int) -> int:
        """Codes per side of a square image of `size` pixels; an error if it does not fit."""
        ...

    def encode(self, images: Tensor) -> Tensor:
        """Images float [B, 3, H, W] in [-1, 1] -> codes int64 [B, h, w]."""
        ...

    def decode(self, codes: Tensor) -> Tensor:
        """Codes int64 [B, h, w] -> images float32 [B, 3, H, W] in [-1, 1]."""
        ...


def load_tokenizer(path: Path | str) -> Tokenizer:
    """A tokenizer from its folder.

    Raises:
        UserError: not a tokenizer's folder, an unknown kind, or damaged.
    """
    from st_ar.tokenizer.kmeans import KMeansTokenizer

    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"{folder} is no tokenizer: no such folder; `st-ar train-tokenizer` makes one")
    kind = read_json(folder / CONFIG, "a tokenizer").get("kind")
    if kind != KMeansTokenizer.kind:
        raise UserError(f"{folder / CONFIG} is of kind {kind!r}; this st-ar knows {KMeansTokenizer.kind!r}")
    return KMeansTokenizer.load(folder)


def to_pixels(images: Tensor) -> Tensor:
    """uint8 [B, H, W, 3] -> float32 [B, 3, H, W] in [-1, 1]."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """Float [B, 3, H, W] in [-1, 1] -> uint8 [B, H, W, 3], as LlamaGen and ADM do: clamp(127.5 x + 128) truncated."""
    return (127.5 * images + 128).clamp(0, 255).permute(0, 2, 3, 1).to(torch.uint8)
