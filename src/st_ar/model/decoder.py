"""The transformer one token at a time, with the keys and values of what it has read kept.

Everything that a step touches is allocated once and stays where it is, and a step asks the device nothing, so that a GPU can replay
it as a CUDA graph. B: sequences, H: heads, V: codebook entries, N: positions of the condition.
"""

import copy
import itertools
from collections.abc import Callable
from types import FunctionType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from st_ar.errors import UserError
from st_ar.model.transformer import Block, Transformer, attention_bias


class CachedDecoder:
    """Gives the logits of `Transformer.forward`, in evaluation, without ever running it.

    Args:
        rows: sequences at most, for which the memory is allocated; fewer may be read.
        bucket: the part of the cache that attention reads grows by so many positions, each length being a CUDA graph of its own;
            by default 32 on a GPU and 1 on a CPU.
        compiled: compile the blocks with torch.compile: some seconds at the start, and fewer passes over the memory from then on.
    """

    def __init__(self, model: Transformer, rows: int, *, bucket: int | None = None, compiled: bool = False) -> None:
        config, weight = model.config, model.output.weight
        device, on_cpu = weight.device, weight.device.type == "cpu"
        self.model = packed(model, rows)
        self.condition_length, self.sequence_length = config.condition_length, config.sequence_length
        self.bucket = bucket or (1 if on_cpu else 32)
        # PyTorch's own attention on CPUs is slower in bfloat16 than in float32
        dtype = torch.float32 if on_cpu and not compiled else weight.dtype
        length = self._in_buckets(self.condition_length - 1 + self.sequence_length)
        length += compiled  # never read: of the whole cache torch.compile would make another case than of its parts
        shape = (config.n_layers, 2, rows, config.n_heads, length, config.head_dim)
        self.cache = torch.zeros(shape, dtype=dtype, device=device)  # what is hidden is read all the same: no NaN
        self.mask = torch.full((rows, 1, 1, length), float("-inf"), dtype=dtype, device=device)
        self.place = torch.zeros(1, dtype=torch.int64, device=device)  # of the position to be read
        self.step = torch.compile(_copy(_step)) if compiled else _step

    @torch.no_grad()
    def begin(self, labels: Tensor) -> Tensor:
        """Logits [B, V] of the first token, given the conditions (labels as for `Transformer.forward`); forgets all else."""
        count, embedding = self.condition_length, self.model.cls_embedding
        key_mask = embedding.key_mask(labels, None, count + 1)  # with the first token, which sees what all others see
        self.mask.fill_(float("-inf"))
        self.mask[..., :count] = 0
        if key_mask is not None:
            self.mask[: len(labels), 0, 0, :count].masked_fill_(key_mask[:, -1, :count], float("-inf"))
            key_mask = key_mask[:, :count, :count]
        bias = attention_bias(key_mask, count, self.mask.dtype, self.mask.device)
        places = torch.arange(count, device=self.mask.device)
        return self._read(_step, embedding(labels), places, bias)

    def seek(self, position: int) -> int:
        """Stand at the image's token of this number, the next to be read; returns how much of the cache to read then."""
        if position >= self.sequence_length - 1:
            raise UserError(f"all {self.sequence_length} tokens of the image are there: nothing comes after them")
        place = self.condition_length + position
        self.place.fill_(place)
        return self._in_buckets(place + 1)

    @torch.no_grad()
    def read(self, tokens: Tensor, length: int) -> Tensor:
        """Logits [B, V] of the next token, having read these [B] where `seek` stands, and `length` positions of the cache."""
        self.mask.index_fill_(3, self.place, 0)
        bias = self.mask[: len(tokens), :, :, :length]
        if self.step is not _step:
            torch._dynamo.maybe_mark_dynamic(bias, 3)  # one compilation serves every length
        return self._read(self.step, self.model.tok_embeddings(tokens)[:, None], self.place, bias)

    def _read(self, step: Callable[..., Tensor], x: Tensor, places: Tensor, bias: Tensor) -> Tensor:
        rope = self.model.rope.index_select(0, places)
        for block, (keys, values) in zip(self.model.blocks(), self.cache[:, :, : len(x)], strict=True):
            x = step(block, x, rope, keys, values, places, bias)
        return self.model.head(x[:, -1])

    def _in_buckets(self, length: int) -> int:
        return -(-length // self.bucket) * self.bucket


def _copy(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function with a code object and a name of its own: by the one torch.compile counts and keeps its compilations, by the
    other what it has seen vary from call to call, not by decoder.
    """
    assert isinstance(function, FunctionType)
    code = function.__code__
    return FunctionType(code.replace(co_name=f"{code.co_name}_{next(_COPIES)}"), function.__globals__)


_COPIES = itertools.count()


def _step(block: Block, x: Tensor, rope: Tensor, keys: Tensor, values: Tensor, places: Tensor, bias: Tensor) -> Tensor:
    """A block's output for x [B, n, D] at these places [n], whose keys and values it adds to those it has [B, H, .., head_dim].

    bias: [B, 1, n, t], for the first t of them.
    """
    q, k, v = block.attention.project(block.attention_norm(x), rope)
    keys.index_copy_(2, places, k.to(keys.dtype))
    values.index_copy_(2, places, v.to(keys.dtype))
    length = bias.shape[-1]
    heads = _attend(q.to(keys.dtype), keys[:, :, :length], values[:, :, :length], bias)
    x = x + block.attention.merge(heads.to(x.dtype))
    return x + block.feed_forward(block.ffn_norm(x))


def _attend(q: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
    if not torch.compiler.is_compiling():
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=bias)
    # For the one query of a step: sums, which read the cache once, where a fused kernel is made for many queries
    scores = (q.float() * keys).sum(-1) * q.shape[-1] ** -0.5 + bias[:, :, 0]  # (B, H, t)
    return (scores.softmax(dim=-1)[..., None] * values).sum(-2, keepdim=True)


def _product(x: Tensor, weight: Tensor, width: int) -> Tensor:  # noqa: ARG001
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


# torch.compile takes oneDNN's operator with constant weights alone; of one that it knows nothing about it asks no more than a shape.
_library = torch.library.Library("st_ar", "DEF")
_library.define("packed_linear(Tensor x, Tensor weight, int width) -> Tensor")
_library.impl("packed_linear", _product, "CPU")
_library.impl("packed_linear", _product, "MkldnnCPU")
_library.impl("packed_linear", lambda x, weight, width: x.new_empty(*x.shape[:-1], width), "Meta")  # noqa: ARG005


class PackedLinear(nn.Module):
    """A bias-free linear layer with its weight in oneDNN's layout for about `rows` rows."""

    def __init__(self, linear: nn.Linear, rows: int) -> None:
        super().__init__()
        self.width = linear.out_features
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), rows)

    def forward(self, x: Tensor) -> Tensor:
        product = torch.ops.st_ar.packed_linear if torch.compiler.is_compiling() else _product
        return product(x, self.packed, self.width)


def packed(model: Transformer, rows: int) -> Transformer:
    """The model with packed matrices, for evaluation; itself where there is nothing to gain: on a GPU, or without oneDNN.

    Everything but the matrices is shared with the model, which is left as it is.
    """
    weight = model.output.weight
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return model
    half = weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if weight.dtype != torch.float32 and not half:
        return model
    twin = _pack(model, rows)
    assert isinstance(twin, Transformer)
    return twin


def _pack(module: nn.Module, rows: int) -> nn.Module:
    twin = copy.copy(module)
    twin._modules = {
        name: PackedLinear(child, rows) if isinstance(child, nn.Linear) else child and _pack(child, rows)
        for name, child in module._modules.items()
    }
    return twin
