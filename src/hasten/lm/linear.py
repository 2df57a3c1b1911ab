"""Linear layers with pre-packed, joined weights for small batches on CPUs.

A decode step of a few rows multiplies thin matrices by large weights. PyTorch's default route (MKL) packs the weights anew in each call,
which costs as much as the product itself from about 3 to 32 rows; oneDNN can keep them packed. Projections of the same input (queries,
keys and values; gate and up) are packed as one matrix and computed by the first of them that is called. One row, and prompts, go the
default way. Costs a second copy of the weights, so it is done only where memory is plentiful. Same numbers to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn
from torch.nn import functional as F

FEW, MANY = 3, 32  # rows between which packed weights pay
SMALLEST = 1 << 16  # smaller weights stay in the processor's cache, where nothing is to be gained
JOINED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class Packed:
    """One or more layers of the same input as one matrix in oneDNN's blocked layout."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        weight = torch.cat([layer.weight.detach() for layer in layers])
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, 16)
        self.bias = torch.cat([layer.bias.detach() for layer in layers if layer.bias is not None]) if layers[0].bias is not None else None
        self.sizes = [layer.out_features for layer in layers]
        self._input: torch.Tensor | None = None
        self._outputs: Sequence[torch.Tensor] = ()

    def output(self, x: torch.Tensor, index: int) -> torch.Tensor:
        """What layer `index` makes of x; the other layers' parts are kept until the last of them has been asked for with the same x."""
        if self._input is not x:
            self._input, self._outputs = (
                x,
                torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "").split(self.sizes, -1),
            )
        part = self._outputs[index]
        if index == len(self.sizes) - 1:
            self._input, self._outputs = None, ()
        return part


class PackedLinear(nn.Linear):
    """An nn.Linear that has a part in packed weights as well."""

    packed: Packed
    index: int

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if FEW <= x.numel() // self.in_features <= MANY:
            return self.packed.output(x, self.index)
        return F.linear(x, self.weight, self.bias)


def pack(model: nn.Module, spare_bytes: int) -> nn.Module:
    """Pack the fp32 linear layers of a CPU model in place, if they take at most a quarter of `spare_bytes`."""
    groups = [g for g in together(model) if sum(m.weight.numel() for m in g) >= SMALLEST]
    wanted = sum(m.weight.numel() * m.weight.element_size() for g in groups for m in g)
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_reorder_linear_weight") or 4 * wanted > spare_bytes:
        return model
    for group in groups:
        packed = Packed(group)
        for index, layer in enumerate(group):
            layer.__class__ = PackedLinear
            # neither parameters nor buffers: they are not saved, moved or counted
            object.__setattr__(layer, "packed", packed)
            object.__setattr__(layer, "index", index)
    return model


def together(model: nn.Module) -> Iterator[list[nn.Linear]]:
    """Layers that may be packed, those of the same input in one list."""
    seen: set[int] = set()
    for module in model.modules():
        children = dict(module.named_children())
        for names in JOINED:
            group = [children[n] for n in names if n in children and packable(children[n])]
            alike = len({(m.in_features, m.bias is None) for m in group}) == 1
            if len(group) == len(names) and alike:
                seen |= {id(m) for m in group}
                yield group
        yield from ([m] for m in children.values() if packable(m) and id(m) not in seen)


def packable(module: nn.Module) -> bool:
    return type(module) is nn.Linear and module.weight.dtype == torch.float32 and module.weight.device.type == "cpu"
