"""Lookahead decoding (Fu et al. 2024, arXiv:2402.02057): the model itself guesses its next tokens, without a draft, in the pass that it makes
anyway.

A window of guesses for the next positions is refined as Jacobi iteration does it: every pass asks for the token after each of them at once. A
column of the window keeps its last `ngram` - 1 guesses, one position further each time, so that with the pass's own output they are an n-gram
that the model finds likely. N-grams go to a pool by their first token, and those that begin with the row's last token are checked in the same
pass. Window and n-grams are paths of one tree (`lm/tree.py`): what they share is computed once, and a guess of the window that comes true is
kept like any other. Verification is `coupled`, so the output is that of plain decoding.

It pays where passes of many positions cost little more than passes of one; where they do not, the schedule turns it off.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hasten import rng
from hasten.lm.decode.control import Constant, Speculation, Switch, check_trees
from hasten.lm.tree import Growing, Proposal, Tree
from hasten.values import UserError, did_you_mean

if TYPE_CHECKING:
    import torch

    from hasten.lm.scheduler import Row

SCHEDULES = ("goodput", "constant")
LEVEL = "window"  # the purpose part of a key: which known token fills a place of the window that nothing is known of


@dataclass(frozen=True)
class Options:
    """window: positions guessed ahead. ngram: tokens of an n-gram, the one it begins with included. guesses: n-grams checked in a pass, at most.

    prompt: whether n-grams of the prompt are in the pool from the start. schedule: goodput (off while it loses) or constant (always on).
    """

    window: int = 5
    ngram: int = 4
    guesses: int = 5
    prompt: bool = True
    schedule: str = "goodput"

    def __post_init__(self) -> None:
        if self.window < 1 or self.ngram < 2 or self.guesses < 0:
            raise UserError(
                f"lookahead: needs window >= 1, ngram >= 2 and guesses >= 0, not {self.window}, {self.ngram} and {self.guesses}"
            )
        if self.schedule not in SCHEDULES:
            raise UserError(f"lookahead: schedule={self.schedule!r}: no such schedule{did_you_mean(self.schedule, SCHEDULES)}")


class Pool:
    """N-grams by their first token: of each the `most` that were seen last."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.after: dict[int, dict[tuple[int, ...], None]] = {}

    def add(self, gram: Sequence[int]) -> None:
        rest = self.after.setdefault(gram[0], {})
        rest.pop(tuple(gram[1:]), None)
        rest[tuple(gram[1:])] = None
        if len(rest) > self.most:
            del rest[next(iter(rest))]

    def guesses(self, token: int) -> list[tuple[int, ...]]:
        """What may follow a token, the latest first."""
        return list(self.after.get(token, ()))[::-1]


@dataclass
class State:
    """What a row remembers. levels[l][i]: guess l of column i, for the position i + l + 1 after the row's last token. paths: the columns as they
    were tried in this pass.
    """

    pool: Pool
    levels: list[list[int]]
    paths: list[list[int]] = field(default_factory=list)


class Lookahead(Speculation):
    """Proposals from the model's own guesses."""

    def __init__(self, options: Options) -> None:
        deepest = options.window + options.ngram - 2
        super().__init__(deepest, "constant", branches=2)
        self.schedule = Switch(deepest) if options.schedule == "goodput" else Constant(deepest)
        self.options = options

    def draft(self, rows: Sequence[Row], lengths: Sequence[int]) -> list[Proposal]:
        return [self._one(row, k) for row, k in zip(rows, lengths, strict=True)]

    def _one(self, row: Row, k: int) -> Proposal:
        """The pool's guesses first, then the window, no path longer than k."""
        if k <= 0:
            if row.decode_state is not None:
                row.decode_state.paths = []
            return []
        state = row.decode_state = row.decode_state or self._begun(row)
        state.paths = [[*state.levels[0][: i + 1], *(level[i] for level in state.levels[1:])] for i in range(self.options.window)]
        grown = Growing()
        for path in [*state.pool.guesses(row.tokens[-1]), *state.paths]:
            grown.path(path[:k])
        return grown.tree()

    def _begun(self, row: Row) -> State:
        o, pool = self.options, Pool(self.options.guesses)
        for i in range(row.prompt - o.ngram + 1 if o.prompt else 0):
            pool.add(row.tokens[i : i + o.ngram])
        return State(pool, [self._filled(row, [])])

    def _filled(self, row: Row, level: list[int]) -> list[int]:
        """A level of the window's width; known tokens stand where nothing has been guessed."""
        n = len(row.tokens)
        return [*level, *(row.tokens[rng.integer(n, n, i, LEVEL)] for i in range(len(level), self.options.window))]

    def accept(self, row: Row, proposal: Proposal, chosen: Sequence[int], logits: torch.Tensor) -> list[int]:
        committed = super().accept(row, proposal, chosen, logits)
        state = row.decode_state
        if proposal and state is not None and state.paths:
            tree = proposal if isinstance(proposal, Tree) else Tree(tuple(proposal), tuple(range(-1, len(proposal) - 1)))
            self._learn(row, state, tree, chosen, len(committed))
        return committed

    def _learn(self, row: Row, state: State, tree: Tree, chosen: Sequence[int], steps: int) -> None:
        """Take in what the pass said after each column, and move the window on by the tokens committed."""
        o, new = self.options, []
        for i, path in enumerate(state.paths):
            nodes = tree.follow(path)
            known = len(nodes) == len(path)  # the constraint or the end of the room may have cut it
            new.append(chosen[nodes[-1] + 1] if known else path[-1])
            if known and len(state.levels) == o.ngram - 1:
                state.pool.add([*(level[i] for level in state.levels), new[-1]])
        levels = [*state.levels, new]
        past = max(0, len(levels) - (o.ngram - 1))  # the oldest level goes, which moves every column on by a position
        state.levels = [self._filled(row, level[steps - past :]) for level in levels[past:]]


def build(options: Options, target: Any = None) -> Lookahead:
    check_trees("lookahead", target)
    return Lookahead(options)
