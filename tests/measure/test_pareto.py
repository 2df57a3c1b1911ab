"""The frontier, and the rule that chooses inside a budget."""

from typing import Any

import pytest

from hasten.measure import pareto
from hasten.measure.stats import Estimate


def point(name: str, quality: float, seconds: float, **costs: float | None) -> dict[str, Any]:
    return {"recipe_text": name, "quality": {"value": quality}, "cost": {"seconds": seconds, **costs}}


POINTS = [point("a", 0.5, 1.0), point("b", 0.7, 2.0), point("c", 0.6, 3.0), point("d", 0.7, 2.5), point("e", 0.9, 8.0)]


def surely(a: pareto.Measurement, b: pareto.Measurement) -> Estimate:
    gap = pareto.quality(a) - pareto.quality(b)
    return Estimate(gap, gap - 0.001, gap + 0.001, 300)


def hardly(a: pareto.Measurement, b: pareto.Measurement) -> Estimate:
    gap = pareto.quality(a) - pareto.quality(b)
    return Estimate(gap, gap - 0.1, gap + 0.1, 30)


def names(points: Any) -> list[str]:
    return [p["recipe_text"] for p in points]


def test_frontier_and_who_dominates() -> None:
    assert names(pareto.frontier(POINTS)) == ["a", "b", "e"]
    assert [(d := pareto.dominated_by(p, POINTS)) and d["recipe_text"] for p in POINTS] == [None, None, "b", "b", None]


def test_best_inside_is_the_best_that_fits() -> None:
    assert pareto.best_inside(POINTS, {"seconds": 3}, hardly)["recipe_text"] == "b"  # type: ignore[index]
    assert pareto.best_inside(POINTS, {}, hardly)["recipe_text"] == "e"  # type: ignore[index]
    assert pareto.best_inside(POINTS, {"seconds": 0.5}, hardly) is None


def test_a_cheaper_one_wins_only_if_shown_to_be_as_good() -> None:
    points = [point("dear", 0.80, 2.0), point("cheap", 0.79, 1.0), point("poor", 0.77, 0.5), point("saves little", 0.80, 1.9)]
    assert pareto.best_inside(points, {}, surely)["recipe_text"] == "cheap"  # type: ignore[index]
    assert pareto.best_inside(points, {}, hardly)["recipe_text"] == "saves little"  # type: ignore[index]


def test_unknown_costs_fit_no_budget() -> None:
    assert not pareto.inside(point("a", 1, 1, joules=None), {"joules": 1e9})
    assert pareto.inside(point("a", 1, 1, joules=3), {"joules": 3})


@pytest.mark.parametrize(("least", "expected"), [(0.5, "a"), (0.7, "b"), (0.95, None)])
def test_cheapest_reaching(least: float, expected: str | None) -> None:
    found = pareto.cheapest_reaching(POINTS, least, {})
    assert (found and found["recipe_text"]) == expected
