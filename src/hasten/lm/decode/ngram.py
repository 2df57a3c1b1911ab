"""Prompt lookup: propose what followed the last time the same few tokens occurred in this request (Saxena 2023; vLLM's `ngram`).

No draft model and no training; it pays where answers repeat their prompt or themselves. Each row keeps an index from n-grams to where
they were last followed, extended by the new tokens only, so a proposal costs a few dictionary look-ups whatever the context's length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hasten.lm.decode.control import Speculation, check
from hasten.values import UserError

if TYPE_CHECKING:
    from hasten.lm.scheduler import Row


@dataclass(frozen=True)
class Options:
    """k: tokens proposed at most. longest, shortest: lengths of the suffix that is looked up, tried from the longest down.

    schedule: how many of k are proposed, goodput (as many as pay, none included), constant or heuristic.
    """

    k: int = 8
    longest: int = 4
    shortest: int = 2
    schedule: str = "goodput"

    def __post_init__(self) -> None:
        check("ngram", self.k, self.schedule)
        if not 1 <= self.shortest <= self.longest:
            raise UserError(f"ngram: needs 1 <= shortest <= longest, not shortest={self.shortest}, longest={self.longest}")


class Index:
    """Where each n-gram of a growing sequence was last followed by another token."""

    def __init__(self, longest: int, shortest: int) -> None:
        self.sizes = range(longest, shortest - 1, -1)
        self.after: dict[tuple[int, ...], int] = {}
        self.seen = 0

    def look_up(self, tokens: list[int], k: int) -> list[int]:
        """Extend the index by the tokens that are new, then give up to k tokens that followed the longest known suffix."""
        for end in range(max(self.seen, 1), len(tokens)):
            for n in self.sizes:
                if n <= end:
                    self.after[tuple(tokens[end - n : end])] = end
        self.seen = len(tokens)
        for n in self.sizes:
            at = self.after.get(tuple(tokens[-n:])) if n <= len(tokens) else None
            if at is not None:
                return tokens[at : at + k]
        return []


class Ngram(Speculation):
    """Proposals by prompt lookup."""

    def __init__(self, options: Options) -> None:
        super().__init__(options.k, options.schedule)
        self.options = options

    def draft(self, rows: Sequence[Row], lengths: Sequence[int]) -> list[list[int]]:
        return [self._one(row, k) for row, k in zip(rows, lengths, strict=True)]

    def _one(self, row: Row, k: int) -> list[int]:
        if k <= 0:
            return []
        if row.decode_state is None:
            row.decode_state = Index(self.options.longest, self.options.shortest)
        return row.decode_state.look_up(row.tokens, k)


def build(options: Options, target: Any = None) -> Ngram:
    return Ngram(options)
