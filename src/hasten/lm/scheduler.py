"""Who computes how many tokens in the next step. There is no prefill mode: a row has known tokens that are not computed yet, many for a
new prompt, one while it decodes, and a step gives each row some of them.

Rows that decode come first, so a long prompt delays nobody; what is left of the step's budget goes to prompts in order of arrival. Rows
are admitted while the cache has room; when it runs out the youngest row steps back (its tokens are kept, its cache is given up) and
resumes later with the same result, since randomness is keyed by position. The oldest row always proceeds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from hasten.lm.cache import HEAD, Entry, RaggedCache, common_prefix
from hasten.lm.tree import Proposal, Tree, shaped
from hasten.usage import Cost
from hasten.values import Key, Request, TokenLogprob


@dataclass(eq=False, slots=True)
class Row:
    """One sample of one request on its way. `tokens` = prompt + generated; the first `entry.length` of them are in the cache."""

    key: Key
    request: Request
    sample: int
    tokens: list[int]
    prompt: int
    added: float
    order: int = 0
    entry: Entry | None = None
    constraint_state: Hashable = None
    decode_state: Any = None
    control: float | None = None  # what the schedule of proposals knows of this row
    logprobs: list[TokenLogprob] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    read: int | None = None  # the next prompt position whose output is asked for (scores, prompt_logprobs); None: none is
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    first: float = 0.0
    last: float = 0.0
    peak: int = 0
    preempted: int = 0
    # the ledger, summed up in place
    reused: int = 0
    forwards: int = 0
    flops: float = 0.0
    bytes: float = 0.0
    proposed: int = 0
    accepted: int = 0
    finish: str = ""
    stop: str | int | None = None  # the stop string or id that ended it
    text: str | None = None

    @property
    def generated(self) -> int:
        return len(self.tokens) - self.prompt

    @property
    def held(self) -> Entry:
        """The cache row of a running row."""
        assert self.entry is not None, "a row that works has its place in the cache"
        return self.entry

    @property
    def limit(self) -> int:
        """Tokens it may generate; the engine has put a number where the user left it open."""
        return 0 if self.request.score else self.request.sampling.max_tokens or 0

    @property
    def pending(self) -> int:
        """Known tokens that are not computed yet."""
        return len(self.tokens) - (self.entry.length if self.entry else 0)

    @property
    def needs(self) -> int:
        """Positions of cache this row needs next."""
        return len(self.tokens)

    def cost(self) -> Cost:
        return Cost(
            prompt=self.prompt, reused=self.reused, generated=self.generated, scored=len(self.scores), forwards=self.forwards,
            flops=self.flops, bytes=self.bytes, proposed=self.proposed, accepted=self.accepted,
        )  # fmt: skip


@dataclass(slots=True)
class Work:
    """What one row does in a step: compute tokens[start : start + n] and then `proposal` (the nodes of `tree`, or a chain); outputs at the last
    `outputs` positions.
    """

    row: Row
    start: int
    n: int
    proposal: list[int] = field(default_factory=list)
    states: list[Hashable] = field(default_factory=list)
    outputs: int = 0
    tree: Tree | None = None

    def take(self, proposal: Proposal) -> None:
        proposal = shaped(proposal)
        self.tree = proposal if isinstance(proposal, Tree) else None
        self.proposal = list(proposal.tokens) if isinstance(proposal, Tree) else proposal

    @property
    def offered(self) -> Proposal:
        """The proposal as its technique may ask for it."""
        return self.proposal if self.tree is None else self.tree

    @property
    def width(self) -> int:
        return self.n + len(self.proposal)


class Scheduler:
    """Waiting and running rows over one cache."""

    def __init__(self, cache: RaggedCache, *, max_rows: int, step_tokens: int, share: bool = True) -> None:
        self.cache, self.max_rows, self.step_tokens, self.share = cache, max_rows, step_tokens, share
        self.waiting: deque[Row] = deque()
        self.running: list[Row] = []  # in order of arrival
        self._arrivals = 0

    def add(self, row: Row) -> None:
        row.order = self._arrivals
        self._arrivals += 1
        self.waiting.append(row)

    def plan(self) -> list[Work]:
        """Admit what fits, then share out this step's tokens."""
        self._admit()
        budget, works = self.step_tokens, []
        for row in sorted(self.running, key=lambda r: (r.pending > 1, r.order)):
            n = min(row.pending, max(budget, 1 if row.pending == 1 else 0))
            if n > 0 and row.entry is not None and self._reserve(row, row.entry.length + n):
                works.append(Work(row, row.entry.length, n, outputs=_outputs(row, row.entry.length, n)))
                budget -= n
        return [w for w in works if w.row.entry is not None]  # some may have stepped back for an older row

    def extend(self, work: Work, extra: int) -> bool:
        """Room for `extra` proposed tokens after a row's own, without pushing anybody out."""
        return self.cache.reserve(work.start + work.n + extra)

    def finish(self, row: Row) -> None:
        """The row leaves; its cache stays as a source of prefixes."""
        if row.entry is not None:
            self.cache.release(row.entry, retain=self.share)
            row.entry = None
        if row in self.running:
            self.running.remove(row)
        elif row in self.waiting:
            self.waiting.remove(row)

    def _admit(self) -> None:
        """In order of arrival; a row that waits for another one's prefix lets later ones pass."""
        held: list[Row] = []
        if self.waiting and len(self.running) < self.max_rows:
            soon = list(islice(self.waiting, self.max_rows - len(self.running)))
            self.cache.expect(len(self.running) + len(soon), max(len(r.tokens) + r.limit - r.generated for r in soon))
        while self.waiting and len(self.running) < self.max_rows:
            row = self.waiting.popleft()
            source, have, coming = self._best_source(row)
            if coming > have and coming - have >= max(HEAD, len(row.tokens) // 4):
                held.append(row)
                continue
            entry = self.cache.fork(source, have, row.tokens, row.needs) if source else self.cache.allocate(row.tokens, row.needs)
            if entry is None:
                self.waiting.appendleft(row)
                break
            row.entry = entry
            if not row.preempted:  # what a row finds again after stepping back was paid for once already
                row.reused = min(have, row.prompt)
            self.running.append(row)
        self.running.sort(key=lambda r: r.order)
        self.waiting.extendleft(reversed(held))

    def _best_source(self, row: Row) -> tuple[Entry | None, int, int]:
        """(source, its computed positions that serve this row, positions that a running row will have computed soon)."""
        best, have, coming = None, 0, 0
        most = reusable(row)
        asked = row.request.parent is not None  # a parent's cache is asked for by name, whatever is shared otherwise
        for entry in self.cache.sources(row.tokens) if self.share or asked else ():
            n = min(common_prefix(entry.tokens, row.tokens), most)
            if n > have or (n == have and n and best and best.active and not entry.active):
                best, have = entry, n
            if entry.active and len(entry.planned) > entry.length:
                coming = max(coming, min(common_prefix(entry.planned, row.tokens), most))
        return best, have, coming

    def _reserve(self, row: Row, length: int) -> bool:
        """Room for one row to grow; the youngest of the others steps back when there is none."""
        while not self.cache.reserve(length):
            youngest = self.running[-1]
            if youngest is row and len(self.running) > 1 and self.running[0] is not row:
                self._step_back(row)
                return False
            if youngest is row:
                raise RuntimeError("a single row does not fit the cache: a bug, such requests are refused when they are added")
            self._step_back(youngest)
        return True

    def _step_back(self, row: Row) -> None:
        self.cache.release(row.held, retain=self.share)
        row.entry, row.preempted = None, row.preempted + 1
        self.running.remove(row)
        self.waiting.appendleft(row)


def reusable(row: Row) -> int:
    """How much of a row's known tokens may come from a cache: the last must be computed, and so must what is still to be read."""
    return min(len(row.tokens) - 1, len(row.tokens) if row.read is None else row.read)


def _outputs(row: Row, start: int, n: int) -> int:
    """At how many of the last positions of tokens[start : start + n] the model's output is needed."""
    last = int(start + n == len(row.tokens) and not row.request.score)
    return last if row.read is None else max(last, min(n, start + n - row.read), 0)
