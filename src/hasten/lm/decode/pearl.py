"""PEARL, parallel speculative decoding with adaptive draft length (Liu et al. 2024, arXiv:2408.11850), batched over rows.

Draft and target work at the same time, each on cores of its own. While the target reads the last confirmed token, the draft continues it by a
window of tokens, the first of which the target's output already judges (pre-verify). If it is kept, the target reads the rest of the window
next, while the draft goes on from its end as if all of it were kept (post-verify); the target's last output then judges the first token of the
new window, so there is never a bonus token. What is refused ends the run, and the draft starts again behind what took its place.

The released code reuses a random number that has decided already, which biases samples (it seeds by position, and two positions share a seed).
Here every position has numbers of its own for drafting, judging and what takes a refused token's place, and is judged once; so with `rejection`
too, a row's tokens depend neither on the window, nor on the batch, nor on a clock. With `coupled` they are plain decoding's own.

On a CPU the draft is a process bound to its own cores (`drafter`); the target may be on a GPU beside it, which has not been measured. The draft
sees no constraint: what it proposes against one is refused. Should its process end, decoding goes on without it.
"""

from __future__ import annotations

import itertools
import os
import time
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hasten import cpu, hf, rng, wire
from hasten.lm import sampler
from hasten.lm.cache import common_prefix
from hasten.lm.decode import Decode, coupled, verify
from hasten.lm.decode.control import Curve, Recent
from hasten.lm.decode.drafter import COMMAND, Drafter, Gone, Process, Told, law_of
from hasten.usage import Cost
from hasten.values import UserError, did_you_mean

if TYPE_CHECKING:
    from hasten.lm.scheduler import Row, Work
    from hasten.lm.tree import Proposal

MODES = ("coupled", "rejection")
FIRST = 4  # the window before anything was measured: the released code's


@dataclass(frozen=True)
class Options:
    """model: the draft, a directory, hub id or zoo:NAME with the target's tokenizer. window: tokens drafted while the target takes a step (0:
    the best by measured times and acceptance, which is the ratio of speeds where checking is free). most: that window at most. mode:
    coupled (plain decoding's own tokens) or rejection (its law, more is kept). cores: processor cores that the draft has for itself. device:
    what the draft runs on, cpu or cuda.
    """

    model: str = ""
    window: int = 0
    most: int = 16
    mode: str = "coupled"
    cores: int = 1
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise UserError(f"pearl: mode={self.mode!r}: no such mode{did_you_mean(self.mode, MODES)}")
        if self.window < 0 or self.most < 1 or self.cores < 1:
            raise UserError("pearl: needs window >= 0 (0: by what was measured), most >= 1 and cores >= 1")


def exactness(options: Options) -> str:
    """Coupled verification gives the same tokens, rejection the same law."""
    return "identical" if options.mode == "coupled" else "distribution"


def cores(options: Options) -> int:
    """Cores that the target cannot have."""
    return options.cores


def why_not(options: Options, target: Any = None) -> str | None:
    """A sentence where there are too few cores for two models at the same time, or the draft's tokens are not the target's."""
    there = min(cpu.topology().cores, cpu.topology().most)
    if there <= options.cores:
        has = "a single core" if there == 1 else f"{there} cores"
        return f"draft and target work at the same time, which needs {options.cores + 1} cores, and this process may use {has}"
    if target is None or not options.model:
        return None
    mine, theirs = target.tokenizer, hf.load_tokenizer(hf.resolve(options.model))
    if mine is not None and theirs is not None and mine.get_vocab() != theirs.get_vocab():
        return f"{options.model} has another tokenizer than the target: use draft, which translates"
    return None


# --- one row: the state machine -------------------------------------------------------------------------------------------------------------


