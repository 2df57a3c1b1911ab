"""Decode steps in one C++ call: the same numbers to rounding, without Python's cost of some thousand calls a step (`lm/fused.py`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hasten.native import build as native
from hasten.values import UserError

CPU_DTYPE = "float32"  # what the kernels take, whatever the processor computes in


@dataclass(frozen=True)
class Options:
    """rows: positions in a step at most where torch does larger ones (prompts) faster: on processors without AVX-512 VNNI."""

    rows: int = 64


def why_not(options: Options, target: Any) -> str | None:
    if target is None:
        return native.why_not()
    from hasten.lm.fused import Unfit, attach

    try:
        return native.why_not() or (attach(target.model, rows=options.rows) and None)
    except Unfit as e:
        return str(e)


def build(options: Options, target: Any) -> Any:
    from hasten.lm.fused import FusedStep, attach

    if not isinstance(getattr(target.model, "small_step", None), FusedStep | None):
        raise UserError("native and compile both do the small steps: leave out one of them")
    return attach(target.model, rows=options.rows)
