"""The transformer one token at a time, with a key-value cache.

All memory is allocated once and the host never waits for the device, so that a GPU can replay a step as a CUDA graph.
B: sequences, H: heads, V: codebook entries, N: positions of the condition.
"""

import copy
import itertools
from collections.abc import Callable
from types import FunctionType
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from st_ar.errors import UserError
from st_ar.model.transformer import Block, Transformer, attention_bias, fused_width, widen

M = TypeVar("M", bound=nn.Module)
R = TypeVar("R")


class CachedDecoder:
    """Computes the logits of `Transformer.forward` token by token, in evaluation mode, for at most `rows` sequences.

    Attention reads a multiple of `bucket` cached positions, by default 32 on a GPU and 1 on a CPU; each length is a separate CUDA
    graph. `compiled` compiles the blocks with torch.compile, which takes some seconds at the start and makes each step faster.
    """

    def __init__(self, model: Transformer, rows: int, *, bucket: int | None = None, compiled: bool = False) -> None:
        config, weight = model.config, model.output.weight
        device, on_cpu = weight.device, weight.device.type == "cpu"
        self.model = packed(model, rows)
        self.condition_length, self.sequence_length = config.condition_length, config.sequence_length
        self.bucket = bucket or (1 if on_cpu else 32)
        # On CPUs, PyTorch's attention is slower in bfloat16 than in float32.
        dtype = torch.float32 if on_cpu and not compiled else weight.dtype
        length = self._round_up(self.condition_length - 1 + self.sequence_length)
        length += compiled  # one position that is never read: torch.compile would compile the whole cache and parts of it separately
        shape = (config.n_layers, 2, rows, config.n_heads, length, fused_width(config.head_dim, device))
        self.cache = torch.zeros(shape, dtype=dtype, device=device)  # no NaN: masked positions are read too
        self.mask = torch.full((rows, 1, 1, length), float("-inf"), dtype=dtype, device=device)
        self.index = torch.zeros(1, dtype=torch.int64, device=device)  # of the position to read next
        self.step = torch.compile(copy_function(_step)) if compiled else _step

    @torch.no_grad()
    def begin(self, labels: Tensor) -> Tensor:
        """Clear the cache, read the conditions, the labels of `Transformer.forward`, and return the first token's logits [B, V]."""
        count, embedding = self.condition_length, self.model.cls_embedding
        key_mask = embedding.key_mask(labels, None, count + 1)  # one token more, whose row is the mask of all tokens
        self.mask.fill_(float("-inf"))
        self.mask[..., :count] = 0
        if key_mask is not None:
            self.mask[: len(labels), 0, 0, :count].masked_fill_(key_mask[:, -1, :count], float("-inf"))
            key_mask = key_mask[:, :count, :count]
        bias = attention_bias(key_mask, count, self.mask.dtype, self.mask.device)
        indices = torch.arange(count, device=self.mask.device)
        return self._read(_step, embedding(labels), indices, bias)

    def seek(self, position: int) -> int:
        """Set the position in the image of the token to read next; returns how many cached positions `read` needs."""
        if position >= self.sequence_length - 1:
            raise UserError(f"all {self.sequence_length} tokens of the image are drawn: there is no next one")
        index = self.condition_length + position
        self.index.fill_(index)
        return self._round_up(index + 1)

    @torch.no_grad()
    def read(self, tokens: Tensor, length: int) -> Tensor:
        """Read tokens [B] at the position of `seek` and return the next token's logits [B, V]; `length` as `seek` returned it."""
        self.mask.index_fill_(3, self.index, 0)
        bias = self.mask[: len(tokens), :, :, :length]
        if self.step is not _step:
            torch._dynamo.maybe_mark_dynamic(bias, 3)  # one compilation serves every length
        return self._read(self.step, self.model.tok_embeddings(tokens)[:, None], self.index, bias)

    def _read(self, step: Callable[..., Tensor], x: Tensor, indices: Tensor, bias: Tensor) -> Tensor:
        rope = self.model.rope.index_select(0, indices)
        for block, (keys, values) in zip(self.model.blocks(), self.cache[:, :, : len(x)], strict=True):
            x = step(block, x, rope, keys, values, indices, bias)
        return self.model.head(x[:, -1])

    def _round_up(self, length: int) -> int:
        return -(-length // self.bucket) * self.bucket


def copy_function(function: Callable[..., R]) -> Callable[..., R]:
    """Copy a function under a new name, with a new code object.

    torch.compile keeps compilations by code object and dynamic shapes by name. With a copy, decoders do not share either.
    """
    assert isinstance(function, FunctionType)
    code = function.__code__
    return FunctionType(code.replace(co_name=f"{code.co_name}_{next(_COPIES)}"), function.__globals__)


_COPIES = itertools.count()


def _step(block: Block, x: Tensor, rope: Tensor, keys: Tensor, values: Tensor, indices: Tensor, bias: Tensor) -> Tensor:
    """Return a block's output for x [B, n, D] at cache indices [n], and put its keys and values into the cache there.

    Args:
        keys, values: the block's cache [B, H, .., head_dim].
        bias: [B, 1, n, t]; attention reads the first t cached positions.
    """
    projected = block.attention.project(block.attention_norm(x), rope)
    head_dim = projected[0].shape[-1]
    q, k, v = (widen(each.to(keys.dtype), keys.shape[-1]) for each in projected)
    keys.index_copy_(2, indices, k)
    values.index_copy_(2, indices, v)
    length = bias.shape[-1]
    heads = _attend(q, keys[:, :, :length], values[:, :, :length], bias, head_dim**-0.5)[..., :head_dim]
    x = x + block.attention.merge(heads.to(x.dtype))
    return x + block.feed_forward(block.ffn_norm(x))


def _attend(q: Tensor, keys: Tensor, values: Tensor, bias: Tensor, scale: float) -> Tensor:
    if not torch.compiler.is_compiling():
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=bias, scale=scale)
    # For a single query, sums that read the cache once are faster than a fused kernel, which is made for many queries.
    scores = (q.float() * keys).sum(-1) * scale + bias[:, :, 0]  # (B, H, t)
    return (scores.softmax(dim=-1)[..., None] * values).sum(-2, keepdim=True)


