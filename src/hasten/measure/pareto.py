"""Which recipes are worth having: the Pareto frontier of quality against a cost, and the choice inside a budget.

The rule of choice. Take the recipe with the highest quality inside the budget (ties: the cheaper). Prefer a cheaper one to it only if it is
cheaper by a tenth at least and *shown* to be as good: the interval of the paired difference lies above minus two points. That is a test of
non-inferiority (Wellek, Testing Statistical Hypotheses of Equivalence and Noninferiority, 2010): that no difference was seen in a
small sample is no reason to give up quality, and that a difference was seen inside the noise is no reason to pay for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hasten.measure.stats import Estimate

MARGIN = 0.02  # quality that may be given up for a lower price, if the interval shows that no more is given up
CHEAPER = 0.90  # a price worth changing for

Measurement = Mapping[str, Any]
Difference = Callable[[Measurement, Measurement], Estimate]

AXES: dict[str, str] = {
    "seconds": "mean seconds from request to answer", "p95_seconds": "95th percentile of the same", "ttft": "mean seconds to the first token",
    "p95_ttft": "95th percentile of the same", "tpot": "mean seconds per later token", "p95_tpot": "95th percentile of the same",
    "tokens": "tokens generated", "forwards": "forward passes", "flops": "floating-point operations", "bytes": "bytes read by forward passes",
    "joules": "energy", "peak_bytes": "peak bytes of cache",
}  # fmt: skip


def cost(measurement: Measurement, axis: str) -> float:
    """The cost on an axis; infinite where it is not known, so that an unknown cost fits no budget."""
    value = measurement["cost"].get(axis)
    return float("inf") if value is None else float(value)


def quality(measurement: Measurement) -> float:
    return float(measurement["quality"]["value"])


def frontier(measurements: Sequence[Measurement], axis: str = "seconds") -> list[Measurement]:
    """Those that no other beats on quality at the same or a lower cost, from cheap to dear. O(n log n)."""
    ordered = sorted(measurements, key=lambda m: (cost(m, axis), -quality(m)))
    out: list[Measurement] = []
    for m in ordered:
        if not out or quality(m) > quality(out[-1]):
            out.append(m)
    return out


def dominated_by(measurement: Measurement, others: Sequence[Measurement], axis: str = "seconds") -> Measurement | None:
    """The best recipe that is at least as good for at most the same cost, and better in one of the two; None on the frontier."""
    q, c = quality(measurement), cost(measurement, axis)
    better = [m for m in others if quality(m) >= q and cost(m, axis) <= c and (quality(m) > q or cost(m, axis) < c)]
    return max(better, key=lambda m: (quality(m), -cost(m, axis)), default=None)


def inside(measurement: Measurement, budget: Mapping[str, float]) -> bool:
    """Whether no cost exceeds its budget."""
    return all(cost(measurement, axis) <= most for axis, most in budget.items())


def best_inside(
    measurements: Sequence[Measurement], budget: Mapping[str, float], difference: Difference, axis: str = "seconds"
) -> Measurement | None:
    """The choice inside a budget, by this module's rule; None if nothing fits. difference(a, b): of quality, paired over items."""
    fitting = [m for m in measurements if inside(m, budget)]
    if not fitting:
        return None
    best = max(fitting, key=lambda m: (quality(m), -cost(m, axis)))
    cheaper = [m for m in fitting if cost(m, axis) <= CHEAPER * cost(best, axis) and difference(m, best).low > -MARGIN]
    return min(cheaper, key=lambda m: (cost(m, axis), -quality(m)), default=best)


def cheapest_reaching(
    measurements: Sequence[Measurement], least: float, budget: Mapping[str, float], axis: str = "seconds"
) -> Measurement | None:
    """The cheapest recipe inside the budget whose quality is at least `least`; None if there is none."""
    reaching = [m for m in measurements if quality(m) >= least and inside(m, budget)]
    return min(reaching, key=lambda m: (cost(m, axis), -quality(m)), default=None)
