"""Sampling images' tokens with a key-value cache, classifier-free guidance, and top-k and top-p filters.

The rule is LlamaGen's: guided logits, then temperature, then top-k, then top-p.
"""

import math
import secrets
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from st_ar.errors import UserError
from st_ar.model.packing import packed
from st_ar.model.transformer import Transformer, attention_bias
from st_ar.sample_config import SampleSettings


class Decoder:
    """The transformer one token at a time: keys and values of the positions read so far are kept.

    labels: as for `Transformer.forward`, whose logits this gives without ever running it. All positions of the condition
    are read at once.
    """

    def __init__(self, model: Transformer, labels: Tensor) -> None:
        config = model.config
        self.model = packed(model, len(labels))
        self.position = 0
        self.next_input = model.cls_embedding(labels)  # (B, N, D)
        # PyTorch's attention on CPUs is slower in bfloat16 than in float32
        device = labels.device
        dtype = torch.float32 if device.type == "cpu" else self.next_input.dtype
        self.length = config.condition_length - 1 + config.sequence_length
        shape = (config.n_layers, 2, len(labels), config.n_heads, self.length, config.head_dim)
        self.cache = torch.empty(shape, dtype=dtype, device=device)
        key_mask = model.cls_embedding.key_mask(labels, None, self.length)
        self.bias = None if key_mask is None else attention_bias(key_mask, self.length, dtype, device)

    def logits(self) -> Tensor:
        """Logits [B, V] of the next token."""
        start, end = self.position, self.position + self.next_input.shape[1]
        if end > self.length:
            total = self.model.config.sequence_length
            raise UserError(f"all {total} tokens of the image are there: nothing comes after them")
        x, rope = self.next_input, self.model.rope[start:end]
        bias = None if self.bias is None else self.bias[:, :, start:end, :end]
        for block, (keys, values) in zip(self.model.blocks(), self.cache, strict=True):
            q, k, v = block.attention.project(block.attention_norm(x), rope)
            keys[:, :, start:end], values[:, :, start:end] = k, v
            heads = F.scaled_dot_product_attention(
                q.to(keys.dtype), keys[:, :, :end], values[:, :, :end], attn_mask=bias
            )
            x = x + block.attention.merge(heads.to(x.dtype))
            x = x + block.feed_forward(block.ffn_norm(x))
        return self.model.head(x[:, -1])

    def append(self, tokens: Tensor) -> None:
        """Read the chosen tokens [B]."""
        self.position += self.next_input.shape[1]
        self.next_input = self.model.tok_embeddings(tokens)[:, None]

    def keep(self, count: int) -> None:
        """Forget all but the first `count` sequences."""
        self.next_input, self.cache = self.next_input[:count], self.cache[:, :, :count]
        self.bias = None if self.bias is None else self.bias[:count]


