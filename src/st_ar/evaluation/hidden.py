"""What probes read: hidden states of a frozen network at some layers and steps, the label hidden from it.

The network is given the null condition. At step t a probe reads the state that has seen the condition and t - 1 image
tokens (input position t - 1).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from st_ar.config import ModelConfig
from st_ar.data.store import TokenStore
from st_ar.errors import UserError
from st_ar.evaluation.feature_cache import Entry, FeatureCache
from st_ar.model.transformer import Transformer
from st_ar.progress import progress
from st_ar.settings import to_dict

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
class Reading:
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
def hidden_states(
    model: Transformer, store: TokenStore, reading: Reading, crops: Sequence[int]
) -> Iterator[dict[int, np.ndarray]]:
    """Batch by batch, crop by crop, the states of each layer at the steps: float32 [n, S, D]."""
    assert not model.training
    before = [parameter.clone() for parameter in model.parameters()]
    config, device = model.config, model.output.weight.device
    positions = torch.tensor(reading.steps, device=device) - 1
    fits = AT_ONCE // (4 * config.sequence_length * config.dim * len(reading.layers))
    autocast = torch.autocast(device.type, dtype=reading.dtype, enabled=reading.dtype != torch.float32)
    numbers = ", ".join(map(str, reading.layers))
    with progress(f"read layer {numbers}", len(store) * len(crops), unit="images") as bar:
        for tokens, _ in batches(store, crops, max(1, min(reading.batch_size, fits))):
            with autocast:
                null = model.null_condition(len(tokens))
                states = model.features(tokens[:, :-1].to(device), null, layers=reading.layers)
            yield {layer: states[layer][:, positions].float().cpu().numpy() for layer in reading.layers}
            bar.advance(len(tokens))
    assert all(map(torch.equal, before, model.parameters())), "probing changed the network"


def describe_features(
    config: ModelConfig, weights: str, store: TokenStore, crops: Sequence[int], reading: Reading
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
    reading: Reading,
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
