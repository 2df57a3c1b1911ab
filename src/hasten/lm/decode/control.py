"""How many tokens to propose: the length that brings the most tokens a second, by what was measured, none included.

Goodput (Liu et al. 2024, SmartSpec/TurboSpec, arXiv:2406.14066): expected tokens of a step over its expected seconds. Tokens come from how
often a proposal's i-th token was kept when those before it were; seconds from how long steps of so many positions took and what proposing
costs. Proposed tokens are taken by falling probability of being kept, over all rows, for as long as goodput rises: a row that agrees with its
draft gets more than one that does not, and in a large batch all get none. While none is best, a short proposal is tried now and then, ever
more rarely while it loses, so that speculation comes back when it pays. Only speed depends on the clock; with `coupled` verification the
output does not.

Where a technique can branch, what a tree brings is measured apart from what chains bring (`Trees`): how often its i-th node was on the path
that was kept, and how long steps with trees took. The better of the two is proposed (`Either`), the other tried now and then.

For comparison: `constant`, and transformers' `heuristic` (two more after a proposal kept whole, else one less).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import accumulate
from statistics import median
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from hasten.lm.decode import Decode, coupled
from hasten.lm.tree import Proposal, Tree, shaped
from hasten.values import UserError, did_you_mean

if TYPE_CHECKING:
    import torch

    from hasten.lm.scheduler import Row

SCHEDULES = ("goodput", "constant", "heuristic")
MARGIN = 1.02  # goodput of a proposal over that of none before it is worth it
FIRST_PAUSE, LAST_PAUSE = 8, 512  # steps between trials while none is best
RECHECK = 8  # steps that a choice of lengths is kept while no proposal is judged: nothing more is known then but the clock
TRIAL = 4  # nodes of a tree that is tried


class Schedule(Protocol):
    """doubt: steps with trees are known to cost several times as much as others, and not worth an early trial. lengths: tokens each row may
    propose now. kept: so many of a row's proposed tokens were committed. walked: these nodes of its tree were.
    timed: see `Decode`; branching: whether a tree was among what was proposed, None if nothing was.
    """

    def doubt(self) -> None: ...

    def lengths(self, rows: Sequence[Row], room: Sequence[int]) -> list[int]: ...

    def kept(self, row: Row, proposed: int, kept: int) -> None: ...

    def walked(self, row: Row, tree: Tree, path: Sequence[int]) -> None: ...

    def timed(self, positions: int, proposing: float, rest: float, branching: bool | None = None) -> None: ...


class Constant:
    """Always k."""

    def __init__(self, k: int) -> None:
        self.k = k

    def doubt(self) -> None:
        pass

    def lengths(self, rows: Sequence[Row], room: Sequence[int]) -> list[int]:
        return [max(0, min(self.k, most)) for most in room]

    def kept(self, row: Row, proposed: int, kept: int) -> None:
        pass

    def walked(self, row: Row, tree: Tree, path: Sequence[int]) -> None:
        self.kept(row, tree.depth, len(path))

    def timed(self, positions: int, proposing: float, rest: float, branching: bool | None = None) -> None:
        pass


class Heuristic(Constant):
    """Starts at k; each row has two more after a proposal that was kept whole, else one less, at least one."""

    def lengths(self, rows: Sequence[Row], room: Sequence[int]) -> list[int]:
        return [max(0, min(int(row.control or self.k), most)) for row, most in zip(rows, room, strict=True)]

    def kept(self, row: Row, proposed: int, kept: int) -> None:
        if proposed:
            now = int(row.control or self.k)
            row.control = now + 2 if kept == proposed else max(1, now - 1)


class Goodput:
    """k at most. drafting: whether proposed tokens cost a pass of a draft model (else proposing is a look-up, paid for anyway), for each `wide`
    of them.
    """

    def __init__(self, k: int, drafting: bool, wide: int = 1) -> None:
        self.k, self.drafting, self.wide = k, drafting, wide
        self.steps = Curve()
        self.draft = Recent()  # seconds of one drafted position of all rows
        self.rates = np.full(max(k, 1), 0.7)  # of keeping the i-th token when those before it were kept
        self.tried = np.zeros(max(k, 1), int)
        self.reach = 2  # tokens proposed at most: doubled when as many have been kept, so that little is lost where nothing is
        self.pause, self.waited = FIRST_PAUSE, 0
        self.asked = 0  # passes of the draft for this step
        self.age, self.chosen = 0, list[int]()  # steps since lengths were chosen

    def doubt(self) -> None:
        pass

    def lengths(self, rows: Sequence[Row], room: Sequence[int]) -> list[int]:
        most = [max(0, min(self.k, self.reach, n)) for n in room]
        if self.age % RECHECK == 0 or len(self.chosen) != len(rows):
            self.age, self.chosen = 0, self.best(rows, most)[1]
        self.age += len(rows) in self.steps.known
        found = [min(n, m) for n, m in zip(self.chosen, most, strict=True)]
        if any(found):
            self.waited, self.pause = 0, FIRST_PAUSE
        elif any(most) and len(rows) in self.steps.known:
            self.waited += 1
            if self.waited >= self.pause:
                found = [min(2, n) for n in most]
        self.asked = -(-max(found, default=0) // self.wide)
        return found

    def best(self, rows: Sequence[Row], most: Sequence[int]) -> tuple[float, list[int]]:
        """The greatest goodput that is expected, and the lengths that bring it."""
        longest = max(most, default=0)
        if not longest or len(rows) not in self.steps.known:  # a plain step first: nothing can be compared without it
            return 0.0, [0] * len(rows)
        if len(rows) == 1:
            return self._alone(rows, longest)
        alive = self._alive(rows, longest)
        alive[np.arange(longest)[None] >= np.array(most)[:, None]] = 0
        order = np.argsort(-alive, axis=None, kind="stable")
        order = order[: int((alive > 0).sum())]
        tokens = len(rows) + np.concatenate([[0.0], alive.ravel()[order].cumsum()])
        depth = np.concatenate([[0], np.maximum.accumulate(order % longest) // self.wide + 1])
        seconds = self.steps.at(len(rows) + np.arange(len(tokens))) + depth * (self.draft.value if self.drafting else 0.0)
        worth = tokens / seconds
        best = int(worth.argmax())
        if worth[best] < MARGIN * worth[0]:
            return float(worth[0]), [0] * len(rows)
        return float(worth[best]), np.bincount(order[:best] // longest, minlength=len(rows)).tolist()

    def _alone(self, rows: Sequence[Row], longest: int) -> tuple[float, list[int]]:
        """The same for one row: with few numbers, NumPy's calls would cost more than a small model's pass."""
        draft = self.draft.value if self.drafting else 0.0
        seconds = self.steps.one_by_one(1, longest + 2)
        plain = best = 1.0 / seconds[0]
        tokens, length = 1.0, 0
        for i, p in enumerate(self._alive(rows, longest)[0].tolist()):
            tokens += p
            worth = tokens / (seconds[i + 1] + (i // self.wide + 1) * draft)
            if worth > best and worth >= MARGIN * plain:
                best, length = worth, i + 1
        return best, [length]

    def _alive(self, rows: Sequence[Row], longest: int) -> np.ndarray:
        """[rows, longest]: how probable it is that a row's i-th token is kept."""
        own = np.array([self.rates.mean() if row.control is None else row.control for row in rows])
        return np.cumprod(0.5 * (own[:, None] + self.rates[None, :longest]), 1)

    def kept(self, row: Row, proposed: int, kept: int) -> None:
        if proposed and self.waited >= self.pause:  # the trial has taken place
            self.waited, self.pause = 0, min(2 * self.pause, LAST_PAUSE)
        self.age = self.age if not proposed else 0
        if proposed == kept >= self.reach:
            self.reach *= 2
        for i in range(min(proposed, kept + 1, self.k)):
            good = float(i < kept)
            self.tried[i] += 1
            self.rates[i] += max(0.05, 1 / (2 + self.tried[i])) * (good - self.rates[i])
            row.control = float(self.rates[i]) if row.control is None else row.control + 0.15 * (good - row.control)

    def walked(self, row: Row, tree: Tree, path: Sequence[int]) -> None:
        raise NotImplementedError("a schedule of chains was given a tree")

    def timed(self, positions: int, proposing: float, rest: float, branching: bool | None = None) -> None:
        self.steps.add(positions, rest)
        if self.drafting and self.asked:
            self.draft.add(proposing / self.asked)


