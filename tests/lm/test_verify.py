"""The verifier on a tabular model: the law of what it commits, by position type, and planted bugs that the tests must see."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from hasten import rng
from hasten.lm.decode import theory, verify

V, K, LENGTH = 4, 3, 5
LIMIT = 1e-5  # of a chi-square test; a few dozen are made


def chain(seed: int) -> torch.Tensor:
    rows = np.random.default_rng(seed).random((V, V)) + 0.05
    return torch.tensor(rows / rows.sum(-1, keepdims=True))


P, Q = chain(1), chain(2)
Rule = Callable[..., list[int]]


def decode(rule: Rule, seed: int, uniform: Any = None) -> tuple[list[int], list[str]]:
    """LENGTH tokens from token 0 with drafts of K from the chain P; and the type of each position."""
    text, kinds, before = [0], [], "first"
    while len(text) <= LENGTH:
        start = len(text)

        def number(purpose: int, i: int, start: int = start) -> float:
            return rng.uniform(seed, start, purpose, i)

        u = number if uniform is None else uniform(seed, start)
        proposal: list[int] = []
        for i in range(K):
            proposal.append(verify.drawn(P[(proposal or text)[-1]], u(verify.DRAFT, i)))
        at = torch.tensor([text[-1], *proposal])
        new = rule(proposal, P[at[:-1]], Q[at], u)
        kinds += [before, *["accepted"] * (len(new) - 2), "bonus" if len(new) == K + 1 else "corrected"][: len(new)]
        before = "after all" if len(new) == K + 1 else "after a rejection"
        text += new
    return text[1 : LENGTH + 1], kinds[:LENGTH]


def p_value(counts: Counter[int], law: torch.Tensor) -> float:
    from scipy.stats import chisquare

    n = sum(counts.values())
    return float(chisquare([counts[v] for v in range(V)], (law / law.sum() * n).tolist()).pvalue)


def worst(rule: Rule, runs: int, uniform: Any = None) -> float:
    """The least p-value over position types and tokens before, of the law of the next token.

    A position's type may depend on the token itself ("accepted"), so types are those of how the round began; inside a round all are pooled.
    """
    seen: dict[tuple[str, int], Counter[int]] = {}
    for seed in range(runs):
        text, kinds = decode(rule, seed, uniform)
        for i, token in enumerate(text):
            kind = kinds[i] if kinds[i].startswith(("first", "after")) else "inside"
            seen.setdefault((kind, text[i - 1] if i else 0), Counter())[token] += 1
            seen.setdefault((f"position {i}", text[i - 1] if i else 0), Counter())[token] += 1
    return min(p_value(c, Q[before]) for (kind, before), c in seen.items() if kind != "inside" and sum(c.values()) > 200)


@pytest.mark.parametrize("rule", [verify.rejection, verify.block])
def test_output_has_the_targets_law_at_every_position_type(rule: Rule) -> None:
    assert worst(rule, 6000) > LIMIT


def resampled(proposal: Any, p: Any, q: Any, u: Any) -> list[int]:
    new = verify.rejection(proposal, p, q, u)
    n = len(new) - 1
    return new if n == K else [*new[:-1], verify.drawn(q[n], u(verify.AFTER, n))]


def shared(seed: int, start: int) -> verify.Uniform:
    """One number for the draft, its test and the correction of a position."""
    return lambda purpose, i: rng.uniform(seed, start, i)


def reused(seed: int, start: int) -> verify.Uniform:
    """Numbers do not depend on the round but on the position alone: one that has decided something is used again."""
    return lambda purpose, i: rng.uniform(seed, purpose, start + i)


@pytest.mark.parametrize(("rule", "uniform"), [(resampled, None), (verify.rejection, shared), (verify.block, reused)])
def test_planted_bugs_are_seen(rule: Rule, uniform: Any) -> None:
    assert worst(rule, 3000, uniform) < LIMIT


def test_certain_proposals_need_no_law() -> None:
    """A proposal that was looked up, not drawn: accepted with q(x), else drawn from the rest."""
    counts: Counter[int] = Counter()
    for seed in range(6000):
        new = verify.rejection([2], None, Q[[0, 2]], lambda purpose, i, seed=seed: rng.uniform(seed, purpose, i))
        counts[new[0]] += 1
    assert p_value(counts, Q[0]) > LIMIT


def test_expected_tokens_of_a_round_are_those_of_theory_and_a_block_keeps_more() -> None:
    """Position by position 1 - TV is accepted; verified jointly, never less."""
    kept = {rule: [len(decode_one(rule, seed)) for seed in range(8000)] for rule in (verify.rejection, verify.block)}
    at, want = torch.tensor([1.0, 0, 0, 0], dtype=torch.float64), 1.0
    for _ in range(K):
        at = at @ torch.minimum(P, Q)
        want += float(at.sum())
    mean, error = np.mean(kept[verify.rejection]), np.std(kept[verify.rejection]) / 8000**0.5
    assert abs(mean - want) < 4.5 * error
    assert np.mean(kept[verify.block]) > mean


def decode_one(rule: Rule, seed: int) -> list[int]:
    proposal: list[int] = []
    for i in range(K):
        proposal.append(verify.drawn(P[(proposal or [0])[-1]], rng.uniform(seed, verify.DRAFT, i)))
    at = torch.tensor([0, *proposal])
    return rule(proposal, P[at[:-1]], Q[at], lambda purpose, i: rng.uniform(seed, purpose, i))


def test_a_lossy_weight_lies_on_the_line_of_bias_and_rejections() -> None:
    p, q = P[1].numpy(), Q[1].numpy()
    for w in (1.0, 0.5):
        first, refused = Counter[int](), 0
        for seed in range(6000):
            u = partial(rng.uniform, seed)
            x = verify.drawn(P[1], u(verify.DRAFT, 0))
            new = verify.rejection([x], P[1:2], torch.stack([Q[1], Q[x]]), u, keep=w)
            first[new[0]] += 1
            refused += len(new) == 1
        tv = float(theory.tv(p, q))
        assert abs(refused / 6000 - w * tv) < 4 * (w * tv / 6000) ** 0.5
        assert p_value(first, torch.tensor(theory.output_law(theory.ensemble_acceptance(p, q, w), p, theory.residual(p, q)))) > LIMIT


def test_coupled_commits_the_targets_choices() -> None:
    assert verify.coupled([1, 2, 3], [1, 2, 4, 9]) == [1, 2, 4]
    assert verify.coupled([1, 2], [1, 2, 3]) == [1, 2, 3]
    assert verify.coupled([], [7]) == [7]


def test_nothing_of_probability_zero_is_drawn() -> None:
    law = torch.tensor([0.0, 0.5, 0.5, 0.0], dtype=torch.float64)
    assert {verify.drawn(law, u) for u in (1e-17, 0.4999999, 0.5, 0.9999999999999999, 1.0)} == {1, 2}
