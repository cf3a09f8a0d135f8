"""Hidden states of a frozen model, which probes read, and their cache on disk."""

import contextlib
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from io import BytesIO, FileIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from st_ar.config import ModelConfig
from st_ar.data.store import TokenStore
from st_ar.errors import UserError
from st_ar.evaluation.attention import require_between
from st_ar.evaluation.metrics import require_bounded
from st_ar.files import open_array, read_json, sha256, write_json
from st_ar.hardware import to_device
from st_ar.model.transformer import Transformer
from st_ar.progress import progress
from st_ar.settings import to_dict

FORMAT_VERSION = 1
FEATURES, ENTRY, LOCK = "features.npy", "entry.json", "lock"
HEADER = 128
"""Bytes of a .npy file's header."""
GB = 10**9

Entry = dict[str, Any]
"""The description of an entry, which is also its key: plain JSON values, among them the features' shape [n, ..]."""


class FeatureCache:
    """A folder of features.

    Args:
        folder: created when needed. Other files in it are left alone.
        limit: largest size of all entries in bytes. The least recently used are removed first.
        stored: dtype on disk. float16 takes half the space and rounds to 11 bits.
    """

    def __init__(self, folder: Path, limit: float, stored: Literal["float32", "float16"] = "float32") -> None:
        if not limit > 0:
            raise UserError(f"--cache-limit must be above 0 GB, not {limit / GB:g}")
        self.folder, self.limit, self.stored = folder, limit, stored
        self.reserved: dict[str, int] = {}
        self.reused = self.written = 0

    def name(self, entry: Entry) -> str:
        """Return an entry's folder name, the first 32 digits of the SHA-256 of its description."""
        text = json.dumps(self._described(entry), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def _described(self, entry: Entry) -> Entry:
        return {"format_version": FORMAT_VERSION, **entry, "stored": self.stored}

    def _size(self, entry: Entry) -> int:
        return HEADER + math.prod(entry["shape"]) * np.dtype(self.stored).itemsize

    def reserve(self, entries: Iterable[Entry]) -> None:
        """Make space for these entries and those reserved before, by removing the least recently used of the others."""
        self.reserved |= {self.name(entry): self._size(entry) for entry in entries}
        total = sum(self.reserved.values())
        less = "; fewer --layers, --steps or --train-crops need less" + (
            "" if self.stored == "float16" else ", --cache-dtype float16 half as much"
        )
        if total > self.limit:
            raise UserError(
                f"the features take {_gigabytes(total)}, more than --cache-limit {self.limit / GB:g} GB: raise it{less}"
            )
        with self._writing():
            self.folder.mkdir(parents=True, exist_ok=True)
        self._clear_partial()
        sizes = self._entries()
        missing = sum(size for name, size in self.reserved.items() if name not in sizes)
        taken = sum(sizes.values()) + missing
        others = [name for name in sizes if name not in self.reserved]
        free = shutil.disk_usage(self.folder).free
        if missing > free + sum(sizes[name] for name in others):
            raise UserError(
                f"the features take {_gigabytes(missing)} more, and the disk of {self.folder} has {_gigabytes(free)} left: "
                f"free some space, or give a --cache on another disk{less}"
            )
        for name in others:
            if taken <= self.limit and missing <= shutil.disk_usage(self.folder).free:
                break
            shutil.rmtree(self.folder / name, ignore_errors=True)
            taken -= sizes[name]

    def _entries(self) -> dict[str, int]:
        """Return the size in bytes of each complete entry, least recently used first."""
        entries: list[tuple[int, str, int]] = []
        for folder in self.folder.iterdir():
            if re.fullmatch(r"[0-9a-f]{32}", folder.name):
                with contextlib.suppress(OSError):  # another process may remove it
                    size = (folder / FEATURES).stat().st_size
                    entries.append(((folder / ENTRY).stat().st_mtime_ns, folder.name, size))
        return {name: size for _, name, size in sorted(entries)}

    def _clear_partial(self) -> None:
        """Remove the folders of killed calls. A running call holds the lock in its folder."""
        for folder in self.folder.glob(".*.partial"):
            with contextlib.suppress(OSError), open(folder / LOCK, "rb") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)

    def find(self, entry: Entry, *, verify: bool = True) -> np.ndarray | None:
        """Return the features of an entry, memory-mapped; None if they are missing. Damaged entries are removed.

        Args:
            verify: check the checksum too.
        """
        folder = self.folder / self.name(entry)
        if not folder.is_dir():
            return None
        try:
            array = open_array(folder / FEATURES)
            valid = list(array.shape) == entry["shape"] and array.dtype == np.dtype(self.stored)
            if valid and verify:
                digest = read_json(folder / ENTRY, "an entry of the cache").get("sha256")
                valid = digest == sha256(folder / FEATURES)
        except (OSError, ValueError):
            array, valid = None, False
        if not valid:
            shutil.rmtree(folder, ignore_errors=True)
            return None
        with contextlib.suppress(OSError):  # another user's cache
            os.utime(folder / ENTRY)
        return array

    @contextlib.contextmanager
    def writing(self, entries: Sequence[Entry]) -> Generator[list["FeatureFile"]]:
        """Open files for the features [n, ..] of new entries. They are kept only if the block succeeds."""
        asides: list[Path] = []
        with contextlib.ExitStack() as stack:
            stack.callback(lambda: [shutil.rmtree(aside, ignore_errors=True) for aside in asides])
            files: list[FeatureFile] = []
            with self._writing():
                for entry in entries:
                    aside = self.folder / f".{self.name(entry)}.{os.getpid()}.partial"
                    asides.append(aside)
                    aside.mkdir(parents=True, exist_ok=True)
                    fcntl.flock(stack.enter_context(open(aside / LOCK, "wb")), fcntl.LOCK_EX)
                    file = stack.enter_context(open(aside / FEATURES, "wb", buffering=0))
                    files.append(FeatureFile(self, file, entry["shape"]))
            yield files
            for entry, aside, file in zip(entries, asides, files, strict=True):
                with self._writing():
                    os.fsync(file.file.fileno())
                    write_json(aside / ENTRY, {**self._described(entry), "sha256": file.digest.hexdigest()})
                    folder = self.folder / self.name(entry)
                    if not folder.exists():  # another process may have written it
                        os.replace(aside, folder)
                        (folder / LOCK).unlink()
                self.written += 1

    @contextlib.contextmanager
    def _writing(self) -> Generator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"cannot write features to {self.folder} ({error.strerror or error}); nothing there was changed: free some space, "
                "or give another --cache"
            ) from error


