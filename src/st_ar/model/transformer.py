"""The LlamaGen transformer (arXiv 2406.06525): next-token prediction over image tokens, given a class or a caption.

Parameter names and shapes are LlamaGen's, so weights move between the two unchanged. The model returns logits and
hidden states; every loss lives elsewhere. B: sequences, T: tokens of an image, D: features, V: codebook entries, N:
positions of the condition (1 for a class, 120 for LlamaGen's captions), whose last predicts the first token.
"""

from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from st_ar.config import ModelConfig
from st_ar.errors import UserError


class Output(NamedTuple):
    """What one forward pass gives."""

    logits: Tensor
    """[B, T, V]: position t predicts token t, having read the condition and the tokens before t."""
    hidden: dict[int, Tensor]
    """Chosen layers' outputs [B, T, D], counted 1..n_layers, after the block and before the final norm."""


def rope_table(grid: int, head_dim: int, base: float, condition_length: int = 1) -> Tensor:
    """Cosines and sines of the 2-D rotary embedding, float32 [N + grid^2, head_dim / 2, 2].

    The first N rows are the condition's positions: both are 0 there, as in LlamaGen, so their rotated queries and keys
    vanish and every logit against a key of the condition is exactly 0. The image token at raster index n follows at row
    N + n; the first half of its pairs turns by the row n // grid, the second by the column n % grid.
    """
    half = head_dim // 2
    frequencies = base ** -(torch.arange(0, half, 2).float() / half)  # (head_dim / 4,)
    angles = torch.arange(grid).float()[:, None] * frequencies  # (grid, head_dim / 4)
    rows = angles[:, None, :].expand(grid, grid, -1)
    columns = angles[None, :, :].expand(grid, grid, -1)
    turns = torch.cat([rows, columns], dim=-1).reshape(grid * grid, half)
    table = torch.stack([turns.cos(), turns.sin()], dim=-1)
    return torch.cat([torch.zeros(condition_length, half, 2), table])


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Turn the interleaved pairs of x [B, T, H, head_dim] by rope [T, head_dim / 2, 2], in float32."""
    pairs = x.float().unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():  # which fuses real numbers only
        (a, b), (cosine, sine) = pairs.unbind(-1), rope[:, None, :].unbind(-1)
        turned = torch.stack([a * cosine - b * sine, a * sine + b * cosine], dim=-1)
    else:
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(rope)[:, None, :])
    return turned.flatten(-2).to(x.dtype)


def attention_bias(key_mask: Tensor | None, length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The additive mask of Eq. 3: -inf on the future and on masked keys, 0 elsewhere; [T, T] or [B, 1, T, T]."""
    hidden = torch.ones(length, length, dtype=torch.bool, device=device).triu(1)
    if key_mask is not None:
        masked = key_mask if key_mask.dim() == 3 else key_mask[:, None, :]
        hidden = (hidden | masked)[:, None]
    return torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, float("-inf"))


def attention_weights(q: Tensor, k: Tensor, bias: Tensor) -> Tensor:
    """Softmax(Q K^T / sqrt(head_dim) + M), written out: [B, H, T, head_dim] twice -> [B, H, T, T]."""
    return ((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2) + bias).softmax(dim=-1)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """Attention [B, H, T, head_dim]; causal alone if `bias` is None.

    On CPUs, PyTorch's fused kernel is several times slower in bfloat16 than the same written out
    (benchmarks/attention.py); everywhere else the fused kernel serves.
    """
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and bias is not None:
        return attention_weights(q, k, bias) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=bias is None)


class RMSNorm(nn.Module):
    """Root-mean-square norm, computed in float32, cast back, then scaled."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype) * self.weight


class Head(nn.Linear):
    """The vocabulary projection, without bias."""

    def forward(self, input: Tensor, through: Callable[[Tensor, Tensor], Tensor] | None = None) -> Tensor:  # noqa: A002
        """Logits [.., V] from normalised features [.., D]; or, through a loss that needs none, what it makes of these and the weight."""
        return F.linear(input, self.weight) if through is None else through(input, self.weight)


class DropPath(nn.Module):
    """Stochastic depth: drop a residual branch for whole sequences (arXiv 1603.09382)."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        kept = torch.rand(x.shape[0], 1, 1, device=x.device) >= self.p
        return x * kept / (1 - self.p)


