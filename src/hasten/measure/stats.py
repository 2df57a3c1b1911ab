"""Intervals and tests for measurements: small, seeded, vectorised, and honest about small samples.

Bootstrap: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapters 13 (percentile interval) and 8 (paired and two-sample
resampling). Proportions: Wilson (1927). Medians: the distribution-free interval of order statistics (David and Nagaraja, Order
Statistics, section 7.1). Paired test: sign flips (Fisher 1935; Good, Permutation Tests, chapter 3). Many claims at once: Holm (1979).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb, sqrt
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

LEVEL = 0.95
REPEATS = 4000
_BLOCK = 1 << 22  # resampled values held at once


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number with its confidence interval [low, high] and the number of observations behind it."""

    value: float
    low: float
    high: float
    n: int

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


def wilson(successes: float, n: int, level: float = LEVEL) -> Estimate:
    """A proportion with Wilson's score interval: right also near 0 and 1, where the textbook interval collapses to a point."""
    if n == 0:
        return Estimate(float("nan"), 0.0, 1.0, 0)
    z, p = NormalDist().inv_cdf(0.5 + level / 2), successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return Estimate(p, max(0.0, centre - half), min(1.0, centre + half), n)


def mean(values: ArrayLike, level: float = LEVEL, seed: int = 0) -> Estimate:
    """A mean over items, with Wilson's interval if every value is 0 or 1 and a percentile bootstrap otherwise."""
    x = np.asarray(values, dtype=float)
    if x.size == 0:
        return Estimate(float("nan"), float("nan"), float("nan"), 0)
    if np.isin(x, (0.0, 1.0)).all():
        return wilson(float(x.sum()), x.size, level)
    return Estimate(float(x.mean()), *_percentiles(_resampled_means(x, np.random.default_rng(seed)), level), x.size)


def paired_difference(a: ArrayLike, b: ArrayLike, level: float = LEVEL, seed: int = 0) -> Estimate:
    """Mean of a - b over the same items; resampling items keeps what both share (a hard item is hard for both).

    Two imaginary items, one won by each side, are added to the interval (not to the value): the cure of Agresti and Min (2005) for
    samples so small or so one-sided that every resample looks alike.
    """
    x, y = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if x.shape != y.shape:
        raise ValueError(f"paired values must match item by item, got {x.size} and {y.size}")
    difference = x - y
    if not difference.any():
        return Estimate(0.0, 0.0, 0.0, difference.size)
    padded = np.append(difference, (0.5, -0.5))
    return Estimate(float(difference.mean()), *_percentiles(_resampled_means(padded, np.random.default_rng(seed)), level), difference.size)


def unpaired_difference(a: ArrayLike, b: ArrayLike, level: float = LEVEL, seed: int = 0) -> Estimate:
    """mean(a) - mean(b) of two independent samples, each resampled on its own."""
    x, y = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    rng = np.random.default_rng(seed)
    gap = _resampled_means(x, rng) - _resampled_means(y, rng)
    return Estimate(float(x.mean() - y.mean()), *_percentiles(gap, level), min(x.size, y.size))


def sign_flip_test(a: ArrayLike, b: ArrayLike, repeats: int = REPEATS, seed: int = 0) -> float:
    """Two-sided p-value of "a and b do equally well on the same items": how often random signs give a mean difference as large."""
    difference = np.asarray(a, dtype=float) - np.asarray(b, dtype=float)
    moved = difference[difference != 0]
    if moved.size == 0:
        return 1.0
    signs = np.random.default_rng(seed).choice((-1.0, 1.0), size=(repeats, moved.size))
    extreme = np.abs(signs @ moved) >= abs(moved.sum()) - 1e-12
    return float((extreme.sum() + 1) / (repeats + 1))


def median(values: ArrayLike, level: float = LEVEL) -> Estimate:
    """The median, with the narrowest symmetric pair of order statistics that covers it with at least `level` (all, if n is too small)."""
    x = np.sort(np.asarray(values, dtype=float))
    n = x.size
    if n == 0:
        return Estimate(float("nan"), float("nan"), float("nan"), 0)
    tail, below = (1 - level) / 2, 0.0
    rank = 0
    while rank < (n - 1) // 2 and below + comb(n, rank) / 2**n <= tail:
        below += comb(n, rank) / 2**n
        rank += 1
    rank = max(rank - 1, 0)
    return Estimate(float(np.median(x)), float(x[rank]), float(x[n - 1 - rank]), n)


def median_ratio(a: ArrayLike, b: ArrayLike, level: float = LEVEL) -> Estimate:
    """Median of a / b over paired repeats (taken one after the other, so a slow moment of the machine hits both)."""
    return median(np.asarray(a, dtype=float) / np.asarray(b, dtype=float), level)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, in the order given: the chance that any claim called true is false stays under the level."""
    order = np.argsort(p_values)
    steps = [min(1.0, (len(p_values) - i) * p_values[int(j)]) for i, j in enumerate(order)]
    adjusted = np.empty(len(p_values))
    adjusted[order] = np.maximum.accumulate(steps) if steps else []
    return [float(p) for p in adjusted]


def _resampled_means(x: NDArray[np.float64], rng: np.random.Generator, repeats: int = REPEATS) -> NDArray[np.float64]:
    """Means of `repeats` samples of x with replacement, in blocks that bound the memory."""
    rows = max(1, _BLOCK // x.size)
    blocks = [x[rng.integers(0, x.size, (min(rows, repeats - done), x.size))].mean(axis=1) for done in range(0, repeats, rows)]
    return np.concatenate(blocks)


def _percentiles(samples: NDArray[np.float64], level: float) -> tuple[float, float]:
    low, high = np.quantile(samples, ((1 - level) / 2, (1 + level) / 2))
    return float(low), float(high)
