"""Majority vote (self-consistency; Wang et al. 2023, arXiv:2203.11171): draw n samples, return one whose answer most of them share.

Ties go to the answer that first reached the highest count, in the order of sample index, as in the evaluator of Wu et al. 2024
(arXiv:2408.00724); samples without an answer are counted but never vote.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from hasten.strategies import answers, samples
from hasten.strategies.drive import Flow, Strategy
from hasten.values import Request, Result


@dataclass(frozen=True)
class Options:
    n: int = 8  # samples drawn
    temperature: float = 0.8  # of the samples; replaces the request's
    top_p: float = 1.0  # of the samples; replaces the request's
    extract: str = "auto"  # how an answer is found: auto, hash, boxed, last-number, line, or a regular expression with one group

    def __post_init__(self) -> None:
        samples.check(self)
        answers.extractor(self.extract)


def roles(options: Options) -> dict[str, str]:
    """Models needed beside the target: none."""
    return {}


def why_not(options: Options, target: object) -> str | None:
    return None


def build(options: Options, target: object = None) -> Strategy:
    """Request -> generator that draws `n` samples and returns the majority's; its trace counts the answers."""
    extract = answers.chosen(options.extract, target)

    def vote(request: Request) -> Flow:
        drawn = yield from samples.gather(samples.siblings(request, options))
        return majority(list(drawn.values()), extract)

    return vote


def majority(drawn: Sequence[Result], extract: answers.Extractor) -> Result:
    """The first sample with the winning answer; the first of all if none has an answer (the trace's `answers` is then empty)."""
    found = [extract(result.text) for result in drawn]
    winner = elect(found, [1.0] * len(found))
    chosen = drawn[0] if winner is None else drawn[found.index(winner)]
    return replace(chosen, trace=tally(found))


def elect(found: Sequence[str | None], weights: Sequence[float]) -> str | None:
    """The answer with the greatest sum of weights (each >= 0); ties go to the one that reached it first. None if there is no answer."""
    totals: dict[str, float] = {}
    winner, most = None, -1.0
    for answer, weight in zip(found, weights, strict=True):
        if answer is not None:
            totals[answer] = totals.get(answer, 0.0) + weight
            if totals[answer] > most:
                winner, most = answer, totals[answer]
    return winner


def tally(found: Sequence[str | None]) -> dict[str, object]:
    """Trace of a vote: counts by answer in order of appearance, samples without an answer, and samples in all."""
    counts = Counter(answer for answer in found if answer is not None)
    return {"answers": dict(counts), "unparsed": len(found) - counts.total(), "n": len(found)}
