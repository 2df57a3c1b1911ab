"""Plain autoregressive decoding: one token a forward pass. The yardstick of every other technique."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hasten.lm.decode.verify import coupled

if TYPE_CHECKING:
    import torch

    from hasten.lm.scheduler import Row


@dataclass(frozen=True)
class Options:
    """Nothing to set."""


class Plain:
    """Proposes nothing."""

    def propose(self, rows: Sequence[Row], room: Sequence[int]) -> list[list[int]]:
        return [[] for _ in rows]

    def accept(self, row: Row, proposal: Sequence[int], chosen: Sequence[int], logits: torch.Tensor) -> list[int]:
        return coupled(proposal, chosen)

    def finish(self, row: Row) -> None:
        pass


def build(options: Options, target: Any = None) -> Plain:
    return Plain()
