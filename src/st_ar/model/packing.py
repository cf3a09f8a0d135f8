"""Matrices laid out for a CPU's products with few rows, as decoding has them.

PyTorch's linear layer lays its weight out anew in every call; oneDNN's own operators, which torch.compile uses too, take one that
was laid out before.
"""

import copy

import torch
from torch import Tensor, nn

from st_ar.model.transformer import Transformer


class PackedLinear(nn.Module):
    """A bias-free linear layer with its weight in oneDNN's layout for about `rows` rows."""

    def __init__(self, linear: nn.Linear, rows: int) -> None:
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), rows)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, None, "none", [], "")


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
