"""What no engine can beat: the bytes that a step must read, over the bandwidth at which this machine reads so many (Williams et al. 2009).

A decode step reads every weight once and the keys and values of all its rows, and does little with each; so bytes bound it, not operations.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hasten.flops import ModelCost


@dataclass(frozen=True, slots=True)
class Roofline:
    """nbytes: that a step must read. bandwidth: bytes a second."""

    nbytes: float
    bandwidth: float

    @property
    def seconds(self) -> float:
        """The least that a step can take."""
        return self.nbytes / self.bandwidth

    def distance(self, seconds: float) -> float:
        """How many times the least a step took."""
        return seconds / self.seconds

    def card(self, what: str) -> str:
        """One line for people."""
        return (
            f"ceiling, {what}: {self.nbytes / 1e6:.0f} MB a step at {self.bandwidth / 1e9:.1f} GB/s measured = {self.seconds * 1e3:.1f} ms"
        )


def step_bytes(cost: ModelCost, rows: int = 1, context: int = 0, *, weights: float = 1.0, cache: float = 1.0) -> float:
    """Bytes of a decode step of `rows` rows with `context` positions each. weights, cache: shares of the stored sizes (int8 of fp32: 0.25)."""
    everything = cost.bytes(context)
    return weights * cost.weight_bytes + cache * rows * (everything - cost.weight_bytes)


def bandwidth(nbytes: float, device: str = "cpu", repeats: int = 15) -> float:
    """Bytes a second at which torch's threads read a buffer of `nbytes`, over and over: the best of `repeats`.

    The buffer is as large as what a step reads, so that whatever of it a large cache keeps is counted for the ceiling too.
    """
    import torch

    block = torch.ones(max(1, int(nbytes) // 4), device=device)
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        block.sum().item()  # waits for a GPU
        seconds.append(time.perf_counter() - began)
    return block.numel() * block.element_size() / min(seconds)
