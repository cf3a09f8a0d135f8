"""The LlamaGen transformer (arXiv 2406.06525): next-token prediction over image tokens, given a class or a caption.

Parameter names and shapes are LlamaGen's, so both programs load each other's weights. B: sequences, T: tokens of an image,
D: features, V: codebook entries, N: positions of the condition (1 for a class, 120 for LlamaGen's captions). The last of
these positions predicts the first token.
"""

from collections import OrderedDict
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from st_ar.config import ModelConfig
from st_ar.errors import UserError


class Output(NamedTuple):
    """The output of a forward pass."""

    logits: Tensor
    """[B, T, V]. Position t predicts token t from the condition and the tokens before t."""
    hidden: dict[int, Tensor]
    """Outputs [B, T, D] of the requested layers, counted from 1, before the final norm."""


def rope_table(grid: int, head_dim: int, base: float, condition_length: int = 1) -> Tensor:
    """Return the cosines and sines of the 2-D rotary embedding, float32 [N + grid^2, head_dim / 2, 2].

    The first N rows belong to the condition. As in LlamaGen they are 0: rotated queries and keys vanish there, and every
    attention logit against a key of the condition is exactly 0. Row N + n belongs to the image token at raster index n. The
    first half of its pairs rotates by the row n // grid, the second by the column n % grid.
    """
    half = head_dim // 2
    frequencies = base ** -(torch.arange(0, half, 2).float() / half)  # (head_dim / 4,)
    angles = torch.arange(grid).float()[:, None] * frequencies  # (grid, head_dim / 4)
    rows = angles[:, None, :].expand(grid, grid, -1)
    columns = angles[None, :, :].expand(grid, grid, -1)
    angles = torch.cat([rows, columns], dim=-1).reshape(grid * grid, half)
    table = torch.stack([angles.cos(), angles.sin()], dim=-1)
    return torch.cat([torch.zeros(condition_length, half, 2), table])


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Rotate the interleaved pairs of x [B, T, H, head_dim] by rope [T, head_dim / 2, 2], in float32."""
    pairs = x.float().unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():  # the compiler does not fuse complex numbers
        (a, b), (cosine, sine) = pairs.unbind(-1), rope[:, None, :].unbind(-1)
        rotated = torch.stack([a * cosine - b * sine, a * sine + b * cosine], dim=-1)
    else:
        rotated = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(rope)[:, None, :])
    return rotated.flatten(-2).to(x.dtype)


def attention_bias(key_mask: Tensor | None, length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the additive mask of Eq. 3, [T, T] or [B, 1, T, T]: -inf on the future and on masked keys, 0 elsewhere."""
    hidden = torch.ones(length, length, dtype=torch.bool, device=device).triu(1)
    if key_mask is not None:
        masked = key_mask if key_mask.dim() == 3 else key_mask[:, None, :]
        hidden = (hidden | masked)[:, None]
    return torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, float("-inf"))


def attention_weights(q: Tensor, k: Tensor, bias: Tensor) -> Tensor:
    """Return softmax(Q K^T / sqrt(head_dim) + M): q and k [B, H, T, head_dim] -> [B, H, T, T]."""
    return ((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2) + bias).softmax(dim=-1)


CAUSAL_KEY_BIAS = False
"""Whether `attention_mask` gives GPUs one row of keys for all queries, beside the kernel's own causal mask, instead of T x T. It
reads less memory. benchmarks/on_gpu.py compares both."""


