"""Sharing a width out: the vectors that the paper's and the released code's rules give, and what must hold for any scores."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hasten.strategies.allocate import ROUNDINGS, ceilings, largest_remainder, rounded

EIGHT = [0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.3, 0.2]


@pytest.mark.parametrize(
    ("scores", "width", "temperature", "ceil", "nearest", "largest"),
    [
        ([0.9, 0.8, 0.4, 0.1], 8, 0.1, [6, 2, 0, 0], [6, 2, 0, 0], [6, 2, 0, 0]),
        ([0.9, 0.8, 0.4, 0.1], 8, 0.2, [5, 3, 0, 0], [5, 3, 0, 0], [5, 3, 0, 0]),
        (EIGHT, 16, 0.2, [5, 4, 3, 2, 2, 0, 0, 0], [4, 3, 3, 2, 2, 1, 0, 0], [4, 4, 3, 2, 2, 1, 0, 0]),
        (EIGHT, 16, 0.1, [7, 4, 3, 2, 0, 0, 0, 0], [7, 4, 2, 1, 1, 1, 0, 0], [7, 4, 2, 1, 1, 1, 0, 0]),
        ([0.6, 0.6, 0.6], 4, 0.1, [2, 1, 1], [1, 1, 1], [2, 1, 1]),
        ([0.99, 0.5], 5, 0.1, [5, 0], [5, 0], [5, 0]),
        ([0.5] * 16, 16, 0.1, [1] * 16, [1] * 16, [1] * 16),
    ],
)
def test_vectors(scores: list[float], width: int, temperature: float, ceil: list[int], nearest: list[int], largest: list[int]) -> None:
    """The released code gives equal scores [1, 1, 2] of 4 by an error of rounding; here the first has what is over."""
    assert ceilings(scores, width, temperature) == ceil
    assert rounded(scores, width, temperature) == nearest
    assert largest_remainder(scores, width, temperature) == largest


SCORES = st.lists(st.floats(0, 1), min_size=1, max_size=40)


@given(SCORES, st.integers(0, 200), st.floats(0.01, 100))
def test_the_width_is_kept_and_better_ones_have_no_less(scores: list[float], width: int, temperature: float) -> None:
    for rule in (largest_remainder, ceilings):
        out = rule(scores, width, temperature)
        assert sum(out) == width and min(out) >= 0
        for a, n in zip(scores, out, strict=True):  # a better one never has fewer
            assert all(n >= m for b, m in zip(scores, out, strict=True) if a > b + 1e-6)


@given(SCORES, st.integers(1, 64))
def test_hot_is_even_and_cold_is_greedy(scores: list[float], width: int) -> None:
    even = largest_remainder(scores, width, 1e9)
    assert max(even) - min(even) <= 1
    best = largest_remainder([*scores, 2.0], width, 1e-3)
    assert best[-1] == width


def test_names() -> None:
    assert set(ROUNDINGS) == {"largest-remainder", "round", "ceil"}