def _product(x: Tensor, weight: Tensor, width: int) -> Tensor:  # noqa: ARG001
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


# torch.compile accepts oneDNN's operator only with constant weights. Of a custom operator it needs no more than the output's shape.
_library = torch.library.Library("st_ar", "DEF")
_library.define("packed_linear(Tensor x, Tensor weight, int width) -> Tensor")
_library.impl("packed_linear", _product, "CPU")
_library.impl("packed_linear", _product, "MkldnnCPU")
_library.impl("packed_linear", lambda x, weight, width: x.new_empty(*x.shape[:-1], width), "Meta")  # noqa: ARG005


class PackedLinear(nn.Module):
    """A linear layer without bias, with its weight in oneDNN's layout for about `rows` rows."""

    def __init__(self, linear: nn.Linear, rows: int) -> None:
        super().__init__()
        self.width = linear.out_features
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), rows)

    def forward(self, x: Tensor) -> Tensor:
        product = torch.ops.st_ar.packed_linear if torch.compiler.is_compiling() else _product
        return product(x, self.packed, self.width)


def packed(model: Transformer, rows: int) -> Transformer:
    """Return a copy of the model with packed matrices, for evaluation, or the model itself on a GPU or without oneDNN.

    The copy shares everything but the matrices with the model, which does not change.
    """
    weight = model.output.weight
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return model
    half = weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if weight.dtype != torch.float32 and not half:
        return model
    return _pack(model, rows)


def _pack(module: M, rows: int) -> M:
    packed_module = copy.copy(module)
    packed_module._modules = {
        name: PackedLinear(child, rows) if isinstance(child, nn.Linear) else child and _pack(child, rows)
        for name, child in module._modules.items()
    }
    return packed_module
