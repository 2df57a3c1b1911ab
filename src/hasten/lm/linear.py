"""Linear layers with pre-packed weights for small batches on CPUs.

A decode step of a few rows multiplies thin matrices by large weights. PyTorch's default route (MKL) packs the weights anew in each call,
which costs as much as the product itself from about 3 to 32 rows; oneDNN can keep them packed. One row, and prompts, go the default way.
Costs a second copy of the weights, so it is done only where memory is plentiful. Same numbers to rounding.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

FEW, MANY = 3, 32  # rows between which packed weights pay
SMALLEST = 1 << 16  # smaller weights stay in the processor's cache, where nothing is to be gained


class PackedLinear(nn.Linear):
    """An nn.Linear that also holds its weight in oneDNN's blocked layout."""

    packed: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if FEW <= x.numel() // self.in_features <= MANY:
            return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        return F.linear(x, self.weight, self.bias)


def pack(model: nn.Module, spare_bytes: int) -> nn.Module:
    """Pack the fp32 linear layers of a CPU model in place, if they take at most a quarter of `spare_bytes`."""
    layers = [m for m in model.modules() if type(m) is nn.Linear and m.weight.numel() >= SMALLEST and m.weight.dtype == torch.float32]
    wanted = sum(m.weight.numel() * m.weight.element_size() for m in layers)
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_reorder_linear_weight") or 4 * wanted > spare_bytes:
        return model
    for layer in layers:
        if layer.weight.device.type == "cpu":
            packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), 16)
            layer.__class__ = PackedLinear
            object.__setattr__(layer, "packed", packed)  # neither a parameter nor a buffer: it is not saved, moved or counted
    return model