class Attention(nn.Module):
    """Multi-head attention in three parts, so that training, the sampler's cache and the attention maps share them."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.n_heads = config.n_heads
        self.wqkv = nn.Linear(config.dim, 3 * config.dim, bias=False)
        self.wo = nn.Linear(config.dim, config.dim, bias=False)
        self.dropout = nn.Dropout(config.residual_dropout)

    def project(self, x: Tensor, rope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries and keys, and values: x [B, T, D] -> three of [B, H, T, head_dim]."""
        q, k, v = self.wqkv(x).unflatten(-1, (3, self.n_heads, -1)).unbind(2)
        return rotate(q, rope).transpose(1, 2), rotate(k, rope).transpose(1, 2), v.transpose(1, 2)

    def merge(self, heads: Tensor) -> Tensor:
        """Heads [B, H, T, head_dim] -> output [B, T, D]."""
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

    Initialisation is LlamaGen's: normal with standard deviation 0.02, and an output head of zeros.
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
        self.apply(self._initialise)
        nn.init.zeros_(self.output.weight)

    def _apply(self, *args: Any, **kwargs: Any) -> "Transformer":
        """Move or cast the weights; the rotary table is made anew, so that it stays float32 whatever they become."""
        super()._apply(*args, **kwargs)
        self.rope = self.rotary().to(self.rope.device)
        return self

    @staticmethod
    def _initialise(module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)

    def rotary(self) -> Tensor:
        """The rotary table of every position; it is in no file of weights."""
        config = self.config
        return rope_table(config.grid, config.head_dim, config.rope_base, config.condition_length)

    def blocks(self) -> list[Block]:
        """The blocks, first to last."""
        return [block for block in self.layers if isinstance(block, Block)]

    def embed(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """The input of the first block: tokens [B, t] and their conditions -> [B, N + t, D], t < T."""
        if tokens.shape[1] >= self.config.sequence_length:
            raise UserError(
                f"{tokens.shape[1]} tokens are too many: the model reads the condition and at most the first "
                f"{self.config.sequence_length - 1} of an image's {self.config.sequence_length} tokens "
                f"(grid {self.config.grid}); pass tokens[:, :-1]"
            )
        return self.dropout(torch.cat([self.cls_embedding(labels), self.tok_embeddings(tokens)], dim=1))

    def null_condition(self, count: int) -> Tensor:
        """Labels for `count` images without a condition: int64 [count], or features [count, N, width] for a text model."""
        return self.cls_embedding.null_condition(count)

    def states(
        self, tokens: Tensor, labels: Tensor, *, layers: Collection[int], key_mask: Tensor | None = None
    ) -> dict[int, Tensor]:
        """Outputs [B, N - 1 + T, D] of `layers` at every position, the condition's too; layer 0 is the first block's input.

        Arguments are otherwise those of `forward`.
        """
        x = self.embed(tokens, labels)
        length, bias = x.shape[1], None
        key_mask = self.cls_embedding.key_mask(labels, key_mask, length)
        if key_mask is not None or x.device.type == "cpu":
            device = x.device.type
            dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
            bias = attention_bias(key_mask, length, dtype, x.device)  # once, for every layer
        states = {0: x}
        for number, block in enumerate(self.blocks()[: max(layers, default=0)], start=1):
            x = block(x, self.rope[:length], bias)
            if number in layers:
                states[number] = x
        return {layer: states[layer] for layer in layers}

    def features(
        self, tokens: Tensor, labels: Tensor, *, layers: Collection[int], key_mask: Tensor | None = None
    ) -> dict[int, Tensor]:
        """Outputs [B, T, D] of `layers`, before the final norm. Runs no block after the last of them and no output head.

        Arguments are those of `forward`.
        """
        depth = len(self.layers)
        if wrong := [layer for layer in layers if not 1 <= layer <= depth]:
            raise UserError(f"no layer {wrong[0]}: this network has layers 1 to {depth}")
        if not layers:
            raise UserError(f"no layers asked for: give some of 1 to {depth}")
        states = self.states(tokens, labels, layers=layers, key_mask=key_mask)
        return {layer: state[:, self.config.condition_length - 1 :] for layer, state in states.items()}

    def head(self, last: Tensor) -> Tensor:
        """Logits [.., V] from the last layer's output [.., D]."""
        return self.output(self.norm(last))

    def forward(
        self, tokens: Tensor, labels: Tensor, *, key_mask: Tensor | None = None, hidden: Collection[int] = ()
    ) -> Output:
        """Predict every token of the images.

        Args:
            tokens: int64 [B, T-1], the images' tokens in raster order without the last (or fewer, for a beginning).
            labels: the conditions. Of a class model int64 [B], `config.null_class` for none; of a text model captions'
                features, floating [B, N, width], zeros before a caption that has fewer than N rows (see TextEmbedding).
            key_mask: bool [B, T], True where attention may not look (Eq. 3); position 0 is the condition. Or [B, T, T],
                one mask for each query. It is applied on top of the causal mask, in every head and layer.
            hidden: layers, 1..n_layers, whose outputs to return.
        """
        last = len(self.layers)
        states = self.features(tokens, labels, layers={*hidden, last}, key_mask=key_mask)
        return Output(self.head(states[last]), {layer: states[layer] for layer in hidden})


class ClassEmbedding(nn.Module):
    """A class as one position: labels are int64 [B], and the last of num_classes + 1 embeddings is the null class."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.null_class = config.null_class
        self.embedding_table = nn.Embedding(config.num_classes + 1, config.dim)

    def check(self, labels: Tensor) -> None:
        """Refuse what is no class; waits for the device."""
        if labels.dim() != 1 or len(labels) == 0 or labels.dtype != torch.int64:
            raise UserError(f"labels must be int64 [B] with B of 1 or more, not {labels.dtype} {list(labels.shape)}")
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high > self.null_class:
            raise UserError(
                f"label {low if low < 0 else high} is out of range: the model knows classes 0 to {self.null_class - 1}, "
                f"and {self.null_class} for none"
            )

    def null(self, labels: Tensor) -> Tensor:
        """The null class [B] in the labels' place."""
        return torch.full_like(labels, self.null_class)

    def null_condition(self, count: int) -> Tensor:
        """The null class [count]."""
        return torch.full((count,), self.null_class, device=self.embedding_table.weight.device)

    def key_mask(self, labels: Tensor, key_mask: Tensor | None, length: int) -> Tensor | None:  # noqa: ARG002
        """The mask over all positions: as it is, since none is padding."""
        return key_mask

    def forward(self, labels: Tensor) -> Tensor:
        return self.embedding_table(labels)[:, None]  # (B, 1, D)


class Projection(nn.Module):
    """Captions' features to the transformer's width: fc2(gelu(fc1 x)), without biases."""

    def __init__(self, width: int, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, dim, bias=False)
        self.fc2 = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class TextEmbedding(nn.Module):
    """A caption as N positions: labels are its features, floating [B, N, width], as any text encoder gives them.

    A caption of fewer tokens stands at the end, and a row of zeros before it is padding: no other position attends to it.
    The null condition is `uncond_embedding` [N, width], drawn once and not trained, in the caption's own rows.
    """

    uncond_embedding: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.cap_proj = Projection(config.text_dim, config.dim)
        drawn = torch.randn(config.text_tokens, config.text_dim) / config.text_dim**0.5
        self.register_buffer("uncond_embedding", drawn)

    def check(self, labels: Tensor) -> None:
        """Refuse what are no captions' features of this model; does not wait for the device."""
        rows, width = self.uncond_embedding.shape
        if labels.shape[1:] != (rows, width) or len(labels) == 0 or not labels.is_floating_point():
            raise UserError(
                f"a text model's labels must be captions' features, floating [B, {rows}, {width}] with B of 1 or more, "
                f"not {labels.dtype} {list(labels.shape)}; TextStore.features gives them"
            )

    def null(self, labels: Tensor) -> Tensor:
        """The null condition [B, N, width] in the labels' place; padding stays padding, as LlamaGen keeps a caption's mask."""
        return torch.where(labels.any(dim=-1, keepdim=True), self.uncond_embedding.to(labels), 0.0)

    def null_condition(self, count: int) -> Tensor:
        """The null condition [count, N, width], with every row in use."""
        return self.uncond_embedding.expand(count, -1, -1)

    def key_mask(self, labels: Tensor, key_mask: Tensor | None, length: int) -> Tensor | None:
        """The mask over all positions, one for each query: bool [B, length, length], True where it may not look.

        `key_mask` [B, t] or [B, t, t] counts the condition as its position 0, which here stands for all N. Padding is
        hidden from all but itself, so that no softmax is empty.
        """
        padding = F.pad(~labels.any(dim=-1), (0, length - labels.shape[1]), value=False)  # (B, length)
        own = torch.eye(length, dtype=torch.bool, device=labels.device)
        masked = padding[:, None, :] & ~own
        if key_mask is None:
            return masked
        places = (torch.arange(length, device=labels.device) - labels.shape[1] + 1).clamp_min(0)
        assert key_mask.shape[-1] == length - labels.shape[1] + 1, "a key mask has one column for the condition"
        key_mask = key_mask[..., places]
        return masked | (key_mask[:, places] if key_mask.dim() == 3 else key_mask[:, None, :])

    def forward(self, labels: Tensor) -> Tensor:
        self.check(labels)
        return self.cap_proj(labels.to(self.uncond_embedding.dtype))  # (B, N, D)