class Trees(Goodput):
    """Goodput of trees whose nodes come by falling probability: the i-th node's rate of being kept does not depend on how many follow it."""

    def __init__(self, k: int, drafting: bool, wide: int = 1) -> None:
        super().__init__(k, drafting, wide)
        self.reached = 0.5 * 0.9 ** np.arange(max(k, 1))

    def _alive(self, rows: Sequence[Row], longest: int) -> np.ndarray:
        return np.tile(np.minimum.accumulate(self.reached[:longest]), (len(rows), 1))

    def walked(self, row: Row, tree: Tree, path: Sequence[int]) -> None:
        n = min(len(tree), self.k)
        good = np.isin(np.arange(n), path)
        self.reached[:n] += 0.05 * (good - self.reached[:n])


class Either:
    """Chains or trees, by the goodput that is expected of each; `branching` says which it is now."""

    def __init__(self, k: int, drafting: bool, wide: int = 1) -> None:
        self.chains, self.trees = Goodput(k, drafting), Trees(k, drafting, wide)
        self.pause, self.waited = FIRST_PAUSE, 0
        self.trees.draft = self.chains.draft
        self.branching = self.measured = False
        self.bar, self.brought = 0.0, 0  # tokens a second that chains promise, and the tokens of this step

    def doubt(self) -> None:
        self.pause = LAST_PAUSE

    def lengths(self, rows: Sequence[Row], room: Sequence[int]) -> list[int]:
        if not self.measured and self.waited + 1 < self.pause:  # nothing to weigh yet
            self.waited += 1
            self.branching = False
            return self.chains.lengths(rows, room)
        most = [max(0, min(self.trees.k, n)) for n in room]
        (chain, _), (tree, found) = self.chains.best(rows, most), self.trees.best(rows, most)
        self.bar, self.brought = chain, len(rows)
        if tree > MARGIN * chain and self.measured:
            self.waited, self.pause = 0, FIRST_PAUSE
        elif chain > 0:
            self.waited += 1
            found = [max(n, min(TRIAL, m)) for n, m in zip(found, most, strict=True)]
        self.branching = chain > 0 and (self.waited == 0 or self.waited >= self.pause)
        self.trees.asked = -(-max(found, default=0) // self.trees.wide)
        return found if self.branching else self.chains.lengths(rows, room)

    def kept(self, row: Row, proposed: int, kept: int) -> None:
        self.brought += kept
        self.chains.kept(row, proposed, kept)

    def walked(self, row: Row, tree: Tree, path: Sequence[int]) -> None:
        self.brought += len(path)
        self.trees.walked(row, tree, path)

    def timed(self, positions: int, proposing: float, rest: float, branching: bool | None = None) -> None:
        if not branching:
            self.chains.timed(positions, proposing, rest)
        self.measured = self.measured or bool(branching)
        if self.waited >= self.pause and branching is not None:  # a trial has taken place
            better = self.brought > self.bar * (proposing + rest)
            self.waited = 0
            self.pause = FIRST_PAUSE if better else min(2 * self.pause, LAST_PAUSE)
        if branching is not False:
            self.trees.timed(positions, proposing, rest)


class Switch(Constant):
    """All of a proposal or nothing, for what must run for a while before it proposes anything good: on while tokens come faster so.

    While it loses it is tried again, for RUN steps unless it turns out hopeless before, ever more rarely.
    """

    RUN, FIRST, LAST = 16, 128, 4096  # steps of a trial; steps between trials, at first and at most
    HOPE = 1.0  # tokens a step that a trial may still be short of

    def __init__(self, k: int) -> None:
        super().__init__(k)
        self.seconds: dict[tuple[int, bool], Recent] = {}  # of a step, by rows and whether it was on
        self.gained = 1.0  # tokens kept a row and step
        self.left, self.waited, self.pause = self.RUN, 0, self.FIRST
        self.rows, self.guess = 0, 1.0

    def doubt(self) -> None:
        self.guess, self.pause = 0.0, self.LAST

    def lengths(self, rows: Sequence[Row], room: Sequence[int]) -> list[int]:
        self.rows = len(rows)
        return super().lengths(rows, room) if self._on() else [0] * len(rows)

    def _on(self) -> bool:
        off, on = (self.seconds.get((self.rows, x)) for x in (False, True))
        if off is None:  # a plain step first: nothing can be compared without it
            return False
        worth = off.value / on.value if on else self.guess  # of a token in a step that is on, in tokens of one that is off
        if (1 + self.gained) * worth > MARGIN:
            self.waited, self.pause = 0, self.FIRST
            return True
        self.left = self.left - 1 if (1 + self.gained + self.HOPE) * worth > 1 else 0
        if self.left > 0:
            return True
        self.waited += 1
        if self.waited < self.pause:
            return False
        self.left, self.waited, self.pause = self.RUN, 0, min(2 * self.pause, self.LAST)
        return True

    def kept(self, row: Row, proposed: int, kept: int) -> None:
        if proposed:
            self.gained += 0.1 / max(self.rows, 1) * (kept - self.gained)

    def walked(self, row: Row, tree: Tree, path: Sequence[int]) -> None:
        self.kept(row, len(tree), len(path))

    def timed(self, positions: int, proposing: float, rest: float, branching: bool | None = None) -> None:
        self.seconds.setdefault((self.rows, branching is not None), Recent()).add(proposing + rest)


class Recent:
    """The median of the last measurements."""

    def __init__(self) -> None:
        self.last: deque[float] = deque(maxlen=7)
        self.value = 0.0

    def add(self, seconds: float) -> None:
        self.last.append(seconds)
        self.value = median(self.last)


class Curve:
    """Seconds of a step by its positions: measured ones, straight lines between them, and beyond them a slope of a twentieth a position."""

    SLOPE = 0.05

    def __init__(self) -> None:
        self.known: dict[int, Recent] = {}

    def add(self, positions: int, seconds: float) -> None:
        self.known.setdefault(positions, Recent()).add(seconds)

    def one_by_one(self, first: int, stop: int) -> list[float]:
        """Seconds of steps of first, first + 1, ... stop - 1 positions, as `at` gives them."""
        xs = sorted(self.known)
        ys = list(accumulate((self.known[x].value for x in xs), max))
        slope = (ys[-1] - ys[0]) / (xs[-1] - xs[0]) if len(xs) > 1 else self.SLOPE * ys[0]
        out, i = [], 0
        for x in range(first, stop):
            while i < len(xs) and xs[i] < x:
                i += 1
            if i == len(xs):
                out.append(ys[-1] + (x - xs[-1]) * slope)
            elif i == 0 or xs[i] == x:
                out.append(ys[i])
            else:
                out.append(ys[i - 1] + (ys[i] - ys[i - 1]) * (x - xs[i - 1]) / (xs[i] - xs[i - 1]))
        return out

    def at(self, positions: np.ndarray) -> np.ndarray:
        """[N] -> seconds [N]; ones where nothing is known. Never falls with more positions."""
        if not self.known:
            return np.ones(len(positions))
        xs = sorted(self.known)
        ys = np.maximum.accumulate([self.known[x].value for x in xs])
        out = np.interp(positions, xs, ys)
        slope = (ys[-1] - ys[0]) / (xs[-1] - xs[0]) if len(xs) > 1 else self.SLOPE * ys[0]
        return out + np.maximum(positions - xs[-1], 0) * slope


class Speculation(Decode):
    """A technique that proposes: subclasses say what (`draft`); how much is the schedule's choice, and the verifier is `coupled`.

    branches: above 1 the technique can propose trees, and does where `branching` says so.
    """

    drafting = False

    def __init__(self, k: int, schedule: str, branches: int = 1) -> None:
        self.branches = branches
        self.schedule: Schedule = Heuristic(k) if schedule == "heuristic" else Constant(k)
        if schedule == "goodput":
            self.schedule = Either(k, self.drafting, branches) if branches > 1 else Goodput(k, self.drafting)
        self._tried: bool | None = None  # whether the last proposals had a tree among them; None: there were none

    def bind(self, engine: Any) -> None:
        if not takes_trees(engine.model):
            self.schedule.doubt()

    @property
    def branching(self) -> bool:
        return self.branches > 1 and (not isinstance(self.schedule, Either) or self.schedule.branching)

    def draft(self, rows: Sequence[Row], lengths: Sequence[int]) -> Sequence[Proposal]:
        """At most lengths[i] tokens to try after each row's own."""
        raise NotImplementedError

    def propose(self, rows: Sequence[Row], room: Sequence[int]) -> Sequence[Proposal]:
        proposals = [shaped(p) for p in self.draft(rows, self.schedule.lengths(rows, room))]
        self._tried = any(isinstance(p, Tree) for p in proposals) if any(proposals) else None
        return proposals

    def accept(self, row: Row, proposal: Proposal, chosen: Sequence[int], logits: torch.Tensor) -> list[int]:
        committed = self.verify(row, proposal, chosen, logits)
        if isinstance(proposal, Tree):
            self.schedule.walked(row, proposal, proposal.follow(committed[:-1]))
        else:
            self.schedule.kept(row, len(proposal), len(committed) - 1)
        return committed

    def verify(self, row: Row, proposal: Proposal, chosen: Sequence[int], logits: torch.Tensor) -> list[int]:
        return coupled(proposal, chosen)

    def timed(self, positions: int, proposing: float, rest: float) -> None:
        self.schedule.timed(positions, proposing, rest, self._tried)


def check(name: str, k: int, schedule: str, branches: int = 1) -> None:
    """UserError for options that no schedule takes."""
    if branches < 1:
        raise UserError(f"{name}: branches={branches} must be at least 1 (a chain)")
    if k < 0:
        raise UserError(f"{name}: k={k} must not be negative")
    if schedule not in SCHEDULES:
        raise UserError(f"{name}: schedule={schedule!r}: no such schedule{did_you_mean(schedule, SCHEDULES)}")


def takes_trees(model: Any) -> bool:
    """Whether what does a model's small steps does those with trees as well."""
    return bool(getattr(getattr(model, "small_step", None), "trees", True))


def check_trees(name: str, target: Any) -> None:
    """UserError for a model whose steps cannot take a tree without changing its numbers: those of int8 are one C++ call, and torch rounds
    activations otherwise.
    """
    step = getattr(getattr(target, "model", None), "small_step", None)
    if getattr(step, "int8", False):
        raise UserError(
            f"{name}: trees go through torch, which rounds otherwise than int8's fused steps: use int8(fused=false), or a chain"
        )