def attention_mask(key_mask: Tensor | None, length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the mask of Eq. 3 for `attend`: `attention_bias`, or [B, 1, 1, T], to which `attend` adds the causal mask."""
    one_row = CAUSAL_KEY_BIAS and device.type != "cpu" and length % 8 == 0
    if one_row and key_mask is not None and key_mask.dim() == 2:
        row = torch.zeros(key_mask.shape, dtype=dtype, device=device).masked_fill_(key_mask, float("-inf"))
        return row[:, None, None]
    return attention_bias(key_mask, length, dtype, device)


def fused_width(head_dim: int, device: torch.device) -> int:
    """Return the width of heads for the fused attention of a GPU, which needs a multiple of 8."""
    return head_dim if device.type == "cpu" else -(-head_dim // 8) * 8


def widen(heads: Tensor, width: int) -> Tensor:
    """Pad heads [.., head_dim] with zeros to a width."""
    return heads if heads.shape[-1] == width else F.pad(heads, (0, width - heads.shape[-1]))


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """Return the attention output [B, H, T, head_dim]. Without a bias, or with one of keys alone, attention is causal.

    In bfloat16 on CPUs, PyTorch's fused kernel is several times slower than separate operations (benchmarks/attention.py).
    """
    length, head_dim = q.shape[-2:]
    on_cpu, rows = q.device.type == "cpu", 0 if bias is None else bias.shape[-2]
    if on_cpu and bias is not None and rows < length:
        bias = bias + attention_bias(None, length, q.dtype, q.device)
    if on_cpu and bias is not None and q.dtype == torch.bfloat16:
        return attention_weights(q, k, bias) @ v
    width = fused_width(head_dim, q.device)
    q, k, v = (widen(each, width) for each in (q, k, v))
    scale = None if width == head_dim else head_dim**-0.5
    if (
        not on_cpu and bias is not None and rows < length
    ):  # scaled_dot_product_attention takes no mask beside its causal one
        kernel = torch.ops.aten._scaled_dot_product_efficient_attention
        mask = bias.expand(*q.shape[:-1], length)
        heads = kernel(q, k, v, mask, torch.is_grad_enabled(), is_causal=True, scale=scale)[0]
    else:
        heads = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=bias is None, scale=scale)
    return heads[..., :head_dim]


class RMSNorm(nn.RMSNorm):
    """Root-mean-square norm: computed in float32, cast back, then scaled."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.normalized_shape, eps=self.eps).to(x.dtype) * self.weight


class Head(nn.Linear):
    """The vocabulary projection, without bias."""

    def forward(self, input: Tensor, through: Callable[[Tensor, Tensor], Tensor] | None = None) -> Tensor:  # noqa: A002
        """Return the logits [.., V] of normalised features [.., D], or `through(features, weight)`, a loss that needs no logits."""
        return F.linear(input, self.weight) if through is None else through(input, self.weight)


class DropPath(nn.Module):
    """Stochastic depth: drop the residual branch of whole sequences (arXiv 1603.09382)."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        kept = torch.rand(x.shape[0], 1, 1, device=x.device) >= self.p
        return x * kept / (1 - self.p)


class Attention(nn.Module):
    """Multi-head attention in parts that training, the key-value cache and the attention maps share."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.n_heads = config.n_heads
        self.wqkv = nn.Linear(config.dim, 3 * config.dim, bias=False)
        self.wo = nn.Linear(config.dim, config.dim, bias=False)
        self.dropout = nn.Dropout(config.residual_dropout)

    def project(self, x: Tensor, rope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return rotated queries, rotated keys, and values, each [B, H, T, head_dim], of x [B, T, D]."""
        q, k, v = self.wqkv(x).unflatten(-1, (3, self.n_heads, -1)).unbind(2)
        return rotate(q, rope).transpose(1, 2), rotate(k, rope).transpose(1, 2), v.transpose(1, 2)

    def merge(self, heads: Tensor) -> Tensor:
        """Project the heads [B, H, T, head_dim] to the output [B, T, D]."""
        return self.dropout(self.wo(heads.transpose(1, 2).flatten(2)))

    def forward(self, x: Tensor, rope: Tensor, bias: Tensor | None) -> Tensor:
        return self.merge(attend(*self.project(x, rope), bias))


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.hidden_dim, bias=False)
        self.w3 = nn.Linear(config.dim, config.hidden_dim, bias=False)
        self.w2 = nn.Linear(config.hidden_dim, config.dim, bias=False)
        self.dropout = nn.Dropout(config.ffn_dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.w2(F.silu(self.w1(x)) * self.w3(x)))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: ModelConfig, drop_path: float) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config)
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, rope: Tensor, bias: Tensor | None) -> Tensor:
        x = x + self.drop_path(self.attention(self.attention_norm(x), rope, bias))
        return x + self.drop_path(self.feed_forward(self.ffn_norm(x)))


class Transformer(nn.Module):
    """LlamaGen's transformer, class- or text-conditional.

    Weights start as in LlamaGen: normal with standard deviation 0.02, and zeros in the output head.
    """

    rope: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.cls_embedding = TextEmbedding(config) if config.condition == "text" else ClassEmbedding(config)
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.dropout = nn.Dropout(config.token_dropout)
        rates = torch.linspace(0, config.drop_path, config.n_layers, device="cpu").tolist()
        self.layers = nn.ModuleList(Block(config, rate) for rate in rates)
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = Head(config.dim, config.vocab_size, bias=False)
        self.register_buffer("rope", self.rotary(), persistent=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(self.output.weight)

    def _apply(self, *args: Any, **kwargs: Any) -> "Transformer":
        """Move or cast the weights. The rotary table is rebuilt, so that it stays float32."""
        super()._apply(*args, **kwargs)
        self.rope = self.rotary().to(self.rope.device)
        return self

    def rotary(self) -> Tensor:
        """Return the rotary table, which files of weights do not hold."""
        config = self.config
        return rope_table(config.grid, config.head_dim, config.rope_base, config.condition_length)

    def blocks(self) -> list[Block]:
        """Return the blocks, first to last."""
        return [block for block in self.layers if isinstance(block, Block)]

    def embed(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Return the input of the first block, [B, N + t, D], for tokens [B, t] and their conditions, t < T."""
        if tokens.shape[1] >= self.config.sequence_length:
            raise UserError(
                f"{tokens.shape[1]} tokens are too many: the model reads at most the first {self.config.sequence_length - 1} "
                f"of an image's {self.config.sequence_length} tokens (grid {self.config.grid}); pass tokens[:, :-1]"
            )
        return self.dropout(torch.cat([self.cls_embedding(labels), self.tok_embeddings(tokens)], dim=1))

    def null_condition(self, count: int) -> Tensor:
        """Return the labels of `count` images without a condition: int64 [count], or features [count, N, width]."""
        return self.cls_embedding.null_condition(count)

    def states(
        self, tokens: Tensor, labels: Tensor, *, layers: Collection[int], key_mask: Tensor | None = None
    ) -> dict[int, Tensor]:
        """Return the outputs [B, N - 1 + T, D] of `layers` at all positions, also the condition's. Layer 0 is the first block's input.

        The other arguments are those of `forward`.
        """
        x = self.embed(tokens, labels)
        length, bias = x.shape[1], None
        key_mask = self.cls_embedding.key_mask(labels, key_mask, length)
        if key_mask is not None or x.device.type == "cpu":
            device = x.device.type
            dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
            bias = attention_mask(key_mask, length, dtype, x.device)
        states = {0: x}
        for number, block in enumerate(self.blocks()[: max(layers, default=0)], start=1):
            x = block(x, self.rope[:length], bias)
            if number in layers:
                states[number] = x
        return {layer: states[layer] for layer in layers}

    def features(
        self, tokens: Tensor, labels: Tensor, *, layers: Collection[int], key_mask: Tensor | None = None
    ) -> dict[int, Tensor]:
        """Return the outputs [B, T, D] of `layers`, before the final norm. Only the blocks up to the last of them run.

        The other arguments are those of `forward`.
        """
        depth = len(self.layers)
        if wrong := [layer for layer in layers if not 1 <= layer <= depth]:
            raise UserError(f"there is no layer {wrong[0]}: this network has layers 1 to {depth}")
        if not layers:
            raise UserError(f"no layers were given: give some of 1 to {depth}")
        states = self.states(tokens, labels, layers=layers, key_mask=key_mask)
        return {layer: state[:, self.config.condition_length - 1 :] for layer, state in states.items()}

    def head(self, last: Tensor) -> Tensor:
        """Return the logits [.., V] of the last layer's output [.., D]."""
        return self.output(self.norm(last))

    def forward(
        self, tokens: Tensor, labels: Tensor, *, key_mask: Tensor | None = None, hidden: Collection[int] = ()
    ) -> Output:
        """Predict every token of the images.

        Args:
            tokens: int64 [B, T-1], the images' tokens in raster order without the last; or fewer, for the first ones.
            labels: the conditions. For a class model int64 [B], `config.null_class` for none. For a text model the features of
                captions, floating [B, N, width], with rows of zeros before a caption shorter than N (see TextEmbedding).
            key_mask: bool [B, T], True where a key is masked (Eq. 3); position 0 is the condition. Or [B, T, T], one mask
                per query. It applies on top of the causal mask, in every head and layer.
            hidden: layers whose outputs to return, counted from 1.
        """
        last = len(self.layers)
        states = self.features(tokens, labels, layers={*hidden, last}, key_mask=key_mask)
        return Output(self.head(states[last]), {layer: states[layer] for layer in hidden})


class ClassEmbedding(nn.Module):
    """The embedding of a class, one position. Labels are int64 [B]; the last of num_classes + 1 embeddings is the null class."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.null_class = config.null_class
        self.embedding_table = nn.Embedding(config.num_classes + 1, config.dim)

    def check(self, labels: Tensor) -> None:
        """Refuse labels that are not classes. The host waits for the device."""
        if labels.dim() != 1 or len(labels) == 0 or labels.dtype != torch.int64:
            raise UserError(f"labels must be int64 [B] with B of 1 or more, not {labels.dtype} {list(labels.shape)}")
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high > self.null_class:
            raise UserError(
                f"label {low if low < 0 else high} is out of range: give a class from 0 to {self.null_class - 1}, "
                f"or {self.null_class} for none"
            )

    def null(self, labels: Tensor) -> Tensor:
        """Return the null class [B] for each of the labels."""
        return torch.full_like(labels, self.null_class)

    def null_condition(self, count: int) -> Tensor:
        """Return the null class [count]."""
        return torch.full((count,), self.null_class, device=self.embedding_table.weight.device)

    def key_mask(self, labels: Tensor, key_mask: Tensor | None, length: int) -> Tensor | None:  # noqa: ARG002
        """Return the mask over all positions: the given one, since a class has no padding."""
        return key_mask

    def forward(self, labels: Tensor) -> Tensor:
        return self.embedding_table(labels)[:, None]  # (B, 1, D)


class TextEmbedding(nn.Module):
    """The embedding of a caption, N positions. Labels are the features of a text encoder, floating [B, N, width].

    Shorter captions are padded with rows of zeros in front, which no other position attends to. The null condition replaces a
    caption's own rows by those of `uncond_embedding` [N, width], which is random and not trained.
    """

    uncond_embedding: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        fc1 = nn.Linear(config.text_dim, config.dim, bias=False)
        fc2 = nn.Linear(config.dim, config.dim, bias=False)
        self.cap_proj = nn.Sequential(OrderedDict(fc1=fc1, gelu=nn.GELU("tanh"), fc2=fc2))
        embedding = torch.randn(config.text_tokens, config.text_dim) / config.text_dim**0.5
        self.register_buffer("uncond_embedding", embedding)

    def check(self, labels: Tensor) -> None:
        """Refuse labels that are not captions' features of this model. The host does not wait for the device."""
        rows, width = self.uncond_embedding.shape
        if labels.shape[1:] != (rows, width) or len(labels) == 0 or not labels.is_floating_point():
            raise UserError(
                f"a text model's labels must be captions' features, floating [B, {rows}, {width}] with B of 1 or more, "
                f"not {labels.dtype} {list(labels.shape)}; TextStore.features returns them"
            )

    def null(self, labels: Tensor) -> Tensor:
        """Return the null condition [B, N, width] for each of the labels. Padding stays padding, as in LlamaGen."""
        return torch.where(labels.any(dim=-1, keepdim=True), self.uncond_embedding.to(labels), 0.0)

    def null_condition(self, count: int) -> Tensor:
        """Return the null condition [count, N, width] without padding."""
        return self.uncond_embedding.expand(count, -1, -1)

    def key_mask(self, labels: Tensor, key_mask: Tensor | None, length: int) -> Tensor | None:
        """Return the mask over all positions, one per query: bool [B, length, length], True where a key is masked.

        In `key_mask`, [B, t] or [B, t, t], position 0 is the whole condition; here it has N positions. Padding is visible to
        itself only, so that no softmax is empty.
        """
        padding = F.pad(~labels.any(dim=-1), (0, length - labels.shape[1]), value=False)  # (B, length)
        own = torch.eye(length, dtype=torch.bool, device=labels.device)
        masked = padding[:, None, :] & ~own
        if key_mask is None:
            return masked
        positions = (torch.arange(length, device=labels.device) - labels.shape[1] + 1).clamp_min(0)
        assert key_mask.shape[-1] == length - labels.shape[1] + 1, "a key mask has one column for the condition"
        key_mask = key_mask[..., positions]
        return masked | (key_mask[:, positions] if key_mask.dim() == 3 else key_mask[:, None, :])

    def forward(self, labels: Tensor) -> Tensor:
        self.check(labels)
        return self.cap_proj(labels.to(self.uncond_embedding.dtype))  # (B, N, D)
