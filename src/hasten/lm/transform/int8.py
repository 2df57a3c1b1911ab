"""W8A8: weights as 8-bit integers with a scale an output, activations with a scale a row, summed exactly in 32 bits.

A decode step must read every weight once, so a quarter of the bytes is up to four times the speed. Round to nearest, symmetric, made from
the weights alone when the model is loaded (dynamic quantisation, as in Dettmers et al. 2022, 2208.07339, without its outliers). Small
steps of a Llama-like model are one C++ call as well. Without a C++ compiler the same integers go through `torch._int_mm`. On a GPU only
weights are 8-bit, which saves memory.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from hasten import hf, native
from hasten.native import build as compiled
from hasten.values import UserError

CPU_DTYPE = "float32"  # what the kernels take, whatever the processor computes in


@dataclass(frozen=True)
class Options:
    """rows: positions in a fused step at most. head: quantise the output layer too. fused: small steps in one C++ call."""

    rows: int = 64
    head: bool = True
    fused: bool = True


class Int8Linear(nn.Module):
    """In place of an nn.Linear; which route it takes is decided when it is built."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight, layer.bias  # the ledger and others read their shape and type
        if layer.weight.device.type != "cpu":
            q, scale = native.quantised(layer.weight.detach().float())
            self.register_buffer("q", q, persistent=False)
            self.register_buffer("scale", scale.to(layer.weight.dtype), persistent=False)
            self.run = self._weights_only
        elif compiled.why_not() is None:
            self.run = native.Linear(layer.weight, layer.bias, bits=8)
        else:
            q, self.scales = native.quantised(layer.weight.detach().float())
            self.columns = q.t().contiguous()
            self.run = self._by_library

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.run(x)

    def _weights_only(self, x: torch.Tensor) -> torch.Tensor:
        y = F.linear(x, self.q.to(x.dtype)) * self.scale
        return y if self.bias is None else y + self.bias

    def _by_library(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, self.in_features)
        q, scale = native.quantised(flat)
        y = torch._int_mm(q, self.columns).float() * (scale[:, None] * self.scales)
        y = y if self.bias is None else y + self.bias
        return y.view(*x.shape[:-1], self.out_features)


def why_not(options: Options, target: Any) -> str | None:
    if target is None:
        return None
    if target.model.device.type == "cpu" and target.model.dtype != torch.float32:
        return (
            f"int8 takes an fp32 model on a CPU, and this one is {str(target.model.dtype).removeprefix('torch.')}: load it with dtype=fp32"
        )
    if target.model.device.type == "cpu" and compiled.why_not() is None and compiled.isa() == "portable":
        return "this processor has no AVX2, and without it int8 products are slower than fp32's"
    return None


def build(options: Options, target: Any) -> Any:
    from hasten.lm.fused import FusedStep

    if not isinstance(getattr(target.model, "small_step", None), FusedStep | None):
        raise UserError("int8 changes what was compiled: put it before compile")
    return hf.derived(target.model, ("int8", options, torch.get_num_threads()), lambda: quantise(target.model, options))


def quantise(model: Any, options: Options) -> Any:
    """The model with int8 linear layers, and where it is built as Llama is with a fused step of them."""
    from hasten.lm.fused import FusedStep, Unfit

    twin = swapped(model, lambda layer, head: Int8Linear(layer) if options.head or not head else None)
    if options.fused and options.head and model.device.type == "cpu" and compiled.why_not() is None:
        with suppress(Unfit, AttributeError):  # not built as Llama is: its linear layers are int8 all the same
            hf.stepped(twin, FusedStep(twin, bits=8, rows=options.rows))
    return twin


def swapped(model: Any, make: Callable[[nn.Linear, bool], nn.Module | None]) -> Any:
    """A copy of the model (other weights shared) with linear layers that `make` (layer, whether it is the output layer) made, but for None."""
    twin = hf.shared_copy(model)
    output = model.get_output_embeddings()
    for module in list(twin.modules()):
        for child, layer in list(module._modules.items()):
            if not isinstance(layer, nn.Linear):
                continue
            top = module is twin or (output is not None and layer.weight is output.weight)  # a reward model's score too
            if (made := make(layer, top)) is not None:
                module._modules[child] = made
    return twin
