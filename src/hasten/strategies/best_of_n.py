"""Best-of-n (Cobbe et al. 2021, arXiv:2110.14168; Lightman et al. 2023, arXiv:2305.20050): draw n samples, return the one a reward model likes most.

Each sample is scored as soon as it is finished, with no barrier, and identical samples are scored once. With `weighted`, rewards are summed
by answer and the best sample of the best answer wins (weighted vote; Li et al. 2023, arXiv:2206.02336).
"""

from __future__ import annotations

from collections.abc import Sequence
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
    """Request -> generator that draws and scores `n` samples and returns the best; `target.tokenizers` (by role) says how to score."""
    roles(options)
    score = rewards.scorer(getattr(target, "tokenizers", {}))
    extract = answers.chosen(options.extract, target)

    def best_of_n(request: Request) -> Flow:
        drawn: dict[int, Result] = {}
        valued: dict[tuple[int, ...], float] = {(): 0.0}  # by tokens; a sample without any is worth nothing and needs no model
        asked: dict[Key, tuple[int, ...]] = {}
        done = yield Ask({("sample", i): sub for i, sub in samples.siblings(request, options).items()})
        while True:
            new: dict[Key, Request] = {}
            for key, result in done.items():
                if key in asked:
                    valued[asked[key]] = rewards.aggregate(options.aggregate, result.scores)
                    continue
                drawn[key[1]] = result  # type: ignore[index]
                if result.tokens not in valued and result.tokens not in asked.values():
                    asked["reward", result.tokens] = result.tokens
                    new["reward", result.tokens] = score(request, result)
            if len(drawn) == options.n and len(valued) == len(asked) + 1:
                break
            done = yield Ask(new)
        ordered = [drawn[i] for i in range(options.n)]
        return select(ordered, [valued[result.tokens] for result in ordered], extract, options.weighted)

    return best_of_n


def select(drawn: Sequence[Result], values: Sequence[float], extract: answers.Extractor, weighted: bool) -> Result:
    """The sample of highest value (ties: lower index); if `weighted`, among those with the answer of the greatest summed value."""
    found = [extract(result.text) for result in drawn]
    winner = elect(found, values) if weighted else None
    among = [i for i in range(len(drawn)) if winner is None or found[i] == winner]
    best = max(among, key=lambda i: values[i])  # max keeps the first of equals
    distinct = len({result.tokens for result in drawn if result.tokens})
    return replace(drawn[best], trace={**tally(found), "rewards": tuple(values), "found": tuple(found), "chosen": best, "scored": distinct})
