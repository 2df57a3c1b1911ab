"""Beam search (`hasten.lm.beam`): of each request the answers with the largest joint log-probability that a breadth-limited search finds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hasten.lm.decode import Decode
from hasten.values import UserError


@dataclass(frozen=True)
class Options:
    """width: beams of a request. forced: under `trie`, score the rest in one pass once about as many items as beams are left; same results.

    exact_tail: under `trie`, once so few items are left below a request's beams together, score all of them in one pass; nothing is pruned from
    there on, so it may find better items than beam search does (0: off).
    """

    width: int = 4
    forced: bool = True
    exact_tail: int = 0

    def __post_init__(self) -> None:
        if self.width < 1 or self.exact_tail < 0:
            raise UserError("beam: width must be at least 1, and exact_tail at least 0")


class Beam(Decode):
    """What a token engine is given; `load` builds the engine that it names."""

    def __init__(self, options: Options) -> None:
        self.options = options

    def engine(self, *args: Any, **kwargs: Any) -> Any:
        """The engine that searches; arguments of `TokenEngine`."""
        from hasten.lm.beam import BeamEngine

        return BeamEngine(*args, decode=self, **kwargs)


def exactness(options: Options) -> str:
    """Another answer than greedy decoding's, except with one beam."""
    return "identical" if options.width == 1 and not options.exact_tail else "approximate"


def build(options: Options, target: Any = None) -> Beam:
    return Beam(options)