def filter_logits(logits: Tensor, *, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Set all but the likely tokens' logits [B, V] to -inf.

    Args:
        top_k: keep the k largest (ties with the k-th too); 0 keeps all.
        top_p: then keep the smallest set of the likeliest whose probabilities exceed p, the token that passes p included.
    """
    if 0 < top_k < logits.shape[-1]:
        least = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    if top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        before = ordered.softmax(dim=-1).cumsum(dim=-1).roll(1, dims=-1)
        before[:, 0] = 0  # the first token is always kept
        removed = torch.zeros_like(before, dtype=torch.bool).scatter_(-1, order, before > top_p)
        logits = logits.masked_fill(removed, float("-inf"))
    return logits


def uniforms(seed: int, images: np.ndarray, count: int) -> Tensor:
    """Numbers in [0, 1), float32 [B, count]: those of image n are a function of (seed, n) alone.

    Counter-based (Philox), so that no image's depend on how many others there are.
    """
    drawn = [np.random.Generator(np.random.Philox(key=[seed, int(n)])).random(count, np.float32) for n in images]
    return torch.from_numpy(np.stack(drawn))


def choose(logits: Tensor, uniform: Tensor) -> Tensor:
    """Draw a token [B] from each row of logits [B, V], given a number in [0, 1) for each [B]: the inverse of the
    cumulative distribution. Nothing waits for the device.
    """
    # In whole numbers sums are exact in any order, so that a token without mass is never drawn, on a GPU neither.
    mass = (logits.float().softmax(dim=-1) * 2**40).long().cumsum(dim=-1)
    place = (uniform[:, None].double() * mass[:, -1:]).long()
    return torch.searchsorted(mass, place, right=True)[:, 0]


@torch.no_grad()
def generate(
    model: Transformer,
    labels: Tensor,
    *,
    cfg_scale: float = 1.0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    cfg_interval: int = -1,
    cfg_schedule: Literal["constant", "linear", "power-cosine"] = "constant",
    cfg_power: float = 1.0,
    seed: int | None = None,
    images: Sequence[int] | np.ndarray | None = None,
    greedy: bool = False,
    num_tokens: int | None = None,
) -> Tensor:
    """Sample tokens int64 [B, T] for classes or captions, on the labels' device.

    Args:
        model: in evaluation mode, on the same device, in any floating type.
        labels: classes int64 [B], or captions' features [B, N, width] for a text model, as for `Transformer.forward`;
            `model.null_condition(B)` samples without a condition.
        cfg_scale: guidance scale s: logits = null + s (conditional - null). 1 is none and costs nothing.
        temperature: the (guided) logits are divided by it.
        top_k: draw from the k likeliest tokens; 0 for all.
        top_p: draw from the likeliest tokens that together hold more than p; 1 for all.
        cfg_interval: guide the first token and this many decode steps + 1 after it, then no more (LlamaGen's
            meaning); -1 guides all.
        cfg_schedule: constant; linear or power-cosine: from 1 up to cfg_scale over the tokens (see `guidance_scale`).
        cfg_power: the power of power-cosine.
        seed: of the draws. The tokens of an image depend on the seed, its number, its label and the settings alone, but for
            rounding: products of another batch size may differ in the last bit. None draws afresh.
        images: the images' numbers [B]; 0, 1, .. if None.
        greedy: take the likeliest token instead of drawing.
        num_tokens: stop after this many tokens [B, num_tokens]; all T if None.

    Raises:
        UserError: a label, a setting or num_tokens out of range, or a model whose logits are not finite.
    """
    guidance = SampleSettings(
        cfg_scale=cfg_scale,
        cfg_interval=cfg_interval,
        cfg_schedule=cfg_schedule,
        cfg_power=cfg_power,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
    ).resolved(model.config)
    total = model.config.sequence_length if num_tokens is None else num_tokens
    seed = secrets.randbits(63) if seed is None else seed
    numbers = np.arange(len(labels)) if images is None else np.asarray(images)
    _check_request(model, labels, numbers, seed, total)
    batch, guided = len(labels), cfg_scale > 1
    noise = None if greedy else uniforms(seed, numbers, total).to(labels.device)
    decoder = Decoder(model, torch.cat([labels, model.cls_embedding.null(labels)]) if guided else labels)
    tokens = torch.empty(batch, total, dtype=torch.int64, device=labels.device)
    for position in range(total):
        if guided and cfg_interval > -1 and position > cfg_interval + 1:
            guided = False
            decoder.keep(batch)
        logits = decoder.logits().float()
        if position == 0 and not logits.isfinite().all():  # once, since the host waits
            raise UserError("the model's logits are not finite: its training has diverged, or it needs float32")
        if guided:
            conditional, null = logits.chunk(2)
            logits = null + guidance_scale(guidance, position, model.config.sequence_length) * (conditional - null)
        if noise is None:
            tokens[:, position] = logits.argmax(dim=-1)
        else:
            logits = filter_logits(logits / temperature, top_k=top_k, top_p=top_p)
            tokens[:, position] = choose(logits, noise[:, position])
        decoder.append(tokens[:, position].repeat(2) if guided else tokens[:, position])
    return tokens


def guidance_scale(guidance: SampleSettings, position: int, total: int) -> float:
    """The scale for the token at `position` of an image's `total`.

    Linear: 1 + (s - 1) (t + 1) / T (as MAR has it, arXiv 2406.11838). Power-cosine: 1 + (s - 1) (1 - cos(pi (t / T)^p)) / 2
    (RAR, arXiv 2411.00776), with t counted from 0.
    """
    rise = 1.0
    if guidance.cfg_schedule == "linear":
        rise = (position + 1) / total
    elif guidance.cfg_schedule == "power-cosine":
        rise = (1 - math.cos(math.pi * (position / total) ** guidance.cfg_power)) / 2
    assert guidance.cfg_scale is not None
    return 1 + (guidance.cfg_scale - 1) * rise


def _check_request(model: Transformer, labels: Tensor, numbers: np.ndarray, seed: int, total: int) -> None:
    config = model.config
    assert not model.training, "call model.eval() first: dropout is for training"
    model.cls_embedding.check(labels)
    if not 1 <= total <= config.sequence_length:
        raise UserError(
            f"{total} tokens asked for; an image of this model has {config.sequence_length}: give 1 to that many"
        )
    if numbers.shape != (len(labels),) or numbers.dtype.kind not in "iu" or numbers.min() < 0:
        raise UserError(f"images must be {len(labels)} whole numbers of 0 or more, one for each label, not {numbers}")
    if not 0 <= seed < 2**64:
        raise UserError(f"the seed must lie in [0, 2^64), not {seed}")
