"""Decode steps in one C++ call: the same numbers to rounding, without Python's cost of some thousand calls a step (`lm/fused.py`).

With dtype=bf16, weights and what they are multiplied by are rounded to bf16, where the processor multiplies it: half the bytes a step, and tiles
for prompts. Sums, norms, attention and cache stay fp32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hasten.native import build as native
from hasten.values import UserError

CPU_DTYPE = "float32"  # what the kernels take, whatever the processor computes in
BITS = {"fp32": 32, "bf16": 16}


@dataclass(frozen=True)
class Options:
    """rows: positions in a step at most where torch does larger ones (prompts) faster: on processors without AVX-512 VNNI. dtype: fp32, or bf16."""

    rows: int = 64
    dtype: str = "fp32"

    def __post_init__(self) -> None:
        if self.dtype not in BITS:
            raise UserError(f"native: dtype={self.dtype}: its products are of {' or '.join(BITS)}")


def exactness(options: Options) -> str:
    return "identical" if options.dtype == "fp32" else "approximate"


def why_not(options: Options, target: Any) -> str | None:
    if reason := native.why_not():
        return reason
    if options.dtype == "bf16" and not native.library().hasten_bf16():
        return "this processor has no products of bf16 (AVX512-BF16)"
    if target is None:
        return None
    from hasten.lm.fused import Unfit, attach

    try:
        return attach(target.model, rows=options.rows, bits=BITS[options.dtype]) and None
    except Unfit as e:
        return str(e)


def build(options: Options, target: Any) -> Any:
    from hasten.lm.fused import FusedStep, attach

    if not isinstance(getattr(target.model, "small_step", None), FusedStep | None):
        raise UserError("native and compile both do the small steps: leave out one of them")
    return attach(target.model, rows=options.rows, bits=BITS[options.dtype])
