"""The constraint seam: what may be committed. States are values, so that a proposal of several tokens forks and rolls back for free."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

    from hasten.values import Request


class Constraint(Protocol):
    """check: UserError where a request cannot be served under it. start: the state before the first generated token. permits / advance: one
    token. mask: bool [states, vocabulary], true where allowed.
    """

    def check(self, request: Request) -> None: ...

    def start(self, prompt: Sequence[int]) -> Hashable: ...

    def permits(self, state: Hashable, token: int) -> bool: ...

    def advance(self, state: Hashable, token: int) -> Hashable: ...

    def mask(self, states: Sequence[Hashable], vocabulary: int, device: torch.device) -> torch.Tensor: ...


def pruned(constraint: Constraint, state: Hashable, proposal: Sequence[int]) -> tuple[list[int], list[Hashable]]:
    """The part of a proposal that the constraint permits, and the state at each of its positions and after it."""
    kept, states = [], [state]
    for token in proposal:
        if not constraint.permits(states[-1], token):
            break
        kept.append(token)
        states.append(constraint.advance(states[-1], token))
    return kept, states
