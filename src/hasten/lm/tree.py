"""A tree of proposed tokens: several continuations of a row that share what they have in common, tried in one forward pass (Miao et al. 2023,
SpecInfer, arXiv:2305.09781).

A node stands one position after its parent and sees its ancestors only, so each path from the root is scored as if it were alone. Nodes come in
an order in which parents stand before their children; techniques put the likeliest first, so that any head of a tree is a tree as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

ROOT = -1  # the parent of first tokens: the row's own last token


@dataclass(frozen=True)
class Tree:
    """tokens: one a node. parents: index of the node before it, smaller than its own; ROOT where a node follows the row's last token."""

    tokens: tuple[int, ...]
    parents: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.tokens) != len(self.parents) or not all(ROOT <= p < i for i, p in enumerate(self.parents)):
            raise ValueError("a tree has a parent for each token, and it stands before its child")

    def __len__(self) -> int:
        return len(self.tokens)

    @cached_property
    def is_chain(self) -> bool:
        return all(p == i - 1 for i, p in enumerate(self.parents))

    @cached_property
    def depths(self) -> list[int]:
        """Of each node, 0 for those that follow the root."""
        out: list[int] = []
        for p in self.parents:
            out.append(0 if p == ROOT else out[p] + 1)
        return out

    @property
    def depth(self) -> int:
        """Tokens of the longest path."""
        return max(self.depths, default=-1) + 1

    @cached_property
    def at(self) -> dict[tuple[int, int], int]:
        """(parent, token) -> node; of equal siblings the first."""
        return {(p, t): i for i, (p, t) in reversed(list(enumerate(zip(self.parents, self.tokens, strict=True))))}

    @cached_property
    def children(self) -> dict[int, list[int]]:
        """Nodes that follow a node, in order; those without any are left out."""
        out: dict[int, list[int]] = {}
        for i, p in enumerate(self.parents):
            out.setdefault(p, []).append(i)
        return out

    def path(self, node: int) -> list[int]:
        """Tokens from the root to a node; none for the root itself."""
        out = []
        while node != ROOT:
            out.append(self.tokens[node])
            node = self.parents[node]
        return out[::-1]

    def follow(self, tokens: Iterable[int]) -> list[int]:
        """Nodes that these tokens pass from the root on, as far as there are any."""
        node, out = ROOT, []
        for token in tokens:
            found = self.at.get((node, token))
            if found is None:
                break
            out.append(found)
            node = found
        return out

    def walk(self, chosen: Sequence[int]) -> list[int]:
        """Tokens to commit when a target has chosen a token after the root (chosen[0]) and after each node (chosen[node + 1])."""
        out, node = [chosen[0]], self.at.get((ROOT, chosen[0]))
        while node is not None:
            out.append(chosen[node + 1])
            node = self.at.get((node, chosen[node + 1]))
        return out

    def head(self, n: int) -> Tree:
        """The first n nodes."""
        return self if n >= len(self) else Tree(self.tokens[:n], self.parents[:n])

    @cached_property
    def sees(self) -> np.ndarray:
        """bool [nodes, nodes]: whether a node (row) sees another (column): its ancestors and itself."""
        out = np.eye(len(self), dtype=bool)
        for i, p in enumerate(self.parents):
            if p != ROOT:
                out[i] |= out[p]
        return out


class Growing:
    """A tree in the making; paths that begin alike share nodes."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.parents: list[int] = []
        self.at: dict[tuple[int, int], int] = {}

    def add(self, parent: int, token: int) -> int:
        """The node of a token after a node, made if there is none."""
        node = self.at.get((parent, token))
        if node is None:
            node = self.at[parent, token] = len(self.tokens)
            self.tokens.append(token)
            self.parents.append(parent)
        return node

    def path(self, tokens: Iterable[int]) -> int:
        """The node where a path from the root ends."""
        node = ROOT
        for token in tokens:
            node = self.add(node, token)
        return node

    def tree(self) -> Tree:
        return Tree(tuple(self.tokens), tuple(self.parents))


Proposal = list[int] | Tree  # a chain, or a tree


def shaped(proposal: Proposal) -> Proposal:
    """A tree that does not branch as the chain it is."""
    return list(proposal.tokens) if isinstance(proposal, Tree) and proposal.is_chain else proposal
