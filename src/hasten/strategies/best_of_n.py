"""Best-of-n (Cobbe et al. 2021, arXiv:2110.14168; Lightman et al. 2023, arXiv:2305.20050): draw n samples, return the one a reward model likes most.

A sample competes if it is finished and its answer can be read; only if none is, the others do. The reward model is asked for what the choice
needs and no more: nothing while all competing samples give one answer (at the end, the first of them is returned unscored), each competing
sample as soon as it is finished once two answers differ, and identical samples once. With `weighted`, rewards are summed by answer and the
best sample of the best answer wins (weighted vote; Li et al. 2023, arXiv:2206.02336).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from hasten.strategies import answers, rewards, samples
from hasten.strategies.drive import Flow, Strategy
from hasten.strategies.vote import elect, tally
from hasten.values import Ask, Key, Request, Result, UserError, did_you_mean


@dataclass(frozen=True)
class Options:
    n: int = 8  # samples drawn
    reward: str = ""  # reward model: a directory, hub id or zoo:NAME (required)
    aggregate: str = "last"  # one number from the rewards of a solution's steps: last, min, prod, mean
    weighted: bool = False  # sum the rewards by answer instead of taking the single best sample
    temperature: float = 0.8  # of the samples; replaces the request's
    top_p: float = 1.0  # of the samples; replaces the request's
    extract: str = "auto"  # how an answer is found: auto, hash, boxed, last-number, line, or a regular expression with one group

    def __post_init__(self) -> None:
        samples.check(self)
        answers.extractor(self.extract)
        if self.aggregate not in rewards.AGGREGATES:
            raise UserError(f"aggregate={self.aggregate!r}: no such way{did_you_mean(self.aggregate, rewards.AGGREGATES)}")


def why_not(options: Options, target: object) -> str | None:
    return None if options.reward else "best-of-n needs a reward model: best-of-n(reward=MODEL)"


def roles(options: Options) -> dict[str, str]:
    """Models needed beside the target: the reward model. UserError if the options name none."""
    if reason := why_not(options, None):
        raise UserError(reason)
    return {"reward": options.reward}


def build(options: Options, target: Any = None) -> Strategy:
    """Request -> generator that draws `n` samples, has them scored and returns the best; `target.tokenizers` (by role) says how to score.

    Trace: as of a vote over the competing samples, and `rewards` (by sample, None: not scored), `chosen` (sample index), `scored` (how many).
    """
    roles(options)
    scorer = rewards.scorer(getattr(target, "tokenizers", {}))
    extract = answers.chosen(options.extract, target)

    def best_of_n(request: Request) -> Flow:
        score = scorer(request)
        drawn: dict[Key, Result] = {}  # by sample index
        found: dict[Key, str | None] = {}
        asked: set[Key] = set()  # token sequences sent to the reward model
        values: dict[Key, float] = {}
        new: Mapping[Key, Request] = samples.siblings(request, options)
        while len(drawn) < options.n or len(values) < len(asked):
            for key, result in (yield Ask(new)).items():
                if key in asked:
                    values[key] = rewards.aggregate(options.aggregate, result.scores)
                else:
                    drawn[key], found[key] = result, _answer(result, extract)
            wanted = [drawn[i] for i in to_score(found, options.n)]
            new = {sample.tokens: score(sample) for sample in wanted if sample.tokens and sample.tokens not in asked}
            asked |= new.keys()
        order = range(options.n)
        best = select([found[i] for i in order], [values.get(drawn[i].tokens, 0.0) for i in order], options.weighted)
        trace = {"rewards": tuple(values.get(drawn[i].tokens) for i in order), "chosen": best, "scored": len(asked)}
        return replace(drawn[best], trace={**tally([found[i] for i in order]), **trace})

    return best_of_n


def _answer(sample: Result, extract: answers.Extractor) -> str | None:
    """The answer a sample competes with; None if it was cut off at `max_tokens` or has none."""
    return extract(sample.text) if sample.finish_reason == "stop" else None


def to_score(found: Mapping[Key, str | None], n: int) -> list[Key]:
    """Which of the samples drawn so far (of n; answers by index, None: does not compete) the choice needs a reward for."""
    competing = [i for i, answer in found.items() if answer is not None]
    if len({found[i] for i in competing}) > 1:
        return competing
    return [] if competing or len(found) < n else list(found)


def select(found: list[str | None], values: list[float], weighted: bool) -> int:
    """Index of the competing sample of highest value (ties: lower index); if `weighted`, of those with the answer of greatest summed value.

    found: answers, None for a sample that does not compete; if none does, all are compared by value.
    """
    winner = elect(found, values) if weighted else None
    competing = [i for i, answer in enumerate(found) if answer is not None and winner in (None, answer)]
    return max(competing or range(len(found)), key=values.__getitem__)  # max keeps the first of equals
