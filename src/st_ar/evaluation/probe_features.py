"""Features that probes read from a frozen model, and their cache on disk."""

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
from st_ar.files import open_array, read_json, sha256, write_json
from st_ar.model.transformer import Transformer
from st_ar.progress import progress
from st_ar.settings import to_dict

FORMAT_VERSION = 1
FEATURES, ENTRY, LOCK = "features.npy", "entry.json", "lock"
HEADER = 128
"""Bytes of a .npy file before its numbers."""
GB = 10**9

Entry = dict[str, Any]
"""What an entry says of itself, and its key: plain JSON values, among them the features' shape [n, ..]."""


class FeatureCache:
    """A folder of features.

    Args:
        folder: made when it is needed; what else lies in it is left alone.
        limit: bytes that all entries together may take; the ones not used for longest make room.
        stored: type of the numbers on disk. float16 takes half the room and keeps 11 bits of each.
    """

    def __init__(self, folder: Path, limit: float, stored: Literal["float32", "float16"] = "float32") -> None:
        if not limit > 0:
            raise UserError(f"--cache-limit must be above 0 GB, not {limit / GB:g}")
        self.folder, self.limit, self.stored = folder, limit, stored
        self.wanted: dict[str, int] = {}
        self.reused = self.written = 0
        """Entries found and entries made so far."""

    def name(self, entry: Entry) -> str:
        """The folder of an entry: the first 32 digits of the SHA-256 of its description."""
        text = json.dumps(self._described(entry), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def _described(self, entry: Entry) -> Entry:
        return {"format_version": FORMAT_VERSION, **entry, "stored": self.stored}

    def _size(self, entry: Entry) -> int:
        return HEADER + math.prod(entry["shape"]) * np.dtype(self.stored).itemsize

    def reserve(self, entries: Iterable[Entry]) -> None:
        """Make room for these entries beside those reserved before, by removing others, the longest unused first.

        Raises:
            UserError: together they are larger than the limit, or what is missing of them than the disk has room for.
        """
        self.wanted |= {self.name(entry): self._size(entry) for entry in entries}
        total = sum(self.wanted.values())
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
        there = self._entries()
        missing = sum(size for name, size in self.wanted.items() if name not in there)
        taken = sum(there.values()) + missing
        others = [name for name in there if name not in self.wanted]
        free = shutil.disk_usage(self.folder).free
        if missing > free + sum(there[name] for name in others):
            raise UserError(
                f"the features take {_gigabytes(missing)} more, and the disk of {self.folder} has {_gigabytes(free)} left: "
                f"free some space, or give a --cache on another disk{less}"
            )
        for name in others:
            if taken <= self.limit and missing <= shutil.disk_usage(self.folder).free:
                break
            shutil.rmtree(self.folder / name, ignore_errors=True)
            taken -= there[name]

    def _entries(self) -> dict[str, int]:
        """Whole entries and their bytes, the longest unused first."""
        found: list[tuple[int, str, int]] = []
        for place in self.folder.iterdir():
            if re.fullmatch(r"[0-9a-f]{32}", place.name):
                with contextlib.suppress(OSError):  # another process may remove it
                    size = (place / FEATURES).stat().st_size
                    found.append(((place / ENTRY).stat().st_mtime_ns, place.name, size))
        return {name: size for _, name, size in sorted(found)}

    def _clear_partial(self) -> None:
        """Remove what killed calls left; a living one holds the lock in its folder."""
        for place in self.folder.glob(".*.partial"):
            with contextlib.suppress(OSError), open(place / LOCK, "rb") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(place, ignore_errors=True)

    def find(self, entry: Entry) -> np.ndarray | None:
        """The features of an entry, memory-mapped, or None if they are not there (or damaged: then they are removed)."""
        array = self._load(entry, verify=True)
        self.reused += array is not None
        return array

    def _load(self, entry: Entry, *, verify: bool) -> np.ndarray | None:
        place = self.folder / self.name(entry)
        if not place.is_dir():
            return None
        try:
            array = open_array(place / FEATURES)
            whole = not verify or read_json(place / ENTRY, "an entry of the cache").get("sha256") == sha256(
                place / FEATURES
            )
        except (OSError, ValueError):
            array, whole = None, False
        if array is not None and whole and list(array.shape) == entry["shape"] and array.dtype == np.dtype(self.stored):
            with contextlib.suppress(OSError):  # a cache of somebody else's
                os.utime(place / ENTRY)
            return array
        shutil.rmtree(place, ignore_errors=True)
        return None

    def open(self, entry: Entry) -> np.ndarray:
        """The features of an entry that was just written."""
        array = self._load(entry, verify=False)
        if array is None:
            raise UserError(
                f"features vanished from {self.folder} or cannot be read back: does another call share it with a lower --cache-limit?"
            )
        return array

    @contextlib.contextmanager
    def writing(self, entries: Sequence[Entry]) -> Generator[list["FeatureFile"]]:
        """Files for the features [n, ..] of new entries, to be written row by row; kept only if all goes well.

        Raises:
            UserError: the disk is full or refuses, or a number is too large for the type on disk.
        """
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
                    file.finish()
                    write_json(aside / ENTRY, {**self._described(entry), "sha256": file.digest.hexdigest()})
                    place = self.folder / self.name(entry)
                    if not place.exists():  # another process may have been quicker
                        os.replace(aside, place)
                        (place / LOCK).unlink()
                self.written += 1

    @contextlib.contextmanager
    def _writing(self) -> Generator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"cannot keep features in {self.folder} ({error.strerror or error}): nothing unfinished stays there; free some space, "
                "or give another --cache"
            ) from error


