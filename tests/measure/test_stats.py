"""The intervals cover as often as they say, and the tests reject as rarely as they say."""

from math import comb

import numpy as np
import pytest

from hasten.measure import stats


def test_wilson_matches_the_published_example_and_never_collapses() -> None:
    estimate = stats.wilson(81, 263)  # Newcombe 1998, table I: 0.2553 to 0.3662
    assert (round(estimate.low, 4), round(estimate.high, 4)) == (0.2553, 0.3662)
    assert stats.wilson(0, 20).high > 0.1
    assert stats.wilson(20, 20).low < 0.9
    assert stats.wilson(0, 0).n == 0


@pytest.mark.parametrize("p", [0.05, 0.5, 0.93])
def test_wilson_covers_exactly_computed(p: float) -> None:
    n = 100
    inside = [s for s in range(n + 1) if stats.wilson(s, n).low <= p <= stats.wilson(s, n).high]
    assert 0.92 < sum(comb(n, s) * p**s * (1 - p) ** (n - s) for s in inside) < 0.98


def coverage(interval, truth: float, draws: int = 200) -> float:
    rng = np.random.default_rng(7)
    estimates = [interval(rng) for _ in range(draws)]
    return sum(e.low <= truth <= e.high for e in estimates) / draws


def test_bootstrap_mean_covers_a_skewed_law() -> None:
    assert 0.88 < coverage(lambda rng: stats.mean(rng.exponential(2.0, 80)), 2.0) <= 1


def correlated_outcomes(rng: np.random.Generator, n: int, gain: float) -> tuple[np.ndarray, np.ndarray]:
    hard = rng.random(n)
    return (hard < 0.6 + gain).astype(float), (hard < 0.6).astype(float)


def test_paired_interval_covers_and_is_narrower_than_unpaired() -> None:
    assert 0.9 < coverage(lambda rng: stats.paired_difference(*correlated_outcomes(rng, 200, 0.1)), 0.1) <= 1
    a, b = correlated_outcomes(np.random.default_rng(0), 200, 0.1)
    paired, unpaired = stats.paired_difference(a, b), stats.unpaired_difference(a, b)
    assert paired.value == pytest.approx(unpaired.value)
    assert paired.high - paired.low < 0.7 * (unpaired.high - unpaired.low)


def test_unpaired_interval_covers() -> None:
    assert 0.9 < coverage(lambda rng: stats.unpaired_difference(rng.normal(1, 1, 60), rng.normal(0, 2, 60)), 1.0) <= 1


def test_paired_difference_of_one_sided_small_samples_is_not_a_point() -> None:
    estimate = stats.paired_difference([1.0] * 5, [0.0] * 5)
    assert estimate.value == 1.0
    assert estimate.low < 0.9
    assert stats.paired_difference([1, 0], [1, 0]) == stats.Estimate(0.0, 0.0, 0.0, 2)
    with pytest.raises(ValueError, match="item by item"):
        stats.paired_difference([1], [1, 0])


def test_sign_flips_reject_at_their_level_under_the_null_and_have_power() -> None:
    rng = np.random.default_rng(3)
    null = [stats.sign_flip_test(rng.normal(size=30), rng.normal(size=30), repeats=400, seed=s) for s in range(300)]
    assert 0.01 < np.mean(np.array(null) < 0.05) < 0.09
    assert stats.sign_flip_test(rng.normal(1, 1, 60), rng.normal(0, 1, 60)) < 0.01
    assert stats.sign_flip_test([1, 2], [1, 2]) == 1.0


def test_median_interval_covers_at_every_size() -> None:
    for n in (6, 9, 25):
        assert coverage(lambda rng, n=n: stats.median(rng.lognormal(0, 1, n)), 1.0) >= 0.92
    few = stats.median([3.0, 1.0, 2.0])
    assert (few.low, few.value, few.high) == (1.0, 2.0, 3.0)


def test_median_ratio_cancels_what_both_share() -> None:
    noise = np.random.default_rng(0).lognormal(0, 1, 15)
    ratio = stats.median_ratio(2 * noise, noise)
    assert (ratio.low, ratio.value, ratio.high) == (2.0, 2.0, 2.0)


def test_holm_matches_a_worked_example() -> None:
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert stats.holm([]) == []


def test_seeded_and_bounded_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.random.default_rng(0).random(50)
    assert stats.mean(x) == stats.mean(x)
    monkeypatch.setattr(stats, "_BLOCK", 1000)  # 20 resamples at a time
    assert stats.mean(x).low == pytest.approx(0.45, abs=0.15)
