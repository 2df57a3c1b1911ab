"""How good an answer is: right or wrong where the task has answers, else how near it is to the unmodified model's.

Without answers three numbers are reported: the share of identical answers, the share of tokens before the first difference, and KL(unmodified
model || recipe's model) per token, estimated on samples of the unmodified model: the mean of log p - log q over tokens drawn from p is
unbiased (Cover and Thomas, Elements of Information Theory, section 2.3).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from hasten.measure import stats
from hasten.measure.tasks import Item, Task
from hasten.values import Key, Request, Result


@dataclass(frozen=True, slots=True)
class Outcome:
    """What is kept of one answer. value: 1.0 right, 0.0 wrong, None where the task has no answers. tokens: kept only then."""

    item: str
    value: float | None
    tokens: tuple[int, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {"item": self.item, "value": self.value, **({"tokens": list(self.tokens)} if self.tokens else {})}


def grade(item: Item, result: Result, task: Task) -> float:
    """1.0 if the result's answer equals the item's in its normal form, else 0.0 (also if there is no answer)."""
    return float(item.answer is not None and task.extract(result.text) == item.answer)


def outcome(item: Item, result: Result, task: Task) -> Outcome:
    if task.answered:
        return Outcome(item.id, grade(item, result, task))
    return Outcome(item.id, None, result.tokens)


def same_prefix(a: Sequence[int], b: Sequence[int]) -> float:
    """Share of the longer sequence before the first difference: 1.0 if equal (also if both are empty)."""
    longest = max(len(a), len(b))
    if not longest:
        return 1.0
    first = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return first / longest


def values(outcomes: Mapping[str, Outcome], reference: Mapping[str, Outcome], ids: Sequence[str]) -> np.ndarray:
    """Quality per item, in the order of `ids`: as graded, or 1.0 where the tokens equal the reference's."""
    return np.array([_value(outcomes[i], reference.get(i)) for i in ids], dtype=float)


def _value(mine: Outcome, other: Outcome | None) -> float:
    if mine.value is not None:
        return mine.value
    return float(other is not None and mine.tokens == other.tokens)


def summary(name: str, outcomes: Mapping[str, Outcome], reference: Mapping[str, Outcome], kl: Sequence[float] = ()) -> dict[str, Any]:
    """The `quality` of a measurement: {"name", "value", "ci", "n"}, with "token_agreement" and "kl" where the task has no answers."""
    ids = [i for i in outcomes if outcomes[i].value is not None or i in reference]
    estimate = stats.mean(values(outcomes, reference, ids))
    out: dict[str, Any] = {"name": name, "value": estimate.value, "ci": [estimate.low, estimate.high], "n": estimate.n}
    if name == "agreement":
        near = stats.mean([same_prefix(outcomes[i].tokens, reference[i].tokens) for i in ids])
        out["token_agreement"] = {"value": near.value, "ci": [near.low, near.high]}
        if len(kl):
            drift = stats.mean(kl)
            out["kl"] = {"value": drift.value, "ci": [drift.low, drift.high], "n": drift.n}
    return out


def divergence(unmodified: Any, changed: Any, task: Task, items: Sequence[Item], max_tokens: int = 64) -> list[float]:
    """KL(unmodified || changed) per token of each item, in nats; both are `hasten.load.Loaded` with the same vocabulary.

    One continuation at temperature 1 is drawn from the unmodified model, and both models score its tokens.
    """
    from hasten.engine import run

    asked = {item.id: task.request(item, unmodified.ask(item.prompt)) for item in items}
    sampled: dict[Key, Request] = {i: replace(r, sampling=r.sampling.but(temperature=1.0, max_tokens=max_tokens)) for i, r in asked.items()}
    drawn = {i: r for i, r in run(unmodified.engines["target"], sampled).items() if r.tokens}
    scores = [_scores(loaded, drawn) for loaded in (unmodified, changed)]
    return [float(np.mean(np.subtract(p, q))) for p, q in zip(*scores, strict=True)]


def _scores(loaded: Any, drawn: Mapping[Key, Result]) -> list[tuple[float, ...]]:
    """Log-probability of each drawn token under a model."""
    out = []
    for result in drawn.values():
        whole = (*result.prompt_tokens, *result.tokens)
        [scored] = loaded.score([whole], score_from=len(result.prompt_tokens))
        out.append(scored.scores[-len(result.tokens) :])
    return out
