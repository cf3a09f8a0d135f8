"""Attention maps and their statistics.

Fused attention returns no weights. They are computed again from each layer's input with the model's projections.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from st_ar.data.store import TokenStore
from st_ar.errors import UserError
from st_ar.model.transformer import Transformer, attention_bias, attention_weights
from st_ar.progress import progress
from st_ar.randomness import RandomStream, torch_generator
from st_ar.selfguided.guidance import random_key_mask, show_own_position

WEIGHTS_AT_ONCE = 2**23
"""Maximum number of weights of one layer in memory at once: 8 images of 256 tokens and 16 heads, 32 MiB."""


def attention_maps(
    model: Transformer, tokens: Tensor, labels: Tensor, *, layers: Collection[int], key_mask: Tensor | None = None
) -> dict[int, Tensor]:
    """Return the maps of `weights_by_layer` by layer."""
    return dict(weights_by_layer(model, tokens, labels, layers=layers, key_mask=key_mask))


@torch.no_grad()
def weights_by_layer(
    model: Transformer, tokens: Tensor, labels: Tensor, *, layers: Collection[int], key_mask: Tensor | None = None
) -> Iterator[tuple[int, Tensor]]:
    """Yield each layer and its softmax(Q K^T / sqrt(head_dim) + M), float32 [B, H, T, N - 1 + T].

    Row q is the step that has read the condition and q tokens and predicts token q. The first N keys are the condition (N = 1
    for a class). Their logits are always 0, since the rotary table turns these keys to zeros. So they get the weight that no
    token attracts.

    Args:
        tokens: int64 [B, T-1]. labels, key_mask: as for Transformer.forward.
        layers: counted from 1.
    """
    require_between("layer", layers, 1, model.config.n_layers, "this network has layers")
    states = model.states(tokens, labels, layers={layer - 1 for layer in layers}, key_mask=key_mask)
    first = model.config.condition_length - 1
    length = first + 1 + tokens.shape[1]
    bias = attention_bias(model.cls_embedding.key_mask(labels, key_mask, length), length, torch.float32, tokens.device)
    for layer in layers:
        block = model.blocks()[layer - 1]
        q, k, _ = block.attention.project(block.attention_norm(states[layer - 1]), model.rope[:length])
        yield layer, attention_weights(q.float(), k.float(), bias)[:, :, first:]


def require_between(what: str, values: Collection[int], least: int, most: int, available: str) -> None:
    """Raise a UserError for the first value out of range; `available` introduces the range in the message."""
    if wrong := [value for value in values if not least <= value <= most]:
        raise UserError(f"no {what} {wrong[0]}: {available} {least} to {most}")


@dataclass(frozen=True, kw_only=True)
class AttentionStatistics:
    """Averages over the steps that have read at least one token."""

    class_weight: float
    """Weight on the class, or on the whole caption."""
    neighbour_weight: float
    """Weight on the newest token and its neighbours in 3 x 3 that have been read."""
    distance: float
    """Mean distance in tokens between the newest token and the attended tokens, without the condition. Steps whose tokens are all
    masked do not count; 0 if no step counts."""
    entropy: float
    """Entropy in nats of the weights over all keys."""


STATISTICS = tuple(field.name for field in fields(AttentionStatistics))


def _statistics_of(values: Tensor) -> AttentionStatistics:
    return AttentionStatistics(**dict(zip(STATISTICS, values.tolist(), strict=True)))


def head_statistics(weights: Tensor, grid: int) -> Tensor:
    """Return the statistics of one layer's maps [B, H, T, N - 1 + T] by image and head: float64 [B, H, 4], in STATISTICS' order."""
    length = weights.shape[-2]
    condition = weights.shape[-1] - length + 1  # N
    positions = torch.arange(length - 1, device=weights.device)
    rows, columns = positions // grid, positions % grid
    down, across = (rows[:, None] - rows).abs(), (columns[:, None] - columns).abs()  # (T-1, T-1): newest token, key
    near = (down <= 1) & (across <= 1)
    distance = (down.square() + across.square()).to(weights.dtype).sqrt()
    steps = weights[:, :, 1:]  # query q >= 1: the newest token is q - 1
    to_tokens = steps[..., condition:]
    mean_distance = ((to_tokens * distance).sum(-1) / to_tokens.sum(-1)).nanmean(-1)  # 0 / 0: all tokens are masked
    return torch.stack(
        [
            steps[..., :condition].sum(-1).mean(-1),
            (to_tokens * near).sum(-1).mean(-1),
            mean_distance.nan_to_num(),
            torch.special.entr(steps).sum(-1).mean(-1),
        ],
        dim=-1,
    ).double()


def attention_statistics(weights: Tensor, grid: int) -> AttentionStatistics:
    """Return the statistics of one layer's maps [B, H, T, N - 1 + T], averaged over images and heads."""
    return _statistics_of(head_statistics(weights, grid).mean((0, 1)))


