"""What a paper is here: claims with thresholds fixed before any run, a way to collect evidence, and the verdicts that follow from it.

Evidence is a list of lines, plain JSON, each one measurement; a claim reads them and says what it finds. So rivals can be measured in turn
by one loop while every claim is judged on its own, and an interrupted run goes on from the lines that it kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from hasten.measure import stats
from hasten.measure.stats import Estimate

HOLDS, FAILS, UNDECIDED, NOT_HERE = VERDICTS = ("holds", "fails", "undecided", "not testable here")
FEWEST = 6  # observations below which order statistics give no 95 % interval of a median: 2 / 2**5 > 0.05

Line = Mapping[str, Any]
Settings = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Absent:
    """Why a claim cannot be tested on this machine."""

    why: str


@dataclass(frozen=True, slots=True)
class Claim:
    """One statement of a paper.

    claim: the statement. published: its figure, None where it gives none. threshold, direction: it holds if the measured figure lies on
    that side. how: what is measured here, and what to know about the published figure. find: reads the evidence and the run's settings.
    """

    id: str
    claim: str
    published: float | None
    unit: str
    threshold: float
    direction: Literal["above", "below"]
    how: str
    find: Callable[[Sequence[Line], Settings], Estimate | Absent]


class Run(Protocol):
    """What a paper's `collect` is given."""

    settings: Settings

    def once(self, what: str, repeat: int, make: Callable[[], Line]) -> bool:
        """Keep the line that `make` measures, unless this repeat of it is there already; False: the time is up, nothing was measured."""


@dataclass(frozen=True, slots=True)
class Paper:
    """settings(full): what the run depends on, as plain JSON. collect(run): measures, line by line, until done or out of time."""

    name: str
    title: str
    source: str
    claims: tuple[Claim, ...]
    settings: Callable[[bool], dict[str, Any]]
    collect: Callable[[Run], None]


def verdict(found: Estimate | Absent, threshold: float, direction: str) -> str:
    """`holds` or `fails` only if the whole interval lies on one side of the threshold."""
    if isinstance(found, Absent):
        return NOT_HERE
    if found.low > threshold:
        return HOLDS if direction == "above" else FAILS
    if found.high < threshold:
        return FAILS if direction == "above" else HOLDS
    return UNDECIDED


def judged(claim: Claim, lines: Sequence[Line], settings: Settings) -> dict[str, Any]:
    """A claim with its measured figure and verdict, as JSON has it; a side without a bound is None."""
    found = claim.find(lines, settings)
    rule = f"{claim.how}; holds {claim.direction} {claim.threshold:g}"
    about = {"id": claim.id, "claim": claim.claim, "published": claim.published}
    if isinstance(found, Absent):
        seen: dict[str, Any] = {"measured": None, "unit": claim.unit, "ci": [None, None], "n": 0}
        rule += f"; not testable here: {found.why}"
    else:
        seen = {"measured": _number(found.value), "unit": claim.unit, "ci": [_number(found.low), _number(found.high)], "n": found.n}
    return about | seen | {"threshold": claim.threshold, "verdict": verdict(found, claim.threshold, claim.direction), "how": rule}


def document(paper: Paper, lines: Sequence[Line], settings: Settings, machine: Mapping[str, Any]) -> dict[str, Any]:
    """What `hasten papers NAME --json` prints."""
    claims = [judged(claim, lines, settings) for claim in paper.claims]
    return {"paper": paper.name, "title": paper.title, "claims": claims, "settings": dict(settings), "machine": dict(machine)}


def values(lines: Sequence[Line], what: str, field: str) -> dict[int, float]:
    """One field of all lines of a kind, by repeat."""
    return {line["repeat"]: line[field] for line in lines if line["what"] == what and line.get(field) is not None}


def ratio(lines: Sequence[Line], a: str, b: str, field: str) -> Estimate:
    """Median of a / b over the repeats that have both: they were measured in turn, so a slow moment of the machine hits both."""
    over, under = values(lines, a, field), values(lines, b, field)
    return median([over[i] / under[i] for i in sorted(over.keys() & under.keys())])


def median(values: Sequence[float]) -> Estimate:
    """The median with its distribution-free 95 % interval; no bounds where so few observations give none."""
    found = stats.median(values)
    return found if found.n >= FEWEST else Estimate(found.value, -math.inf, math.inf, found.n)


def exact(value: float, low: float, high: float) -> Estimate:
    """A figure that follows by arithmetic from printed ones; low and high: what their rounding leaves open."""
    return Estimate(value, low, high, 1)


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
