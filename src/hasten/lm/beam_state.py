"""What the beam engine knows of one request."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hasten.lm.constrain.trie import Trie
from hasten.lm.constrain.trie_filter import Filter
from hasten.lm.constrain.trie_step import Beams
from hasten.lm.scheduler import Row
from hasten.values import Key, Request


@dataclass(eq=False)
class Tails:
    """What is left once few items are: each is a row that is scored to its end in one pass. tokens: of each item, those that no beam has yet.
    owned: of each beam, its items. most: beams that are kept from here on.
    """

    rows: list[Row]
    tokens: list[list[int]]
    owned: list[list[int]]
    most: int


@dataclass(eq=False)
class Search:
    """One request. rows: its beams, best first (one while the prompt is computed). ended: which of them have their whole answer.

    states: of a constraint that is no item set. pool: every row that it ever had, for the ledger.
    """

    key: Key
    request: Request
    rows: list[Row]
    beams: Beams
    ended: list[bool]
    states: list[Any]
    trie: Trie | None
    filters: list[Filter | None] | None
    pool: list[Row] = field(default_factory=list)
    passes: int = 0
    saved: int = 0
    tails: Tails | None = None

    @property
    def need(self) -> int:
        """Positions of its longest row."""
        return self.rows[0].prompt + self.rows[0].limit

    @property
    def going(self) -> list[int]:
        """Beams that take part in the next pass."""
        return [i for i, over in enumerate(self.ended) if not over]
