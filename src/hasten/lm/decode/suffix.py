"""Suffix decoding (Oliaro et al. 2024, arXiv:2411.04975): propose what usually followed the longest matching suffix, in this request or in
answers given before.

A tree of all substrings up to `depth` tokens counts how often each occurred. The request's own tree holds its prompt and answer; a shared one
holds finished answers, the oldest given up first. For each matching suffix the most frequent continuation is followed while its estimated
probability stays above `least`, at most `factor` tokens for each token matched; the proposal with the largest expected number of accepted
tokens wins, so a long match earns a long proposal and no match costs nothing.

With `branches` above 1 the likeliest continuations of all matching suffixes, in both trees, are tried at once as a tree of k nodes.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hasten.lm.decode.control import Speculation, check, check_trees
from hasten.lm.tree import ROOT, Growing, Proposal
from hasten.values import UserError

if TYPE_CHECKING:
    from hasten.lm.scheduler import Row


@dataclass(frozen=True)
class Options:
    """k: tokens proposed at most. depth: longest substring that is counted. factor: tokens proposed for each token matched, at most.

    least: probability, by counts, below which a continuation is not followed. memory: tokens of finished answers that are kept (0: none).
    schedule: how many of k are proposed, goodput (as many as pay, none included), constant or heuristic. branches: continuations that are
    followed where they part (1: the most frequent one).
    """

    k: int = 16
    depth: int = 16
    factor: float = 2.0
    least: float = 0.1
    memory: int = 100_000
    schedule: str = "goodput"
    branches: int = 1

    def __post_init__(self) -> None:
        check("suffix", self.k, self.schedule, self.branches)
        if self.memory < 0:
            raise UserError(f"suffix: memory={self.memory} must not be negative")
        if self.depth < 2 or self.factor <= 0 or not 0 <= self.least <= 1:
            raise UserError(f"suffix: needs depth >= 2, factor > 0 and 0 <= least <= 1, not {self.depth}, {self.factor:g}, {self.least:g}")


class Node:
    """A substring: how often it occurred, and what followed it."""

    __slots__ = ("after", "count")

    def __init__(self) -> None:
        self.count = 0
        self.after: dict[int, Node] = {}


Match = list[Node]  # nodes of the suffixes of a sequence, by length from 1 on


class Tree:
    """Counts of all substrings of at most `depth` tokens."""

    def __init__(self, depth: int) -> None:
        self.depth, self.root = depth, Node()

    def grow(self, at: Match, token: int) -> Match:
        """Count a token after the sequence whose suffixes are `at`; the suffixes of the longer sequence."""
        out = []
        for node in [self.root, *at[: self.depth - 1]]:
            child = node.after.get(token)
            if child is None:
                child = node.after[token] = Node()
            child.count += 1
            out.append(child)
        return out

    def follow(self, at: Match, token: int) -> Match:
        """The same without counting: the suffixes of the longer sequence that occurred."""
        out = []
        for node in [self.root, *at[: self.depth - 1]]:
            child = node.after.get(token)
            if child is None:
                break  # a longer suffix that ends so has not occurred either
            out.append(child)
        return out

    def forget(self, tokens: Sequence[int]) -> None:
        """Undo the counting of a whole sequence."""
        for start in range(len(tokens)):
            node = self.root
            for token in tokens[start : start + self.depth]:
                child = node.after[token]
                child.count -= 1
                if not child.count:
                    del node.after[token]
                    break
                node = child


def continuation(at: Match, k: int, factor: float, least: float, open_end: int = 0) -> tuple[float, list[int]]:
    """The best proposal that follows one of the matching suffixes: (expected accepted tokens, tokens). Longer matches win ties.

    open_end: occurrences of the suffixes that nothing can have followed yet (1 in the tree that the sequence itself grows).
    """
    best: tuple[float, list[int]] = (0.0, [])
    for length, node in enumerate(at, 1):
        if node.after:
            found = _path(node, node.count - open_end, min(k, int(factor * length)), least)
            if found[0] >= best[0]:
                best = found
    return best


def _path(node: Node, count: int, most: int, least: float) -> tuple[float, list[int]]:
    """Down the most frequent children: (sum of the probabilities of getting so far, tokens)."""
    probability, score = 1.0, 0.0
    tokens: list[int] = []
    while node.after and len(tokens) < most:
        token, child = max(node.after.items(), key=lambda item: item[1].count)
        probability *= min(1.0, child.count / max(count, 1))
        if probability < least:
            break
        score += probability
        tokens.append(token)
        node, count = child, child.count
    return score, tokens


def branching(found: Sequence[Match], n: int, branches: int, factor: float, least: float) -> Proposal:
    """The n likeliest nodes after any suffix that matches in any tree, by falling probability; of each node the `branches` most frequent children.

    A match of m tokens is believed m / (m + 1), so that of what occurred once a longer match goes first and others still get their turn.
    """
    grown, tie = Growing(), itertools.count()
    heap: list[tuple[float, int, int, int, Node, int]] = []  # (- probability, tie, parent, token, node, how far from there)

    def push(parent: int, probability: float, node: Node, most: int) -> None:
        total = sum(child.count for child in node.after.values())
        for token, child in heapq.nlargest(branches, node.after.items(), key=lambda item: item[1].count) if most > 0 else ():
            p = probability * child.count / total
            if p >= least:
                heapq.heappush(heap, (-p, next(tie), parent, token, child, most - 1))

    for match in found:
        for length, node in reversed([*enumerate(match, 1)]):
            push(ROOT, length / (length + 1), node, int(factor * length))
    while heap and len(grown.tokens) < n:
        p, _, parent, token, node, most = heapq.heappop(heap)
        push(grown.add(parent, token), -p, node, most)
    return grown.tree()


class State:
    """What a row remembers: its own tree, and where its end stands in it."""

    def __init__(self, depth: int) -> None:
        self.tree = Tree(depth)
        self.at: Match = []
        self.seen = 0


class Suffix(Speculation):
    """Proposals from the request's own past and from answers given before."""

    def __init__(self, options: Options) -> None:
        super().__init__(options.k, options.schedule, options.branches)
        self.options = options
        self.shared = Tree(options.depth)
        self.kept: deque[tuple[int, ...]] = deque()
        self.held = 0
        self.waiting: deque[tuple[int, ...]] = deque()  # finished answers that nothing has been looked up in yet

    def draft(self, rows: Sequence[Row], lengths: Sequence[int]) -> list[Proposal]:
        while self.waiting and any(lengths):
            self._count(self.waiting.popleft())
        return [self._one(row, k) for row, k in zip(rows, lengths, strict=True)]

    def _one(self, row: Row, k: int) -> Proposal:
        o = self.options
        if k <= 0:
            return []
        state = row.decode_state
        if state is None:
            state = row.decode_state = State(o.depth)
        for token in row.tokens[state.seen :]:
            state.at = state.tree.grow(state.at, token)
        state.seen = len(row.tokens)
        if self.branching:
            others = [self._found(row.tokens)] if self.kept else []
            return branching([state.at, *others], k, self.branches, o.factor, o.least)
        own = continuation(state.at, k, o.factor, o.least, open_end=1)
        return max(own, continuation(self._found(row.tokens), k, o.factor, o.least))[1] if self.kept else own[1]

    def _found(self, tokens: list[int]) -> Match:
        at: Match = []
        for token in tokens[-self.options.depth :]:
            at = self.shared.follow(at, token)
        return at

    def finish(self, row: Row) -> None:
        """Remember a finished answer; it is counted when something is looked up, which may be never."""
        answer = tuple(row.tokens[row.prompt :])
        if 1 < len(answer) <= self.options.memory:
            self.waiting.append(answer)
            while sum(map(len, self.waiting)) > self.options.memory:
                self.waiting.popleft()

    def _count(self, answer: tuple[int, ...]) -> None:
        at: Match = []
        for token in answer:
            at = self.shared.grow(at, token)
        self.kept.append(answer)
        self.held += len(answer)
        while self.held > self.options.memory:
            old = self.kept.popleft()
            self.shared.forget(old)
            self.held -= len(old)


def build(options: Options, target: Any = None) -> Suffix:
    if options.branches > 1:
        check_trees("suffix: branches", target)
    return Suffix(options)