class FeatureFile:
    """A .npy file that grows row by row. It is not memory-mapped, so that a full disk is an error and not a signal."""

    def __init__(self, cache: FeatureCache, file: FileIO, shape: list[int]) -> None:
        self.cache, self.file = cache, file
        header = {"descr": np.dtype(cache.stored).str, "fortran_order": False, "shape": tuple(shape)}
        start = BytesIO()
        np.lib.format.write_array_header_1_0(start, header)
        self.digest = hashlib.sha256()
        self._write(start.getbuffer())

    def write(self, rows: np.ndarray) -> None:
        """Append float32 rows [n, ..]."""
        with np.errstate(over="ignore"):
            stored = np.ascontiguousarray(rows, np.dtype(self.cache.stored))
        if not np.isfinite(stored).all():
            raise UserError(
                f"features reach {np.abs(rows).max():.3g}, too large for --cache-dtype float16: give float32"
            )
        self._write(stored.reshape(-1).view(np.uint8).data)

    def _write(self, data: memoryview) -> None:
        self.digest.update(data)
        with self.cache._writing():
            while data:
                data = data[self.file.write(data) :]


def _gigabytes(size: float) -> str:
    return f"{size / GB:.3g} GB"


MAX_BATCH_BYTES = 1 << 31
"""Largest size of one batch's hidden states."""


def uniform_steps(length: int, count: int = 8) -> list[int]:
    """Return `count` uniformly spaced steps that end at `length`, such as 32, 64, .. 256."""
    if not 1 <= count <= length:
        raise UserError(f"{count} steps are not possible: an image of this model has {length}; give 1 to {length}")
    return [round(length * (i + 1) / count) for i in range(count)]


