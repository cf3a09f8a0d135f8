"""Sampling images' tokens with a key-value cache, classifier-free guidance, and top-k and top-p filters.

The rule is LlamaGen's: guided logits, then temperature, then top-k, then top-p.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from st_ar.errors import UserError
from st_ar.model.packing import packed
from st_ar.model.transformer import Transformer, attention_bias


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
        dtype, device = self.next_input.dtype, labels.device
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
            heads = F.scaled_dot_product_attention(q, keys[:, :, :end], values[:, :, :end], attn_mask=bias)
            x = x + block.attention.merge(heads)
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


def choose(logits: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draw a token [B] from each row of logits [B, V]; an exponential race, so nothing waits for the device."""
    probabilities = logits.float().softmax(dim=-1)
    noise = torch.empty_like(probabilities).exponential_(generator=generator)
    return (probabilities / noise).argmax(dim=-1)


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
    seed: int | None = None,
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
        seed: of the draws; the same seed and labels give the same tokens on the same machine. None draws afresh.
        greedy: take the likeliest token instead of drawing.
        num_tokens: stop after this many tokens [B, num_tokens]; all T if None.

    Raises:
        UserError: a label, a setting or num_tokens out of range.
    """
    config = model.config
    total = config.sequence_length if num_tokens is None else num_tokens
    _check_request(model, labels, total, cfg_scale, temperature, top_k, top_p, cfg_interval)
    generator = None if seed is None else torch.Generator(labels.device).manual_seed(seed)
    batch, guided = len(labels), cfg_scale > 1
    decoder = Decoder(model, torch.cat([labels, model.cls_embedding.null(labels)]) if guided else labels)
    tokens = torch.empty(batch, total, dtype=torch.int64, device=labels.device)
    for position in range(total):
        if guided and cfg_interval > -1 and position > cfg_interval + 1:
            guided = False
            decoder.keep(batch)
        logits = decoder.logits().float()
        if guided:
            conditional, null = logits.chunk(2)
            logits = null + cfg_scale * (conditional - null)
        if greedy:
            tokens[:, position] = logits.argmax(dim=-1)
        else:
            logits = filter_logits(logits / temperature, top_k=top_k, top_p=top_p)
            tokens[:, position] = choose(logits, generator)
        decoder.append(tokens[:, position].repeat(2) if guided else tokens[:, position])
    return tokens


def _check_request(
    model: Transformer,
    labels: Tensor,
    total: int,
    cfg_scale: float,
    temperature: float,
    top_k: int,
    top_p: float,
    cfg_interval: int,
) -> None:
    config = model.config
    assert not model.training, "call model.eval() first: dropout is for training"
    model.cls_embedding.check(labels)
    if not 1 <= total <= config.sequence_length:
        raise UserError(
            f"{total} tokens asked for; an image of this model has {config.sequence_length}: give 1 to that many"
        )
    if not 1 <= cfg_scale < float("inf"):
        raise UserError(f"the guidance scale must be at least 1 (none), not {cfg_scale}")
    if not 0 < temperature < float("inf"):
        raise UserError(
            f"the temperature must be above 0, not {temperature}; for the likeliest token ask for greedy sampling"
        )
    if not 0 <= top_k <= config.vocab_size:
        raise UserError(
            f"top-k must lie between 0 (off) and the {config.vocab_size} tokens of the codebook, not {top_k}"
        )
    if not 0 < top_p <= 1:
        raise UserError(f"top-p must lie in (0, 1], not {top_p}")
    if cfg_interval < -1:
        raise UserError(f"the guidance interval must be -1 (all steps) or more, not {cfg_interval}")
