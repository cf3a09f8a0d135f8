"""Tokenizers: images [B, 3, H, W] in [-1, 1] <-> codes [B, h, w]."""

import math
from pathlib import Path
from typing import ClassVar, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from st_ar.errors import UserError, damaged
from st_ar.files import read_json
from st_ar.hardware import choose_compile, choose_device, local_device
from st_ar.tokenizer.kmeans import KMeansTokenizer
from st_ar.tokenizer.vq import CONFIG, FORMAT_VERSION, WEIGHTS, VQTokenizer


class Tokenizer(Protocol):
    """The interface of tokenizers."""

    kind: ClassVar[str]

    @property
    def fingerprint(self) -> str:
        """SHA-256 of everything that determines the codes."""
        ...

    @property
    def vocab_size(self) -> int:
        """Number of codes in the codebook."""
        ...

    @property
    def patch(self) -> int:
        """Side of a code's patch in pixels."""
        ...

    def grid(self, size: int) -> int:
        """Codes per side of a square image of `size` pixels; UserError if the patches do not fit."""
        ...

    def encode(self, images: Tensor) -> Tensor:
        """Images float [B, 3, H, W] in [-1, 1] -> codes int64 [B, h, w]."""
        ...

    def decode(self, codes: Tensor) -> Tensor:
        """Codes int64 [B, h, w] -> images float32 [B, 3, H, W] in [-1, 1]."""
        ...


def load_tokenizer(path: Path | str) -> Tokenizer:
    """Load a tokenizer from its folder, or from LlamaGen's file (vq_ds16_c2i.pt, vq_ds8_c2i.pt). FILE#ema takes its EMA weights.

    Raises:
        UserError: not a tokenizer, an unknown kind, damaged, or a pickle of more than weights.
    """
    path = Path(path).expanduser()
    if str(path).endswith("#ema") and not path.exists():
        return VQTokenizer.from_file(Path(str(path).removesuffix("#ema")), ema=True)
    if path.is_file():
        return VQTokenizer.from_file(path)
    if not path.is_dir():
        raise UserError(f"{path} is not a tokenizer: no such folder or file; `st-ar train-tokenizer` makes one")
    config = read_json(path / CONFIG, "a tokenizer")
    kind, version = config.get("kind"), config.get("format_version")
    if kind not in (KMeansTokenizer.kind, VQTokenizer.kind):
        raise UserError(f"{path / CONFIG} is of kind {kind!r}; this st-ar knows 'kmeans' and 'vq'")
    if version != FORMAT_VERSION:
        raise UserError(f"{path / CONFIG} has format {version}; this st-ar reads {FORMAT_VERSION}")
    is_vq = kind == VQTokenizer.kind
    tokenizer = VQTokenizer.from_file(path / WEIGHTS) if is_vq else KMeansTokenizer.load(path, config.get("patch"))
    if tokenizer.fingerprint != config.get("fingerprint"):
        raise damaged(path, "its weights do not match its fingerprint", "copy or train the tokenizer again")
    return tokenizer


def to_pixels(images: Tensor) -> Tensor:
    """uint8 [B, H, W, 3] -> float32 [B, 3, H, W] in [-1, 1]."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """Float [B, 3, H, W] in [-1, 1] -> uint8 [B, H, W, 3], as in LlamaGen and ADM: clamp(127.5 x + 128), truncated."""
    return (127.5 * images + 128).clamp(0, 255).permute(0, 2, 3, 1).to(torch.uint8)


def decode_to_images(tokenizer: Tokenizer, tokens: Tensor) -> np.ndarray:
    """Decode the tokens [n, T] of square images: uint8 [n, H, W, 3]."""
    grid = math.isqrt(tokens.shape[1])
    return to_uint8(tokenizer.decode(tokens.cpu().unflatten(1, (grid, grid)))).numpy()


def open_tokenizer(path: Path, device: str, dtype: str, compiled: bool | Literal["auto"] = False) -> Tokenizer:
    """Load a tokenizer for a device; `dtype` and `compiled` (see `choose_compile`) apply to VQ networks."""
    tokenizer = load_tokenizer(path)
    if isinstance(tokenizer, VQTokenizer):
        chosen = local_device(choose_device(device))
        kind = torch.bfloat16 if dtype == "bfloat16" else torch.float32
        tokenizer = tokenizer.to(chosen, kind, compiled=choose_compile(compiled, chosen))
    return tokenizer
