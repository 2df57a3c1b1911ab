"""The decode seam: how the next piece is found. Propose several tokens, one forward pass, commit a part.

A decode technique is an object with three methods; one file each. Proposals of all rows of a step go through the same forward pass, the
constraint prunes them before it, and every row keeps as much as it accepts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

    from hasten.lm.scheduler import Row


class Decode(Protocol):
    """propose: tokens to try after each row's own, at most room[i] of them (empty: none). Called with all rows that decode in this step.

    accept: what to commit of one row, given its proposal, the target's own choice at each position (one more than the proposal), and the
    processed logits [len(proposal) + 1, vocabulary] those choices were made from. finish: a row has ended, was cut short or cancelled.
    """

    def propose(self, rows: Sequence[Row], room: Sequence[int]) -> list[list[int]]: ...

    def accept(self, row: Row, proposal: Sequence[int], chosen: Sequence[int], logits: torch.Tensor) -> list[int]: ...

    def finish(self, row: Row) -> None: ...