def token_batches(store: TokenStore, crops: Sequence[int], batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield tokens int64 [n, T] and labels [n] of all images, crop by crop."""
    for crop in crops:
        for start in range(0, len(store), batch_size):
            images = np.arange(start, min(start + batch_size, len(store)))
            codes = store.codes(images, np.full((len(images), 1), crop))[:, 0]
            yield torch.from_numpy(codes.astype(np.int64)), torch.from_numpy(store.labels[images])


@dataclass(frozen=True, kw_only=True)
class FeatureSpec:
    """Which hidden states to read, and how to compute them."""

    layers: Sequence[int]
    """Counted from 1."""
    steps: Sequence[int]
    """In 1..T."""
    dtype: torch.dtype = torch.float32
    """Type of the network's matrix products."""
    batch_size: int = 256
    """Maximum number of images in the network at once. It changes features only by rounding."""

    def check(self, config: ModelConfig, store: TokenStore, crops: Sequence[int]) -> None:
        """Refuse a store that does not fit the model, and layers, steps or crops out of range."""
        store.check_model(config)
        require_between("layer", self.layers, 1, config.n_layers, "this network has layers")
        require_between("step", self.steps, 1, config.sequence_length, "this model's images have steps")
        require_between("crop", crops, 0, len(store.meta.crops) - 1, f"{store.folder} has crops")
        for name, values in (("--layers", self.layers), ("--steps", self.steps), ("--train-crops", crops)):
            if not values:
                raise UserError(f"{name} is empty: give at least one")
            if len(set(values)) < len(values):
                raise UserError(f"{name} {' '.join(map(str, values))} repeats a value: give each once")


@dataclass(frozen=True, kw_only=True)
class ProbeFeatures:
    """Hidden states and labels of a store's images, crop by crop."""

    layers: dict[int, np.ndarray]
    """Layer -> [n, S, D], in memory or memory-mapped."""
    labels: Tensor
    """int64 [n]."""


@torch.no_grad()
def read_features(
    model: Transformer, tokens: Tensor, layers: Sequence[int], steps: Sequence[int], dtype: torch.dtype = torch.float32
) -> dict[int, Tensor]:
    """Return hidden states of tokens [n, T] under the null condition: layer -> float32 [n, S, D] on the CPU.

    Step t is the position that predicts token t after t - 1 tokens.
    """
    device = model.output.weight.device
    with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
        null = model.null_condition(len(tokens))
        states = model.features(to_device(tokens[:, :-1], device), null, layers=layers)
    positions = to_device(torch.tensor(steps) - 1, device)
    return {layer: states[layer][:, positions].float().cpu() for layer in layers}


def hidden_states(
    model: Transformer, store: TokenStore, spec: FeatureSpec, crops: Sequence[int]
) -> Iterator[dict[int, np.ndarray]]:
    """Yield batches of hidden states, crop by crop: layer -> float32 [n, S, D]."""
    assert not model.training
    config = model.config
    fitting = MAX_BATCH_BYTES // (4 * config.sequence_length * config.dim * len(spec.layers))
    numbers = ", ".join(map(str, spec.layers))
    done, remedy = 0, "check the model, or give --dtype float32"
    with progress(f"read layer {numbers}", len(store) * len(crops), unit="images") as bar:
        for tokens, _ in token_batches(store, crops, max(1, min(spec.batch_size, fitting))):
            states = read_features(model, tokens, spec.layers, spec.steps, spec.dtype)
            for layer, rows in states.items():
                require_bounded(
                    rows,
                    lambda i, n=layer, s=done: f"image {(s + i) % len(store)} of {store.folder} in layer {n}",
                    remedy,
                )
            done += len(tokens)
            yield {layer: rows.numpy() for layer, rows in states.items()}
            bar.advance(len(tokens))


def describe_features(
    config: ModelConfig, weights: str, store: TokenStore, crops: Sequence[int], spec: FeatureSpec
) -> dict[int, Entry]:
    """Return all that determines each layer's features; `weights` is the SHA-256 of the model's file."""
    common = {
        "weights": weights,
        "model": to_dict(config),
        "store": store.fingerprint,
        "crops": list(crops),
        "steps": list(spec.steps),
        "dtype": str(spec.dtype).removeprefix("torch."),
        "shape": [len(store) * len(crops), len(spec.steps), config.dim],
    }
    return {layer: common | {"layer": layer} for layer in spec.layers}


def extract_features(
    model: Transformer,
    store: TokenStore,
    spec: FeatureSpec,
    *,
    crops: Sequence[int] = (0,),
    cache: FeatureCache | None = None,
    weights: str = "",
) -> ProbeFeatures:
    """Read the hidden states of a store's images under the null condition, on the model's device.

    Args:
        cache: cache on disk; None keeps the features in memory. weights: SHA-256 of the model's file, the cache's key.

    Raises:
        UserError: a store that does not fit the model, a layer, step or crop out of range, or no space for the cache.
    """
    spec.check(model.config, store, crops)
    labels = torch.from_numpy(np.tile(store.labels, len(crops)))
    if cache is None:
        shape = (len(labels), len(spec.steps), model.config.dim)
        arrays = {layer: np.empty(shape, np.float32) for layer in spec.layers}
        start = 0
        for states in hidden_states(model, store, spec, crops):
            for layer, rows in states.items():
                arrays[layer][start : start + len(rows)] = rows
            start += len(states[spec.layers[0]])
        return ProbeFeatures(layers=arrays, labels=labels)
    assert weights, "the cache's key needs the weights' SHA-256"
    entries = describe_features(model.config, weights, store, crops, spec)
    cache.reserve(entries.values())
    cached = {layer: array for layer, entry in entries.items() if (array := cache.find(entry)) is not None}
    cache.reused += len(cached)
    if missing := [layer for layer in spec.layers if layer not in cached]:
        with cache.writing([entries[layer] for layer in missing]) as files:
            for states in hidden_states(model, store, replace(spec, layers=missing), crops):
                for file, layer in zip(files, missing, strict=True):
                    file.write(states[layer])
        for layer in missing:
            if (array := cache.find(entries[layer], verify=False)) is None:
                raise UserError(
                    f"features vanished from {cache.folder} or cannot be read back: does another call share it with a lower --cache-limit?"
                )
            cached[layer] = array
    return ProbeFeatures(layers={layer: cached[layer] for layer in spec.layers}, labels=labels)
