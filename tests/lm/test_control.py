"""Schedules of proposals: goodput finds the best length on known costs, turns speculation off where it loses and comes back where it pays."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from hasten.lm.decode import theory
from hasten.lm.decode.control import FIRST_PAUSE, Curve, Goodput, Heuristic, check
from hasten.values import UserError


def rows(n: int) -> list[Any]:
    return [SimpleNamespace(control=None) for _ in range(n)]


def serve(
    schedule: Goodput, batch: list[Any], steps: int, acceptance: float, draft: float, step: Any, seed: int = 0
) -> tuple[float, list[int]]:
    """Tokens a second of simulated steps, and the mean length of proposals at each."""
    rand, tokens, seconds, lengths = random.Random(seed), 0, 0.0, []
    for _ in range(steps):
        asked = schedule.lengths(batch, [64] * len(batch))
        for row, k in zip(batch, asked, strict=True):
            kept = next((i for i in range(k) if rand.random() >= acceptance), k)
            schedule.kept(row, k, kept)
            tokens += kept + 1
        took = (draft * max(asked), step(len(batch) + sum(asked)))
        schedule.timed(len(batch) + sum(asked), *took)
        seconds += sum(took)
        lengths.append(sum(asked) / len(batch))
    return tokens / seconds, lengths


@pytest.mark.parametrize(("acceptance", "ratio"), [(0.9, 10), (0.7, 5), (0.5, 8)])
def test_goodput_comes_near_the_best_constant_length(acceptance: float, ratio: float) -> None:
    best = max(theory.speedup(acceptance, k, ratio) for k in range(1, 13))
    got, _ = serve(Goodput(12, drafting=True), rows(1), 600, acceptance, 1 / ratio, lambda n: 1.0)
    assert got > 0.9 * best


def test_speculation_that_loses_is_turned_off_and_costs_little() -> None:
    got, lengths = serve(Goodput(8, drafting=True), rows(1), 600, 0.2, 0.6, lambda n: 1.0)
    assert np.mean(lengths[50:]) < 0.1 and got > 0.97
    got, lengths = serve(Goodput(8, drafting=False), rows(16), 600, 0.3, 0.0, lambda n: n / 16)
    assert np.mean(lengths[50:]) < 0.1 and got > 0.97 * 16


def test_speculation_comes_back_when_it_pays() -> None:
    schedule = Goodput(8, drafting=True)
    serve(schedule, rows(1), 300, 0.05, 0.5, lambda n: 1.0)
    _, lengths = serve(schedule, rows(1), 3000, 0.95, 0.05, lambda n: 1.0)
    assert np.mean(lengths[-100:]) > 4


def test_rows_that_agree_get_more_than_rows_that_do_not() -> None:
    schedule, both = Goodput(8, drafting=False), rows(2)
    for _ in range(60):
        schedule.kept(both[0], 4, 4)
        schedule.kept(both[1], 4, 0)
        schedule.timed(10, 0.0, 1.3)
        schedule.timed(2, 0.0, 1.0)
    first, second = schedule.lengths(both, [64, 64])
    assert first > second
    assert schedule.lengths(both, [3, 0])[1] == 0 and schedule.lengths(both, [3, 0])[0] <= 3
    assert schedule.lengths([], []) == []


def test_while_none_is_best_trials_are_rare_and_rarer() -> None:
    schedule = Goodput(4, drafting=True)
    _, lengths = serve(schedule, rows(1), 2000, 0.0, 1.0, lambda n: 1.0)
    trials = [i for i, n in enumerate(lengths) if n]
    assert trials[-1] - trials[-2] > 8 * FIRST_PAUSE


def test_a_look_up_that_finds_nothing_is_no_trial() -> None:
    schedule, one = Goodput(4, drafting=False), rows(1)
    schedule.rates[:] = 0.01
    schedule.timed(1, 0.0, 1.0)
    asked = [schedule.lengths(one, [9])[0] for _ in range(3 * FIRST_PAUSE)]  # nothing proposed, so nothing is heard back
    assert asked[FIRST_PAUSE:] == [2] * (2 * FIRST_PAUSE)


def test_the_heuristic_is_transformers() -> None:
    schedule, [row] = Heuristic(5), rows(1)
    assert schedule.lengths([row], [64]) == [5]
    schedule.kept(row, 5, 5)
    assert schedule.lengths([row], [64]) == [7]
    for _ in range(9):
        schedule.kept(row, 7, 3)
    assert schedule.lengths([row], [64]) == [1]


def test_curve_interpolates_never_falls_and_goes_on_beyond() -> None:
    curve = Curve()
    assert curve.at(np.array([1, 5])).tolist() == [1, 1]
    for n, seconds in ((1, 1.0), (5, 2.0), (9, 1.5)):
        curve.add(n, seconds)
    assert curve.at(np.array([1, 3, 5, 9, 17])).tolist() == [1.0, 1.5, 2.0, 2.0, 3.0]


def test_bad_options() -> None:
    with pytest.raises(UserError, match="k=-1 must not be negative"):
        check("draft", -1, "goodput")
    with pytest.raises(UserError, match="did you mean 'goodput'"):
        check("draft", 1, "goodputs")