@dataclass
class Lane:
    """What was drafted for a row and is not judged yet: `rest` of the last window (empty: pre-verify), then `window`, drafted in this step.

    p: probability of each of both, where they were drawn. told: the text that the drafter has, of which `sure` ids are confirmed.
    """

    number: int = -1  # the drafter's name of the row; -1: it has none
    rest: list[int] = field(default_factory=list)
    window: list[int] = field(default_factory=list)
    p: list[float] = field(default_factory=list)
    told: list[int] = field(default_factory=list)
    sure: int = 0
    cost: Cost = field(default_factory=Cost)

    @property
    def assumed(self) -> list[int]:
        return self.rest + self.window

    def tell(self, tokens: list[int], wanted: int) -> Told:
        """What the drafter is told so that it has `tokens` and what is assumed after them, and drafts so many."""
        text = tokens + self.rest
        hold = self.sure + common_prefix(self.told[self.sure :], text[self.sure :])
        self.told, self.sure = text, len(tokens)
        return self.number, self.sure, hold, text[hold:], wanted

    def drafted(self, ids: list[int], p: Sequence[float]) -> None:
        """A new window has come."""
        self.window, self.p = ids, [*self.p, *p]
        self.told = self.told + ids

    def settle(self, committed: Sequence[int]) -> None:
        """So much was committed. While it is what was assumed, the rest of that is what the target reads next; else all of it is void."""
        assumed, n = self.assumed, len(committed)
        right = list(committed) == assumed[:n]
        self.rest, self.window, self.p = (assumed[n:] if right else []), [], (self.p[n:] if right else [])


# --- the window -----------------------------------------------------------------------------------------------------------------------------


class Window:
    """How many tokens to draft in a step: the number at which a refusal costs the fewest seconds, by what was measured.

    After each refusal comes one pre-verify and, with acceptance a and a window of k, a / (1 - a^k) post-verifies on average (the state machine's
    count); each takes as long as the slower of the two sides. Where checking more positions costs nothing, the best is the ratio of speeds, as
    theorem 1 has it.
    """

    FEWEST = 3  # measurements of a step before its length counts: the first ones are slow

    def __init__(self, fixed: int, most: int) -> None:
        self.fixed, self.most = fixed, most
        self.acceptance = 0.8
        self.draft: dict[int, Recent] = {}  # seconds of one drafted position, by rows
        self.target: dict[int, Recent] = {}  # seconds of a step of the target, by positions

    def length(self, rows: int) -> int:
        steps = {n: recent for n, recent in self.target.items() if len(recent.last) >= self.FEWEST}
        if self.fixed or rows not in self.draft or not steps:
            return self.fixed or min(FIRST, self.most)
        a, k, step = min(self.acceptance, 0.99), np.arange(1, self.most + 1), line(steps)
        drafting = k * self.draft[rows].value
        seconds = np.maximum(drafting, step(rows + 0 * k)) + a / (1 - a**k) * np.maximum(drafting, step(rows * k))
        return int(k[seconds.argmin()])

    def timed(self, rows: int, positions: int, passes: int, drafting: float, target: float) -> None:
        """Seconds of a step in which every row decoded."""
        self.target.setdefault(positions, Recent()).add(target)
        if passes:
            self.draft.setdefault(rows, Recent()).add(drafting / passes)

    def judged(self, kept: int, refused: int) -> None:
        for good in [1.0] * kept + [0.0] * refused:
            self.acceptance += 0.02 * (good - self.acceptance)


def line(steps: Mapping[int, Recent]) -> Callable[[np.ndarray], np.ndarray]:
    """Seconds by positions: the straight line through what was measured (least squares), never falling."""
    x, y = np.array([*steps]), np.array([recent.value for recent in steps.values()])
    apart = x - x.mean()
    slope = max(0.0, apart @ y / (apart @ apart)) if len(x) > 1 else Curve.SLOPE * y[0]
    return lambda n: np.maximum(y.mean() + slope * (n - x.mean()), 0.0)


# --- all rows -------------------------------------------------------------------------------------------------------------------------------


