"""The decode seam: how the next piece is found. Propose several tokens, one forward pass, commit a part.

A decode technique is one file with one class. A proposal is a chain of tokens or a tree of them (`lm/tree.py`). Proposals of all rows of a
step go through the same forward pass, the constraint prunes them before it, and every row keeps as much as it accepts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hasten.lm.tree import Proposal, Tree

if TYPE_CHECKING:
    import torch

    from hasten.lm.scheduler import Row, Work
    from hasten.usage import Cost


class Decode:
    """What the engine asks of a technique; the defaults are those of one that proposes nothing."""

    def bind(self, engine: Any) -> None:
        """Called once, by the engine that will use it."""

    def planned(self, works: Sequence[Work]) -> None:
        """Called first in every step, with all that it will compute."""

    def propose(self, rows: Sequence[Row], room: Sequence[int]) -> Sequence[Proposal]:
        """What to try after each row's own tokens, no path longer than room[i] (empty: nothing). Called with all rows that decode in this step."""
        return [[] for _ in rows]

    def accept(self, row: Row, proposal: Proposal, chosen: Sequence[int], logits: torch.Tensor) -> list[int]:
        """What to commit of one row, given its proposal (as the constraint left it), the target's own choice after the row's last token and
        after each proposed one (so one more than the proposal), and the processed logits [len(proposal) + 1, vocabulary] of those choices.
        All but the last token committed are a path of the proposal.
        """
        return coupled(proposal, chosen)

    def timed(self, positions: int, proposing: float, rest: float) -> None:
        """Seconds of a step in which every row decoded: spent on proposing, and on everything else, for so many positions."""

    def finish(self, row: Row) -> None:
        """A row has ended, was cut short or cancelled."""

    def costs(self, row: Row) -> Mapping[str, Cost]:
        """What other models did for a row, by role."""
        return {}

    def processor_seconds(self) -> float:
        """Processor time that other processes have used so far."""
        return 0.0

    def close(self) -> None:
        """End what runs beside this process, if there is anything."""


def coupled(proposal: Proposal, chosen: Sequence[int]) -> list[int]:
    """The part of a proposal that agrees with the target's choices, and its first choice after it (see `verify`); one choice more than proposed."""
    if isinstance(proposal, Tree):
        return proposal.walk(chosen)
    kept = 0
    while kept < len(proposal) and proposal[kept] == chosen[kept]:
        kept += 1
    return list(chosen[: kept + 1])
