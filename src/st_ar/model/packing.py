"""Matrices laid out for a CPU's products with few rows, as decoding has them.

PyTorch's linear layer lays its weight out anew in every call; oneDNN's own operators take one that was laid out before.
"""

import copy

import torch
from torch import Tensor, nn

from st_ar.model.transformer import Transformer


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