class Pearl(Decode):
    """Lanes for all rows and one drafter for all lanes. start: makes the drafter, given the rows there are at most. others: the processors that
    are not the draft's (none: nobody is bound)."""

    def __init__(self, options: Options, start: Callable[[int], Drafter], others: frozenset[int] = frozenset()) -> None:
        self.options, self.start, self.others = options, start, others
        self.drafter: Drafter | None = None
        self.window = Window(options.window, options.most)
        self.iterations = self.kept = self.refused = 0  # steps of a row that decodes; drafted tokens that were judged
        self._numbers = itertools.count()
        self._asked: list[Lane] = []
        self._sent = 0.0
        self._affinity: set[int] | None = None

    def bind(self, engine: Any) -> None:
        self.engine, self.drafter = engine, self.start(engine.scheduler.max_rows)
        self._end = weakref.finalize(self, self.drafter.close)  # at the latest when this is forgotten, or Python ends

    def close(self) -> None:
        self._end()
        self.drafter, self._asked = None, []

    def processor_seconds(self) -> float:
        return self.drafter.processor_seconds() if self.drafter else 0.0

    # --- asking ----------------------------------------------------------------------------------------------------------------------------

    def planned(self, works: Sequence[Work]) -> None:
        """Tell the drafter what every row of this step is assumed to be, and have it go on from there while the target computes."""
        self._collect()  # of a step that did not come to its end
        mine = [w for w in works if not w.row.request.score and w.row.limit]
        self._plain = bool(mine) and all(w.n == 1 for w in works)
        if self.drafter is None or not mine:
            return
        length = self.window.length(len(mine))
        try:
            asks = [(self._lane(w.row), *ask) for w in mine if (ask := self._ask(w, length))]
        except Gone as gone:
            self._alone(gone)
            return
        if not asks:
            return
        self._say(do="go_on", rows=[lane.tell(tokens, wanted) for lane, tokens, wanted in asks])
        self._asked, self._rows = [lane for lane, *_ in asks], len(mine)
        self._apart()
        self._sent = time.perf_counter()

    def _ask(self, work: Work, length: int) -> tuple[list[int], int] | None:
        """The tokens of a row that the drafter shall have, and how many more (none while the target still reads the prompt); None at its end."""
        row, end = work.row, work.start + work.n
        if end < len(row.tokens):
            return row.tokens[:end], 0
        rest = len(row.decode_state.rest) if row.decode_state else 0
        left = min(row.limit - row.generated, self.engine.cache.max_len - len(row.tokens)) - rest
        wanted = min(length, left - (self.options.mode == "coupled"))
        return (row.tokens, wanted) if wanted > 0 else None

    def _lane(self, row: Row) -> Lane:
        """The row's; the drafter is told of it when it is new."""
        lane = row.decode_state = row.decode_state or Lane()
        if lane.number < 0:
            lane.number = next(self._numbers)
            self._say(do="open", row=lane.number, sampling=wire.dump(row.request.sampling), sample=row.sample, prompt=row.prompt)
            self._hear()
        return lane

    def propose(self, rows: Sequence[Row], room: Sequence[int]) -> list[list[int]]:
        return [row.decode_state.rest[: max(0, n)] if row.decode_state else [] for row, n in zip(rows, room, strict=True)]

    # --- judging ---------------------------------------------------------------------------------------------------------------------------

    def accept(self, row: Row, proposal: Proposal, chosen: Sequence[int], logits: torch.Tensor) -> list[int]:
        self._collect()
        lane = row.decode_state = row.decode_state or Lane()
        assumed = lane.assumed[: len(proposal) + 1]
        committed = coupled(proposal, chosen) if self.options.mode == "coupled" else self._rejection(row, assumed, logits)
        kept = common_prefix(committed, assumed)
        self.kept, self.refused, self.iterations = self.kept + kept, self.refused + (kept < len(assumed)), self.iterations + 1
        self.window.judged(kept, int(kept < len(assumed)))
        lane.settle(committed)
        if self.drafter is None:
            lane.rest = []
        return committed

    def _rejection(self, row: Row, assumed: list[int], logits: torch.Tensor) -> list[int]:
        """Judge what was assumed, position by position; a token drawn from the target where nothing was, or nobody is left who knows its law."""
        lane, q = row.decode_state, sampler.laws(logits, [row.request.sampling] * len(logits))
        if self.drafter is None:
            return [verify.drawn(q[0], self._uniform(row, verify.AFTER, 0))]
        for i, token in enumerate(assumed):
            if not verify.accepts(lane.p[i], float(q[i, token]), self._uniform(row, verify.ACCEPT, i)):
                return [*assumed[:i], verify.instead(token, self._law(row, i), q[i], self._uniform(row, verify.AFTER, i))]
        return assumed + [verify.drawn(q[i], self._uniform(row, verify.AFTER, i)) for i in range(len(assumed), len(q))]

    def _uniform(self, row: Row, purpose: int, i: int) -> float:
        """The number of a position: i after the row's end."""
        return rng.uniform(row.request.sampling.seed, row.sample, len(row.tokens) + i, purpose)

    def _law(self, row: Row, i: int) -> torch.Tensor | None:
        """What the i-th assumed token was drawn from; None where it was certain, or the drafter ends just now: that one token cannot be exact."""
        lane: Lane = row.decode_state
        if lane.p[i] == 1:
            return None
        try:
            self._say(do="law", row=lane.number, position=len(row.tokens) + i)
            return law_of(self._hear())
        except Gone as gone:
            self._alone(gone)
            return None

    # --- the drafter -----------------------------------------------------------------------------------------------------------------------

    def _say(self, **message: Any) -> None:
        if self.drafter is not None:
            self.drafter.send(message)

    def _hear(self) -> dict[str, Any]:
        if self.drafter is None:
            raise Gone("closed")
        return self.drafter.receive()

    def _collect(self) -> None:
        """Wait until what was asked for is there: the barrier at which both sides meet."""
        if not self._asked:
            return
        lanes, self._asked, taken = self._asked, [], time.perf_counter() - self._sent
        try:
            said = self._hear()
        except Gone as gone:
            self._alone(gone)
            return
        finally:
            self._together()
        for lane, ids, p in zip(lanes, said["drafted"], said.get("p", itertools.repeat(())), strict=False):
            lane.drafted(ids, p)
        if self._plain:
            self.window.timed(self._rows, sum(len(lane.rest) + 1 for lane in lanes), said["passes"], said["seconds"], taken)

    def _alone(self, gone: Gone) -> None:
        """The drafter has ended: go on without."""
        self.close()
        warnings.warn(f"pearl: {gone}; decoding goes on without a draft", RuntimeWarning, stacklevel=2)

    def finish(self, row: Row) -> None:
        self._collect()
        lane = row.decode_state
        if lane is None or lane.number < 0 or self.drafter is None:
            return
        try:
            self._say(do="close", row=lane.number)
            prompt, reused, generated, forwards, flops, nbytes = self._hear()["cost"]
        except Gone as gone:
            self._alone(gone)
            return
        lane.number, lane.cost = -1, Cost(prompt, reused, generated, 0, forwards, flops, nbytes)

    def costs(self, row: Row) -> Mapping[str, Cost]:
        return {"draft": row.decode_state.cost if row.decode_state else Cost()}

    def _apart(self) -> None:
        """Keep this thread off the draft's cores while the draft works."""
        if self.others:
            self._affinity = os.sched_getaffinity(0)
            os.sched_setaffinity(0, self.others & self._affinity or self.others)

    def _together(self) -> None:
        if self._affinity is not None:
            os.sched_setaffinity(0, self._affinity)
            self._affinity = None


def build(options: Options, target: Any) -> Pearl:
    if not options.model:
        raise UserError("pearl needs a draft model: pearl(model=MODEL)")
    every = [core for node in cpu.topology().nodes for core in node]
    mine, others = every[-options.cores :], frozenset(number for core in every[: -options.cores] for number in core)
    bound = hasattr(os, "sched_setaffinity")
    setup = {
        "model": hf.resolve(options.model), "processors": [core[0] for core in mine] if bound else [], "threads": options.cores,
        "device": options.device, "vocabulary": target.vocabulary, "mode": options.mode, "ends": target.end_ids,
    }  # fmt: skip
    return Pearl(options, lambda rows: started({**setup, "max_rows": rows}), others if bound else frozenset())


def started(setup: Mapping[str, Any], command: Sequence[str] = COMMAND) -> Process:
    """A drafter's process that is ready. UserError where it cannot be."""
    process = Process(setup, command)
    process.ready()
    return process
