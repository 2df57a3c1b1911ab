"""Prompt lookup: propose what followed the last time the same few tokens occurred in this request (Saxena 2023; vLLM's `ngram`).

No draft model and no training; it pays where answers repeat their prompt or themselves. Each row keeps an index from n-grams to where
they were last followed, extended by the new tokens only, so a proposal costs a few dictionary look-ups whatever the context's length.

With `branches` above 1 what followed several occurrences is tried at once, as a tree in which the latest goes deepest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from hasten.lm.decode.control import Speculation, check, check_trees
from hasten.lm.tree import Growing, Proposal
from hasten.values import UserError

if TYPE_CHECKING:
    from hasten.lm.scheduler import Row


@dataclass(frozen=True)
class Options:
    """k: tokens proposed at most. longest, shortest: lengths of the suffix that is looked up, tried from the longest down.

    schedule: how many of k are proposed, goodput (as many as pay, none included), constant or heuristic. branches: occurrences whose
    continuations are tried at once, k tokens in all (1: the last one's).
    """

    k: int = 8
    longest: int = 4
    shortest: int = 2
    schedule: str = "goodput"
    branches: int = 1

    def __post_init__(self) -> None:
        check("ngram", self.k, self.schedule, self.branches)
        if not 1 <= self.shortest <= self.longest:
            raise UserError(f"ngram: needs 1 <= shortest <= longest, not shortest={self.shortest}, longest={self.longest}")


BEHIND = 4  # a token of an earlier occurrence's continuation is tried where this many later ones of the next occurrence's are


class Index:
    """Where each n-gram of a growing sequence was last followed by another token, and where before that."""

    def __init__(self, longest: int, shortest: int) -> None:
        self.sizes = range(longest, shortest - 1, -1)
        self.after: dict[tuple[int, ...], int] = {}
        self.before: dict[tuple[int, int], int] = {}  # (length of an n-gram, where it was followed) -> where it was the time before
        self.seen = 0

    def grow(self, tokens: list[int]) -> None:
        """Extend the index by the tokens that are new."""
        for end in range(max(self.seen, 1), len(tokens)):
            for n in self.sizes:
                if n <= end:
                    gram = tuple(tokens[end - n : end])
                    if gram in self.after:
                        self.before[n, end] = self.after[gram]
                    self.after[gram] = end
        self.seen = len(tokens)

    def look_up(self, tokens: list[int], k: int) -> list[int]:
        """Up to k tokens that followed the longest known suffix the last time."""
        at = next(self._places(tokens), None)
        return [] if at is None else tokens[at : at + k]

    def branches(self, tokens: list[int], k: int, count: int) -> Proposal:
        """The same of up to `count` occurrences that went on differently, those of longer suffixes first, as a tree of k nodes."""
        paths: list[list[int]] = []
        for at in islice(self._places(tokens), 4 * count):
            if tokens[at : at + k] not in paths and len(paths) < count:
                paths.append(tokens[at : at + k])
        grown = Growing()
        for _, which, depth in sorted((d + BEHIND * i, i, d) for i, path in enumerate(paths) for d in range(len(path))):
            grown.path(paths[which][: depth + 1])
            if len(grown.tokens) == k:
                break
        return grown.tree()

    def _places(self, tokens: list[int]) -> Iterator[int]:
        """Where what followed the longest known suffix begins, the latest first; then shorter suffixes."""
        for n in self.sizes:
            at = self.after.get(tuple(tokens[-n:])) if n <= len(tokens) else None
            while at is not None:
                yield at
                at = self.before.get((n, at))


class Ngram(Speculation):
    """Proposals by prompt lookup."""

    def __init__(self, options: Options) -> None:
        super().__init__(options.k, options.schedule, options.branches)
        self.options = options

    def draft(self, rows: Sequence[Row], lengths: Sequence[int]) -> list[Proposal]:
        return [self._one(row, k) for row, k in zip(rows, lengths, strict=True)]

    def _one(self, row: Row, k: int) -> Proposal:
        if k <= 0:
            return []
        if row.decode_state is None:
            row.decode_state = Index(self.options.longest, self.options.shortest)
        index: Index = row.decode_state
        index.grow(row.tokens)
        return index.branches(row.tokens, k, self.branches) if self.branching else index.look_up(row.tokens, k)


def build(options: Options, target: Any = None) -> Ngram:
    if options.branches > 1:
        check_trees("ngram: branches", target)
    return Ngram(options)
