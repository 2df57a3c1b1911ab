"""The constraint seam: what may be committed. States are values, so that a proposal of several tokens forks and rolls back for free."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Protocol

from hasten.lm.tree import ROOT, Growing, Proposal, Tree

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


def pruned(constraint: Constraint, state: Hashable, proposal: Proposal) -> tuple[Proposal, list[Hashable]]:
    """The part of a proposal that the constraint permits, and the state at each of its positions and after it."""
    if isinstance(proposal, Tree):
        return _pruned_tree(constraint, state, proposal)
    kept, states = [], [state]
    for token in proposal:
        if not constraint.permits(states[-1], token):
            break
        kept.append(token)
        states.append(constraint.advance(states[-1], token))
    return kept, states


def _pruned_tree(constraint: Constraint, state: Hashable, tree: Tree) -> tuple[Tree, list[Hashable]]:
    """What a node that is not permitted would have led to goes with it."""
    grown, states = Growing(), [state]
    new = {ROOT: ROOT}  # where nodes that stay have come to stand
    for node, (token, parent) in enumerate(zip(tree.tokens, tree.parents, strict=True)):
        if parent in new and constraint.permits(states[new[parent] + 1], token):
            new[node] = grown.add(new[parent], token)
            if new[node] + 1 == len(states):
                states.append(constraint.advance(states[new[parent] + 1], token))
    return grown.tree(), states
