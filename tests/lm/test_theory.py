"""Theory against published and simulated values, with a control that the tests can fail."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from hasten.lm.decode import theory

GOLDEN = {1: 16.6202, 2: 15.3237, 3: 14.746, 4: 14.3932, 5: 14.1483, 10: 13.543, 20: 13.096, 50: 12.660, 200: 12.347}


def chain(seed: int, steps: int = 50, size: int = 7) -> np.ndarray:
    rows = np.random.default_rng(seed).random((steps, size, size))
    return rows / rows.sum(-1, keepdims=True)


P, Q = chain(10), chain(11)


@pytest.mark.parametrize(("drafts", "expected"), GOLDEN.items())
def test_rejections_of_the_golden_chain(drafts: int, expected: float) -> None:
    assert theory.expected_rejections(P, Q, 0, drafts) == pytest.approx(expected, abs=6e-4)


@pytest.mark.parametrize("drafts", [1, 2, 4])
def test_simulation_agrees_and_its_output_has_the_targets_law(drafts: int) -> None:
    rejections, tokens = theory.simulate(P, Q, 0, 20000, drafts)
    off = abs(rejections.mean() - theory.expected_rejections(P, Q, 0, drafts)) / (rejections.std() / len(rejections) ** 0.5)
    assert off < 4
    law = np.eye(7)[0]
    for step in Q:
        law = law @ step
    assert chi_square(tokens[:, -1], law) < 27.9  # 1 in 10,000 at six degrees of freedom


def test_resampling_from_the_target_is_biased_and_the_test_sees_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(theory, "residual", lambda p, q: q)
    _, tokens = theory.simulate(P, Q, 0, 20000)
    assert max(chi_square(tokens[:, n], _law(n)) for n in range(5)) > 100


def _law(n: int) -> np.ndarray:
    law = np.eye(7)[0]
    for step in Q[: n + 1]:
        law = law @ step
    return law


def chi_square(tokens: np.ndarray, law: np.ndarray) -> float:
    want = law * len(tokens)
    return float(((np.bincount(tokens, minlength=len(law)) - want) ** 2 / want).sum())


PAIRS = [np.random.default_rng(s).dirichlet(np.ones(8), 2) for s in range(3)]


@pytest.mark.parametrize("pair", PAIRS)
def test_rejections_and_least_bias_lie_on_one_line(pair: np.ndarray) -> None:
    p, q = pair
    for b in [
        *(theory.over_acceptance(p, q, e) for e in (0, 0.02, 0.05, 0.1, 0.3)),
        *(theory.ensemble_acceptance(p, q, w) for w in (1, 0.6, 0.1)),
    ]:
        rejected = float(((1 - b) * p).sum())
        bias = float(theory.least_bias(b, p, q))
        assert rejected + bias == pytest.approx(float(theory.tv(p, q)))
        law = theory.output_law(b, p, theory.optimal_residual(b, p, q))
        assert law.sum() == pytest.approx(1)
        assert float(theory.tv(law, q)) == pytest.approx(bias, abs=1e-9)
    exact = theory.over_acceptance(p, q, 0)
    assert float(theory.tv(theory.output_law(exact, p, q), q)) > 0.05  # drawing from q itself after a rejection is not exact


def test_tokens_a_round_by_enumeration_and_pearl_by_simulation() -> None:
    a, k = 0.7, 4
    by_hand = sum(
        np.prod([a if x else 1 - a for x in kept]) * (next((i for i, x in enumerate(kept) if not x), k) + 1)
        for kept in itertools.product([True, False], repeat=k)
    )
    assert theory.tokens_a_round(a, k) == pytest.approx(by_hand)
    assert theory.speedup(1.0, 4, 5.0) == pytest.approx(5 / 1.8)
    assert theory.pearl_tokens(a, k) == pytest.approx(_pearl(a, k), rel=0.02)


def _pearl(a: float, k: int, iterations: int = 200_000) -> float:
    rng, tokens, ahead = np.random.default_rng(0), 0, False
    for _ in range(iterations):
        if not ahead:  # the first token of the window is judged while it is drafted
            ahead = bool(rng.random() < a)
            tokens += 1
        else:  # the rest of the last window and the first token of the next
            kept = next((i for i in range(k) if rng.random() >= a), k)
            tokens += kept if kept == k else kept + 1
            ahead = kept == k
    return tokens / iterations