class FeatureFile:
    """A .npy file that grows row by row. Plain writes and no memory map: that a disk is full is then an error, not a signal."""

    def __init__(self, cache: FeatureCache, file: FileIO, shape: list[int]) -> None:
        self.cache, self.file, self.shape, self.rows = cache, file, shape, 0
        header = {"descr": np.dtype(cache.stored).str, "fortran_order": False, "shape": tuple(shape)}
        start = BytesIO()
        np.lib.format.write_array_header_1_0(start, header)
        self.digest = hashlib.sha256()
        self._write(start.getbuffer())

    def write(self, rows: np.ndarray) -> None:
        """The next rows [n, ..], float32."""
        with np.errstate(over="ignore"):
            stored = np.ascontiguousarray(rows, np.dtype(self.cache.stored))
        if not np.isfinite(stored).all():
            if np.isfinite(rows).all():
                raise UserError(
                    f"features reach {np.abs(rows).max():.3g}, too large for --cache-dtype float16: give float32"
                )
            raise UserError("the features hold NaN or infinity: the model is broken, or its --dtype too small for it")
        self._write(stored.reshape(-1).view(np.uint8).data)
        self.rows += len(rows)

    def _write(self, left: memoryview) -> None:
        self.digest.update(left)
        with self.cache._writing():
            while left:
                left = left[self.file.write(left) :]

    def finish(self) -> None:
        """Make sure that all is on the disk."""
        assert self.rows == self.shape[0], f"{self.rows} of {self.shape[0]} rows were written"
        os.fsync(self.file.fileno())


def _gigabytes(size: float) -> str:
    return f"{size / GB:.3g} GB"


AT_ONCE = 1 << 31
"""Bytes of hidden states that a batch may fill."""


def uniform_steps(length: int, count: int = 8) -> list[int]:
    """`count` uniformly spaced steps, the last being `length`: 32, 64, .. 256 of 256."""
    if not 1 <= count <= length:
        raise UserError(f"{count} steps asked for; an image of this model has {length}: give 1 to that many")
    return [round(length * (i + 1) / count) for i in range(count)]


