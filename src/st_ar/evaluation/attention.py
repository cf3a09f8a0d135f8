"""Attention maps, and the numbers that a table can compare.

Fused attention returns no weights, so they are computed again from each layer's input, with the model's own projections.
"""

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from st_ar.data.store import TokenStore
from st_ar.errors import UserError
from st_ar.figures import attention_figure
from st_ar.files import write_json
from st_ar.model.transformer import Transformer, attention_bias, attention_weights
from st_ar.model.weights import open_model
from st_ar.tokenizer import load_tokenizer, to_uint8


@torch.no_grad()
def attention_maps(
    model: Transformer, tokens: Tensor, labels: Tensor, *, layers: Collection[int], key_mask: Tensor | None = None
) -> dict[int, Tensor]:
    """Softmax(Q K^T / sqrt(head_dim) + M) of the chosen layers: float32 [B, H, T, N - 1 + T], queries before keys.

    Row q is the step that has read the condition and q tokens and predicts token q. The first N keys are the condition (one
    is the class); their logits are always 0 (the rotary table turns the keys to zeros), so their weight says how little the
    other keys stood out.

    Args:
        tokens: int64 [B, T-1]; labels, key_mask: as for Transformer.forward.
        layers: counted from 1.
    """
    depth = model.config.n_layers
    if wrong := [layer for layer in layers if not 1 <= layer <= depth]:
        raise UserError(f"no layer {wrong[0]}: this network has layers 1 to {depth}")
    inputs = model.states(tokens, labels, layers={layer - 1 for layer in layers}, key_mask=key_mask)
    first = model.config.condition_length - 1
    length = first + 1 + tokens.shape[1]
    bias = attention_bias(model.cls_embedding.key_mask(labels, key_mask, length), length, torch.float32, tokens.device)
    maps: dict[int, Tensor] = {}
    for layer in layers:
        block = model.blocks()[layer - 1]
        q, k, _ = block.attention.project(block.attention_norm(inputs[layer - 1]), model.rope[:length])
        maps[layer] = attention_weights(q.float(), k.float(), bias)[:, :, first:]
    return maps


@dataclass(frozen=True, kw_only=True)
class AttentionStatistics:
    """Averages over heads, images and steps that have read at least one token."""

    class_weight: float
    """Weight on the class, or on all of the caption."""
    neighbour_weight: float
    """Weight on the 3 x 3 tokens around the newest token, itself included, as far as they are read."""
    distance: float
    """Mean distance in tokens from the newest token to what is looked at, the condition left out."""
    entropy: float
    """Entropy in nats of the weights over all keys."""


def attention_statistics(weights: Tensor, grid: int) -> AttentionStatistics:
    """Statistics of one layer's maps [B, H, T, N - 1 + T]."""
    length = weights.shape[-2]
    condition = weights.shape[-1] - length + 1  # keys of it, N
    places = torch.arange(length - 1)
    rows, columns = places // grid, places % grid
    down, across = (rows[:, None] - rows).abs(), (columns[:, None] - columns).abs()  # (T-1, T-1): newest token, key
    near = (down <= 1) & (across <= 1)
    distance = (down.square() + across.square()).float().sqrt()
    steps = weights[:, :, 1:].double()  # query q >= 1: the newest token is q - 1
    to_tokens = steps[..., condition:]
    return AttentionStatistics(
        class_weight=steps[..., :condition].sum(-1).mean().item(),
        neighbour_weight=(to_tokens * near).sum(-1).mean().item(),
        distance=((to_tokens * distance).sum(-1) / to_tokens.sum(-1).clamp_min(1e-12)).mean().item(),
        entropy=torch.special.entr(steps).sum(-1).mean().item(),
    )


def attention_steps(length: int) -> list[int]:
    """The numbers of tokens read that pictures show: a fifth of the image, two, three, four, and all but the last token."""
    return sorted({max(1, round(length * share)) for share in (0.2, 0.4, 0.6, 0.8)} | {length - 1})


def draw_attention(
    model_path: Path,
    tokens: Path,
    tokenizer_path: Path,
    out: Path,
    *,
    layer: int | None = None,
    images: Sequence[int] = (0, 1, 2),
    average: int = 256,
    ema: bool = False,
) -> dict[int, AttentionStatistics]:
    """Draw the maps of one layer over chosen images of a store (first crop) into an SVG, and average statistics by layer.

    Args:
        images: indices of the images to draw.
        average: how many of the store's first images the statistics are averaged over; they are written beside the SVG as
            JSON and returned by layer.

    Raises:
        UserError: files that do not belong together, a text model, or a layer or image out of range.
    """
    if out.suffix != ".svg":
        raise UserError(f"--out {out}: the maps are drawn as SVG; give a name that ends in .svg")
    model, info = open_model(model_path, ema=ema)
    info.config.require_classes("st-ar attention")
    store, tokenizer = TokenStore(tokens), load_tokenizer(tokenizer_path)
    store.check_model(info.config, info.tokenizer)
    if tokenizer.fingerprint != store.meta.tokenizer:
        raise UserError(
            f"{tokens} was made by tokenizer {store.meta.tokenizer[:12]}, {tokenizer_path} is {tokenizer.fingerprint[:12]}"
        )
    if wrong := [image for image in images if not 0 <= image < len(store)]:
        raise UserError(f"--images {wrong[0]} is out of range: {tokens} has images 0 to {len(store) - 1}")
    if not images or average < 1:
        raise UserError("--images and --average must each ask for at least one image")
    drawn = max(1, info.config.n_layers // 2) if layer is None else layer
    chosen = np.array([*images, *range(min(average, len(store)))])
    codes = torch.from_numpy(store.codes(chosen, np.zeros((len(chosen), 1), int))[:, 0].astype(np.int64))
    labels = torch.from_numpy(store.labels[chosen])
    maps = attention_maps(model, codes[: len(images), :-1], labels[: len(images)], layers=[drawn])[drawn]
    grid = info.config.grid
    pictures = to_uint8(tokenizer.decode(codes[: len(images)].unflatten(1, (grid, grid)))).numpy()
    steps = attention_steps(info.config.sequence_length)
    name = f"attention at layer {drawn}"
    drawing = attention_figure(pictures, {"": maps.mean(1).numpy()}, grid=grid, steps=steps, name=name)
    statistics: dict[int, AttentionStatistics] = {}
    for number in range(1, info.config.n_layers + 1):
        weights = attention_maps(model, codes[len(images) :, :-1], labels[len(images) :], layers=[number])[number]
        statistics[number] = attention_statistics(weights, grid)
    drawing.save(out)
    write_json(out.with_suffix(".json"), {str(number): asdict(value) for number, value in statistics.items()})
    return statistics
