"""W4A8: weights as 4-bit integers with a step a group of 32 inputs, activations as 8-bit ones with a scale a row.

Half of int8's bytes, so up to twice its speed where a step waits for the weights (few rows); with many rows it is int8's speed, as the weights
are unpacked to int8 once for all rows (Lin et al. 2024, 2405.04532: steps are whole multiples of the output's scale, so sums stay in integers).
Made from the weights alone when the model is loaded. It loses more than int8 does, most of all in small models (docs/quality.md). The output
layer is the most sensitive matrix and stays at 8 bits, as llama.cpp keeps it at more than 4.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hasten import hf, native
from hasten.lm.transform.int8 import swapped
from hasten.native import build as compiled
from hasten.values import UserError

CPU_DTYPE = "float32"  # what the kernels take, whatever the processor computes in


@dataclass(frozen=True)
class Options:
    """rows: positions in a fused step at most, where torch does larger ones faster. head: bits of the output layer, 8 or 4.

    fused: small steps in one C++ call.
    """

    rows: int = 64
    head: int = 8
    fused: bool = True

    def __post_init__(self) -> None:
        if self.head not in (4, 8):
            raise UserError(f"int4: head={self.head}: the output layer takes 8 or 4 bits")


class Int4Linear(nn.Module):
    """In place of an nn.Linear: [..., in_features] fp32 -> [..., out_features]."""

    def __init__(self, layer: nn.Linear, bits: int = 4) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight, layer.bias  # the ledger and others read their shape and type
        self.run = native.Linear(layer.weight, layer.bias, bits=bits)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.run(x)


def why_not(options: Options, target: Any) -> str | None:
    if reason := compiled.why_not():
        return f"int4 has no route but its own kernels: {reason}"
    if compiled.isa() == "portable":
        return "this processor has no AVX2, and without it int4 products are slower than fp32's"
    if target is None:
        return None
    if target.model.device.type != "cpu":
        return f"int4 has kernels for CPUs only, and this model is on {target.model.device.type}"
    if target.model.dtype != torch.float32:
        return f"int4 takes an fp32 model, and this one is {str(target.model.dtype).removeprefix('torch.')}: load it with dtype=fp32"
    return None


def build(options: Options, target: Any) -> Any:
    from hasten.lm.fused import FusedStep

    if not isinstance(getattr(target.model, "small_step", None), FusedStep | None):
        raise UserError("int4 changes what was compiled: put it before compile")
    return hf.derived(target.model, ("int4", options, torch.get_num_threads()), lambda: quantise(target.model, options))


def quantise(model: Any, options: Options) -> Any:
    """The model with int4 linear layers, and where it is built as Llama is with a fused step of them."""
    from hasten.lm.fused import FusedStep, Unfit

    twin = swapped(model, lambda layer, head: Int4Linear(layer, options.head if head else 4))
    if options.fused:
        with suppress(Unfit, AttributeError):  # not built as Llama is: its linear layers are int4 all the same
            hf.stepped(twin, FusedStep(twin, bits=4, head=options.head, rows=options.rows))
    return twin