def batches(store: TokenStore, crops: Sequence[int], batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Tokens int64 [n, T] and labels [n]: the chosen crops of all images, crop by crop."""
    for crop in crops:
        for start in range(0, len(store), batch_size):
            images = np.arange(start, min(start + batch_size, len(store)))
            codes = store.codes(images, np.full((len(images), 1), crop))[:, 0]
            yield torch.from_numpy(codes.astype(np.int64)), torch.from_numpy(store.labels[images])


@dataclass(frozen=True, kw_only=True)
class FeatureSpec:
    """Which hidden states, and how they are computed."""

    layers: Sequence[int]
    """Counted from 1."""
    steps: Sequence[int]
    """In 1..T."""
    dtype: torch.dtype = torch.float32
    """Type of the network's matrix products."""
    batch_size: int = 256
    """Images in the network at once at most; features depend on it by rounding alone."""

    def check(self, config: ModelConfig, store: TokenStore, crops: Sequence[int]) -> None:
        """Refuse a store that is not the model's, and layers, steps or crops that are not there."""
        store.check_model(config)
        length, depth = config.sequence_length, config.n_layers
        if wrong := [layer for layer in self.layers if not 1 <= layer <= depth]:
            raise UserError(f"no layer {wrong[0]}: this network has layers 1 to {depth}")
        if wrong := [step for step in self.steps if not 1 <= step <= length]:
            raise UserError(f"no step {wrong[0]}: this model's images have steps 1 to {length}")
        if not self.layers or not self.steps or not crops:
            raise UserError(
                "give at least one of --layers, --steps and --train-crops: there is nothing to probe otherwise"
            )
        for name, values in (("--layers", self.layers), ("--steps", self.steps), ("--train-crops", crops)):
            if len(set(values)) < len(values):
                raise UserError(f"{name} {' '.join(map(str, values))} names one more than once")
        if wrong := [crop for crop in crops if not 0 <= crop < len(store.meta.crops)]:
            raise UserError(f"no crop {wrong[0]} in {store.folder}: it has {len(store.meta.crops)} of each image")


@dataclass(frozen=True, kw_only=True)
class Features:
    """Hidden states of a store's images, crop by crop, and the images' labels."""

    layers: dict[int, np.ndarray]
    """Layer -> [n, S, D], in memory or memory-mapped."""
    labels: Tensor
    """int64 [n]."""


@torch.no_grad()
def read_features(
    model: Transformer, tokens: Tensor, layers: Sequence[int], steps: Sequence[int], dtype: torch.dtype = torch.float32
) -> dict[int, Tensor]:
    """Hidden states of tokens [n, T] under the null condition: layer -> float32 [n, S, D], on the host.

    Step t is the position that predicts token t, having read t - 1 tokens.
    """
    device = model.output.weight.device
    with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
        null = model.null_condition(len(tokens))
        states = model.features(tokens[:, :-1].to(device), null, layers=layers)
    positions = torch.tensor(steps, device=device) - 1
    return {layer: states[layer][:, positions].float().cpu() for layer in layers}


def hidden_states(
    model: Transformer, store: TokenStore, reading: FeatureSpec, crops: Sequence[int]
) -> Iterator[dict[int, np.ndarray]]:
    """Batch by batch, crop by crop, the states of each layer at the steps: float32 [n, S, D]."""
    assert not model.training
    before = [parameter.clone() for parameter in model.parameters()]
    config = model.config
    fits = AT_ONCE // (4 * config.sequence_length * config.dim * len(reading.layers))
    numbers = ", ".join(map(str, reading.layers))
    with progress(f"read layer {numbers}", len(store) * len(crops), unit="images") as bar:
        for tokens, _ in batches(store, crops, max(1, min(reading.batch_size, fits))):
            found = read_features(model, tokens, reading.layers, reading.steps, reading.dtype)
            yield {layer: states.numpy() for layer, states in found.items()}
            bar.advance(len(tokens))
    assert all(map(torch.equal, before, model.parameters())), "probing changed the network"


def describe_features(
    config: ModelConfig, weights: str, store: TokenStore, crops: Sequence[int], reading: FeatureSpec
) -> dict[int, Entry]:
    """All that each layer's features depend on but for rounding; `weights` is the SHA-256 of the model's file."""
    common = {
        "weights": weights,
        "model": to_dict(config),
        "store": store.fingerprint,
        "crops": list(crops),
        "steps": list(reading.steps),
        "dtype": str(reading.dtype).removeprefix("torch."),
        "shape": [len(store) * len(crops), len(reading.steps), config.dim],
    }
    return {layer: common | {"layer": layer} for layer in reading.layers}


def extract_features(
    model: Transformer,
    store: TokenStore,
    reading: FeatureSpec,
    *,
    crops: Sequence[int] = (0,),
    cache: FeatureCache | None = None,
    weights: str = "",
) -> Features:
    """Hidden states of all layers in one forward for each batch, null condition, on the model's device.

    Args:
        cache: where they are kept and looked for; None keeps them in memory. weights: the SHA-256 that is their key there.

    Raises:
        UserError: a store that is not the model's, a layer, step or crop out of range, or no room for the cache.
    """
    reading.check(model.config, store, crops)
    count = len(store) * len(crops)
    shape = (count, len(reading.steps), model.config.dim)
    labels = torch.from_numpy(np.tile(store.labels, len(crops)))
    if cache is None:
        arrays = {layer: np.empty(shape, np.float32) for layer in reading.layers}
        place = 0
        for states in hidden_states(model, store, reading, crops):
            for layer, rows in states.items():
                arrays[layer][place : place + len(rows)] = rows
            place += len(next(iter(states.values())))
        return Features(layers=arrays, labels=labels)
    assert weights, "features are kept under their weights' SHA-256"
    entries = describe_features(model.config, weights, store, crops, reading)
    cache.reserve(entries.values())
    found = {layer: array for layer, entry in entries.items() if (array := cache.find(entry)) is not None}
    if missing := [layer for layer in reading.layers if layer not in found]:
        with cache.writing([entries[layer] for layer in missing]) as files:
            for states in hidden_states(model, store, replace(reading, layers=missing), crops):
                for file, layer in zip(files, missing, strict=True):
                    file.write(states[layer])
        found |= {layer: cache.open(entries[layer]) for layer in missing}
    return Features(layers={layer: found[layer] for layer in reading.layers}, labels=labels)