@dataclass(frozen=True, kw_only=True)
class Averaged:
    """Statistics over images."""

    mean: AttentionStatistics
    std: AttentionStatistics | None
    """Standard deviation over images (n - 1); None for a single image."""


@dataclass(frozen=True, kw_only=True)
class LayerStatistics:
    """Statistics of one layer."""

    over_heads: Averaged
    """Statistics of each image's mean over heads."""
    by_head: list[Averaged]


@dataclass(frozen=True, kw_only=True)
class ImageMasks:
    """Random key masks as in training (Eq. 3). An image's mask depends only on the seed and the image's index."""

    ratio: float = 0.0
    """Share of the image-token keys that are masked; 0 for no mask."""
    seed: int = 0
    own_position: bool = True
    """Hide a masked token from its own query too."""

    def __post_init__(self) -> None:
        if not 0 <= self.ratio < 1:
            raise UserError(f"--mask-ratio must lie in [0, 1), not {self.ratio}")
        if self.seed < 0:
            raise UserError(f"--seed must be 0 or more, not {self.seed}")
        if self.ratio == 0 and (self.seed or not self.own_position):
            raise UserError(
                "--seed and --no-mask-own-position need masked keys: give --mask-ratio too, or leave them out"
            )

    def draw(self, images: Sequence[int], length: int, device: torch.device | str = "cpu") -> Tensor | None:
        """Return a mask that is True at masked keys: bool [n, T], or [n, T, T] if queries see their own token; None for no mask."""
        if self.ratio == 0:
            return None
        generators = [torch_generator(self.seed, RandomStream.KEY_MASK, image) for image in images]
        mask = torch.cat([random_key_mask(1, length, self.ratio, generator) for generator in generators]).to(device)
        return mask if self.own_position else show_own_position(mask)


NO_MASKS = ImageMasks()


def center_crops(store: TokenStore, images: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return tokens int64 [n, T] and labels [n] of the centre crops of a store's images."""
    codes = store.center_codes(np.array(images))
    return torch.from_numpy(codes.astype(np.int64)), torch.from_numpy(store.labels[list(images)])


def store_maps(
    model: Transformer,
    store: TokenStore,
    images: Sequence[int],
    *,
    layers: Collection[int],
    masks: ImageMasks = NO_MASKS,
) -> Iterator[tuple[int, Tensor]]:
    """Yield the maps of `weights_by_layer` over a store's images, on the model's device."""
    tokens, labels = center_crops(store, images)
    device = model.output.weight.device
    key_mask = masks.draw(images, tokens.shape[1], device)
    yield from weights_by_layer(model, tokens[:, :-1].to(device), labels.to(device), layers=layers, key_mask=key_mask)


def average_statistics(
    model: Transformer, store: TokenStore, images: Sequence[int], *, masks: ImageMasks = NO_MASKS, name: str = "model"
) -> dict[int, LayerStatistics]:
    """Return the statistics of every layer over a store's images. Memory does not grow with their number."""
    config = model.config
    size = max(1, WEIGHTS_AT_ONCE // (config.n_heads * (config.sequence_length + config.condition_length - 1) ** 2))
    layers = range(1, config.n_layers + 1)
    by_layer: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    with progress(f"read {name}", len(images), unit="images") as bar:
        for start in range(0, len(images), size):
            batch = images[start : start + size]
            for layer, weights in store_maps(model, store, batch, layers=layers, masks=masks):
                by_layer[layer].append(head_statistics(weights, config.grid).cpu())
                if not by_layer[layer][-1].isfinite().all():
                    raise UserError(
                        f"the attention of {name} in layer {layer} is not finite: its training has diverged"
                    )
            bar.advance(len(batch))
    return {layer: _average(torch.cat(parts)) for layer, parts in by_layer.items()}


def _average(values: Tensor) -> LayerStatistics:
    """Average the statistics of every image and head [n, H, 4] over images."""

    def averaged(x: Tensor) -> Averaged:
        return Averaged(mean=_statistics_of(x.mean(0)), std=_statistics_of(x.std(0)) if len(x) > 1 else None)

    return LayerStatistics(over_heads=averaged(values.mean(1)), by_head=[averaged(head) for head in values.unbind(1)])


def attention_steps(length: int) -> list[int]:
    """Return the default numbers of tokens read for figures: one to four fifths of the image, and all but the last token."""
    return sorted({max(1, round(length * share)) for share in (0.2, 0.4, 0.6, 0.8)} | {length - 1})
