"""Kernels of our own, in C++, where no library's is within 1.5 times of what the machine allows: linear layers and whole decode steps of
small batches on a CPU. `step.cpp` says how; `build` compiles it; `Linear` and `team` are its parts in Python.
"""

from __future__ import annotations

import functools
import weakref

import torch

from hasten.native import build

INT8_ISA = 3  # the best that there is; tests ask for less


@functools.cache
def team(threads: int) -> int:
    """Handle of a team of threads that lives as long as the process; idle ones sleep."""
    return int(build.library().hasten_team(threads))


class Linear:
    """One packed weight: y = x w^T + bias in fp32, or with int8 weights (a scale an output) and int8 activations (a scale a row).

    weight [n, k], bias [n] or None: fp32 on the CPU; copied. `w` and `scale` of the int8 form are those of `quantised`.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None, *, int8: bool = False) -> None:
        self.n, self.k = weight.shape
        self.int8 = int8
        w = weight.detach().float().contiguous()
        b = None if bias is None else bias.detach().float().contiguous()
        lib = build.library()
        self.handle = int(lib.hasten_linear(w.data_ptr(), b.data_ptr() if b is not None else None, self.n, self.k, int(int8)))
        weakref.finalize(self, lib.hasten_linear_free, self.handle)

    def __call__(self, x: torch.Tensor, isa: int = INT8_ISA) -> torch.Tensor:
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
