"""The text store: features of captions from any text encoder, concatenated in .safetensors files (docs/formats.md)."""

import hashlib
from collections.abc import Iterable
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from st_ar.config import ModelConfig
from st_ar.data.store import TokenStore
from st_ar.errors import UserError
from st_ar.files import ROWS, in_pieces, opened_safetensors, require_absent, require_digest, save_tensors, sha256

DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
"""Types of features, with safetensors' names."""


def write_text(path: Path | str, captions: Iterable[np.ndarray | Tensor], *, encoder: str = "") -> None:
    """Write captions' features to a new .safetensors file. Many captions may be split into several files in a folder.

    Args:
        captions: [length, dim] for each image of the token store, in its order; all of one width and type (float32, float16
            or bfloat16), without padding.
        encoder: name of the text encoder. Training records it; sampling refuses captions of another.

    Raises:
        UserError: an existing file or another suffix; no captions; or a caption that is empty, of another shape or type, not
            finite, or with a row of zeros, which means padding.
    """
    path = Path(path).expanduser()
    if path.suffix != ".safetensors":
        raise UserError(f"{path} is not a .safetensors file: give a name with that suffix")
    require_absent(path, "a text store")
    rows: list[Tensor] = []
    for index, caption in enumerate(captions):
        rows.append(torch.as_tensor(caption).detach().cpu())
        _check_caption(rows[-1], rows[0], index)
    if not rows:
        raise UserError(f"{path}: no captions were given")
    tensors = {"features": torch.cat(rows), "lengths": torch.tensor([len(row) for row in rows])}
    save_tensors(path, tensors, encoder=encoder)


def _check_caption(rows: Tensor, first: Tensor, index: int) -> None:
    if rows.dim() != 2 or len(rows) == 0 or rows.dtype not in DTYPES:
        raise UserError(
            f"caption {index} is {rows.dtype} {list(rows.shape)}: give [length, dim] of at least one row, in float32, "
            "float16 or bfloat16"
        )
    if (rows.shape[1], rows.dtype) != (first.shape[1], first.dtype):
        raise UserError(
            f"caption {index} has rows of {rows.shape[1]} {rows.dtype}, the first of {first.shape[1]} {first.dtype}: "
            "all must come from one encoder"
        )
    if not rows.isfinite().all():
        raise UserError(f"caption {index} has features that are not finite: encode it in float32 or bfloat16")
    if not rows.any(dim=1).all():
        raise UserError(f"caption {index} has a row of zeros, which means padding: give captions without padding")


