"""Kernels of our own, in C++, where no library's is within 1.5 times of what the machine allows: linear layers and whole decode steps of
small batches on a CPU. `step.cpp` says how; `build` compiles it; `Linear` and `team` are its parts in Python.
"""

from __future__ import annotations

import functools
import weakref

import torch
from torch import nn

from hasten import cpu
from hasten.native import build

BEST_ISA = 3  # the best that there is; tests ask for less
GROUP, LEVELS, STEPS = 32, 8, 15  # of int4: inputs of a group, the largest magnitude of a weight, of a step
CLIPS = (0, -1, -2, -3, 1)  # steps that are tried, beside the one that reaches all weights of a group
AT_ONCE = 1 << 17  # weights that are quantised at once: what that needs stays in a cache


@functools.cache
def team(threads: int) -> int:
    """Handle of a team of threads that lives as long as the process; idle ones sleep."""
    return int(build.library().hasten_team(threads))


class Linear:
    """One packed weight: y = x w^T + bias, with weights of 32, 16, 8 or 4 bits.

    weight [n, k], bias [n] or None: fp32 on the CPU; copied. 32: fp32. 16: weights and activations bf16, sums fp32. 8: int8 weights (a scale an
    output, those of `quantised`) and int8 activations (a scale a row). 4: int8 weights that are products of those of `quantised4`.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None, *, bits: int = 32) -> None:
        self.n, self.k = weight.shape
        self.bits = bits
        w = weight.detach().float().contiguous()
        b = None if bias is None else bias.detach().float().contiguous()
        at, lib = b.data_ptr() if b is not None else None, build.library()
        if bits == 4:
            parts = quantised4(w)
            self.handle = int(lib.hasten_linear_int4(*(part.data_ptr() for part in parts), at, self.n, self.k))
        else:
            self.handle = int(lib.hasten_linear(w.data_ptr(), at, self.n, self.k, bits))
        weakref.finalize(self, lib.hasten_linear_free, self.handle)

    def __call__(self, x: torch.Tensor, isa: int = BEST_ISA) -> torch.Tensor:
        """x [..., k] fp32 -> [..., n]. isa: the most that may be used, an index of `build.ISAS`."""
        flat = x.reshape(-1, self.k).contiguous()
        y = torch.empty(flat.shape[0], self.n)
        if flat.shape[0]:
            build.library().hasten_linear_run(self.handle, team(torch.get_num_threads()), flat.data_ptr(), flat.shape[0], y.data_ptr(), isa)
        return y.view(*x.shape[:-1], self.n)


def quantised(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [rows, k] -> (int8 [rows, k], scale [rows]): symmetric, the largest magnitude of a row becomes 127. The formula of the kernels."""
    most = x.abs().amax(-1)
    return (x * torch.where(most > 0, 127 / most, most)[:, None]).round().to(torch.int8), most / 127


def quantised4(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """w [n, k] -> (q int8 [n, k] in -8..7, step int8 [n, ceil(k / 32)] in -15..15, scale fp32 [n]); w is about q * step of its group * scale.

    The row's largest group has a step of 15, so that q * step is an int8 weight, of magnitude 120 at most, with one scale an output: sums over
    groups need no fp32 (Lin et al. 2024, arXiv:2405.04532). A step's sign gives the eighth negative level to the side that reaches further, and
    its size, at most `CLIPS` from what reaches all weights of the group, is the one with the smallest squared error.
    """
    rows = max(1, AT_ONCE // w.shape[1])
    with cpu.using(1):  # threads would meet thousands of times, which takes minutes where other programs have the cores
        q, step, scale = zip(*map(_quantised4, w.split(rows)), strict=True)
    return torch.cat(q), torch.cat(step), torch.cat(scale)


def _quantised4(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    n, k = w.shape
    groups = nn.functional.pad(w, (0, -k % GROUP)).view(n, -1, GROUP)
    furthest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    scale = furthest.abs().amax(1, keepdim=True) / (LEVELS * STEPS)
    scale[scale == 0] = 1
    side, reach = torch.where(furthest > 0, -1.0, 1.0), (furthest.abs() / (LEVELS * scale)).round()
    least, best, step = torch.full_like(side, torch.inf), torch.zeros_like(groups), side
    for more in CLIPS:
        s = side * (reach + more).clamp(1, STEPS)
        q = (groups / (s * scale)).round_().clamp_(-LEVELS, LEVELS - 1)
        off = torch.addcmul(groups, q, s * scale, value=-1).square_().sum(-1, keepdim=True)
        better = off < least
        least, best, step = torch.where(better, off, least), torch.where(better, q, best), torch.where(better, s, step)
    return best.flatten(1)[:, :k].to(torch.int8), step[..., 0].to(torch.int8), scale.flatten()
