"""Tokenizers: images [B, 3, H, W] in [-1, 1] <-> codes [B, h, w]. Each is a folder that says what it is."""

import math
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from st_ar.errors import UserError
from st_ar.files import read_json
from st_ar.hardware import choose_device, local_device, require_compiler
from st_ar.tokenizer.vq import VQTokenizer

CONFIG = "tokenizer.json"


class Tokenizer(Protocol):
    """What every tokenizer offers."""

    kind: ClassVar[str]

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what defines the codes' meaning."""
        ...

    @property
    def vocab_size(self) -> int:
        """Entries of the codebook."""
        ...

    @property
    def patch(self) -> int:
        """Side in pixels of what a code stands for."""
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
    """A tokenizer from its folder, or from a file of LlamaGen's (vq_ds16_c2i.pt, vq_ds8_c2i.pt); FILE#ema takes its EMA weights.

    Raises:
        UserError: not a tokenizer, an unknown kind, damaged, or a pickle that holds more than weights.
    """
    from st_ar.tokenizer.kmeans import KMeansTokenizer
    from st_ar.tokenizer.vq import VQTokenizer

    place = Path(path).expanduser()
    if str(place).endswith("#ema") and not place.exists():
        return VQTokenizer.from_file(Path(str(place).removesuffix("#ema")), ema=True)
    if place.is_file():
        return VQTokenizer.from_file(place)
    if not place.is_dir():
        raise UserError(f"{place} is no tokenizer: no such folder or file; `st-ar train-tokenizer` makes one")
    kinds = {KMeansTokenizer.kind: KMeansTokenizer, VQTokenizer.kind: VQTokenizer}
    kind = read_json(place / CONFIG, "a tokenizer").get("kind")
    if not isinstance(kind, str) or kind not in kinds:
        raise UserError(f"{place / CONFIG} is of kind {kind!r}; this st-ar knows {' and '.join(map(repr, kinds))}")
    return kinds[kind].load(place)


def to_pixels(images: Tensor) -> Tensor:
    """uint8 [B, H, W, 3] -> float32 [B, 3, H, W] in [-1, 1]."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """Float [B, 3, H, W] in [-1, 1] -> uint8 [B, H, W, 3], as LlamaGen and ADM do: clamp(127.5 x + 128) truncated."""
    return (127.5 * images + 128).clamp(0, 255).permute(0, 2, 3, 1).to(torch.uint8)


def decode_to_images(tokenizer: Tokenizer, tokens: Tensor) -> np.ndarray:
    """Tokens [n, T] of square images as the tokenizer shows them: uint8 [n, H, W, 3]."""
    grid = math.isqrt(tokens.shape[1])
    return to_uint8(tokenizer.decode(tokens.cpu().unflatten(1, (grid, grid)))).numpy()


def open_tokenizer(path: Path, device: str, dtype: str, compiled: bool = False) -> Tokenizer:
    """Load a tokenizer; a VQ network goes to `device`, under torchrun to the GPU of its local rank, and computes in `dtype`,
    perhaps `compiled`.

    Raises:
        UserError: no tokenizer, or no such device.
    """
    tokenizer = load_tokenizer(path)
    if isinstance(tokenizer, VQTokenizer):
        chosen = local_device(choose_device(device))
        if compiled:
            require_compiler(chosen)
        kind = torch.bfloat16 if dtype == "bfloat16" else torch.float32
        tokenizer = tokenizer.to(chosen, kind, compiled=compiled)
    return tokenizer