class TextStore:
    """Captions' features opened for reading: a file of `write_text`, or a folder of such files, sorted by name.

    Caption i belongs to image i of the token store. The files are memory-mapped.

    Raises:
        UserError: missing, damaged, or not of this format.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path).expanduser()
        if not self.path.exists():
            raise UserError(f"{path} does not exist: give captions' features, a .safetensors file or a folder of them")
        files = sorted(self.path.glob("*.safetensors")) if self.path.is_dir() else [self.path]
        self.files = [file for file in files if not file.name.startswith(".")]
        if not self.files:
            raise UserError(f"{path} has no .safetensors file with captions' features")
        opened = [_open(file) for file in self.files]
        self._features = [features for features, _, _ in opened]
        lengths = [lengths for _, lengths, _ in opened]
        self.dim = int(self._features[0].get_shape()[1])
        self.encoder = opened[0][2]
        for file, features, (_, _, encoder) in zip(self.files, self._features, opened, strict=True):
            if (features.get_shape()[1], encoder) != (self.dim, self.encoder):
                raise UserError(
                    f"{file} has features of width {features.get_shape()[1]} by encoder {encoder!r}, {self.files[0].name} of "
                    f"{self.dim} by {self.encoder!r}: give files of one encoder"
                )
        self.lengths = np.concatenate(lengths)
        """Rows of each caption, int64 [captions]."""
        self._starts = np.concatenate([np.cumsum(each) - each for each in lengths])  # in the caption's file
        self._firsts = np.cumsum([0] + [len(each) for each in lengths])[:-1]  # each file's first caption

    def __len__(self) -> int:
        """Number of captions."""
        return len(self.lengths)

    def features(self, images: np.ndarray, text_tokens: int) -> Tensor:
        """Features float32 [B, text_tokens, dim] of the images [B]: padded with zeros on the left, or truncated."""
        if len(images) and not 0 <= int(images.min()) <= int(images.max()) < len(self):
            raise UserError(
                f"{self.path} has captions 0 to {len(self) - 1}, not {images.min()} to {images.max()}: give images in that range"
            )
        out = torch.zeros(len(images), text_tokens, self.dim)
        files = np.searchsorted(self._firsts, images, side="right") - 1
        for row, image, file in zip(out, images, files, strict=True):
            start, count = int(self._starts[image]), min(int(self.lengths[image]), text_tokens)
            row[text_tokens - count :] = self._features[file][start : start + count]
        return out

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the files' checksums. Reads all files."""
        return hashlib.sha256(" ".join(sha256(file) for file in self.files).encode()).hexdigest()

    def verify(self) -> None:
        """Check every file's checksum. Reads all files."""
        for path in self.files:
            with opened_safetensors(path) as (file, metadata):
                features = file.get_slice("features")
                rows = (
                    ("features", features[start : start + ROWS]) for start in range(0, features.get_shape()[0], ROWS)
                )
                require_digest(path, metadata, chain(rows, in_pieces({"lengths": file.get_tensor("lengths")})))

    def describe(self) -> dict[str, object]:
        """What a run records about its captions."""
        return {"encoder": self.encoder, "fingerprint": self.fingerprint}

    def check_tokens(self, store: TokenStore) -> None:
        """Refuse a token store with another number of images."""
        if len(self) != len(store):
            skipped = f" (its skipped.jsonl lists {store.meta.skipped} more)" if store.meta.skipped else ""
            raise UserError(
                f"{self.path} has {len(self)} captions, {store.folder} {len(store)} images{skipped}: "
                "give one caption for each image, in the same order"
            )


def _open(path: Path) -> tuple[Any, np.ndarray, str]:
    """A file's features (to be sliced), lengths and encoder."""
    with opened_safetensors(path) as (file, metadata):
        keys = set(file.keys())
        if keys != {"features", "lengths"}:
            raise UserError(f"{path} has {', '.join(sorted(keys)) or 'nothing'}: a text store has features and lengths")
        features, lengths = file.get_slice("features"), file.get_tensor("lengths")
        encoder = metadata.get("encoder") or (file.metadata() or {}).get("encoder", "")
    shape, dtype = features.get_shape(), features.get_dtype()
    if len(shape) != 2 or dtype not in DTYPES.values():
        raise UserError(f"{path}: features are {dtype} {shape}, not [rows, dim] in one of {', '.join(DTYPES.values())}")
    if lengths.dim() != 1 or lengths.dtype != torch.int64 or len(lengths) == 0 or int(lengths.min()) < 1:
        raise UserError(f"{path}: lengths must be int64 [captions], each 1 or more, with at least one caption")
    if int(lengths.sum()) != shape[0]:
        raise UserError(
            f"{path}: the lengths sum to {int(lengths.sum())}, but there are {shape[0]} rows: write it again"
        )
    return features, lengths.numpy(), encoder


def open_text(path: Path | None, config: ModelConfig, encoder: str = "") -> TextStore | None:
    """The captions for a text model; None for a class model.

    Args:
        encoder: text encoder of the model's training, if known.
    """
    if config.condition == "class":
        if path is not None:
            raise UserError(
                f"--text {path} is for text models, and this one is for {config.condition_name}: leave it out"
            )
        return None
    if path is None:
        raise UserError("this model needs captions: give their features with --text")
    text = TextStore(path)
    if text.dim != config.text_dim:
        raise UserError(
            f"{path} has features of width {text.dim}, the model reads {config.text_dim}: train with --model.text-dim {text.dim}, "
            "or use the encoder that the model was made for"
        )
    if encoder and text.encoder and encoder != text.encoder:
        raise UserError(
            f"{path} was encoded by {text.encoder!r}, the model was trained on captions by {encoder!r}: encode them with the latter"
        )
    return text
