"""Schedules of proposals: goodput finds the best length on known costs, turns speculation off where it loses and comes back where it pays."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from hasten.lm.decode import theory
from hasten.lm.decode.control import FIRST_PAUSE, MARGIN, Curve, Either, Goodput, Heuristic, Switch, Trees, check, check_trees
from hasten.lm.tree import Tree
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


def branch(schedule: Either, steps: int, first: float, second: float, extra: float, seed: int = 0) -> float:
    """Share of trees among the proposals of simulated steps: two first tokens that are right by turns so often, chains of the first alone.

    extra: seconds of a step with a tree over those of one with a chain.
    """
    rand, one, trees, proposals = random.Random(seed), rows(1), 0, 0
    for _ in range(steps):
        n = schedule.lengths(one, [64])[0]
        branching, hit = schedule.branching and n > 1, rand.random()
        if branching:
            tree = Tree((1, 2, *range(n - 2)), (-1, -1, *[0] * (n - 2)))
            schedule.walked(one[0], tree, [0] if hit < first else [1] if hit < first + second else [])
        else:
            schedule.kept(one[0], n, int(hit < first))
        schedule.timed(1 + n, 0.0, 1 + 0.02 * n + extra * branching, branching if n else None)
        trees, proposals = trees + branching, proposals + (n > 0)
    return trees / max(proposals, 1)


def test_trees_are_proposed_where_they_bring_more_and_only_there() -> None:
    assert branch(Either(6, False), 400, 0.4, 0.4, 0.0) > 0.8
    assert branch(Either(6, False), 400, 0.7, 0.05, 0.3) < 0.2
    assert branch(Either(6, False), 400, 0.4, 0.4, 3.0) < 0.2
    schedule = Either(6, False)
    branch(schedule, 400, 0.7, 0.05, 0.3)
    branch(schedule, 4000, 0.3, 0.6, 0.0)
    assert branch(schedule, 400, 0.3, 0.6, 0.0) > 0.8, "trees must be tried again"


def test_nodes_of_a_tree_are_reckoned_by_how_often_they_were_kept() -> None:
    schedule = Trees(4, False)
    for _ in range(100):
        schedule.walked(rows(1)[0], Tree((1, 2, 3, 4), (-1, -1, 1, 2)), [1, 2])
    assert schedule.reached.round(1).tolist() == [0, 1, 1, 0]


def switched(schedule: Switch, steps: int, kept: int, cost: float) -> list[bool]:
    out = []
    for _ in range(steps):
        n = schedule.lengths(rows(1), [9])[0]
        schedule.kept(rows(1)[0], n, kept)
        schedule.timed(1 + n, 0.0, cost if n else 1.0, True if n else None)
        out.append(n > 0)
    return out


def test_what_is_proposed_whole_is_on_while_it_gains_and_seldom_tried_while_it_loses() -> None:
    assert switched(Switch(5), 100, 1, 1.5) == [False] + [True] * 99
    losing = Switch(5)
    assert switched(losing, 20, 0, 1.2)[1:12] == [True] * 11, "a trial lasts"
    tried = switched(losing, 3000, 0, 1.2)
    assert 16 < sum(tried) < 16 * 6
    assert sum(switched(Switch(5), 100, 0, 9.0)) == 1, "what is hopeless ends at once"
    assert sum(switched(losing, 9000, 2, 1.2)) > 4000


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
    assert curve.one_by_one(1, 20) == pytest.approx(curve.at(np.arange(1, 20)).tolist())


@pytest.mark.parametrize("drafting", [False, True])
def test_one_row_alone_gets_what_the_rule_says(drafting: bool) -> None:
    rand = random.Random(0)
    for _ in range(200):
        schedule = Goodput(12, drafting)
        for x, seconds in zip((1, 3, 7, 10), sorted(rand.uniform(1, 3) for _ in range(4)), strict=True):
            schedule.steps.add(x, seconds)
        schedule.rates[:] = [rand.random() for _ in range(12)]
        schedule.draft.add(rand.uniform(0, 0.3))
        assert schedule.best(rows(1), [9])[1] == [best_by_hand(schedule, 9)]


def best_by_hand(schedule: Goodput, most: int) -> int:
    """The rule, written out: tokens over seconds of each length, none unless another is better by the margin."""
    p = np.cumprod(0.5 * (schedule.rates.mean() + schedule.rates[:most]))
    tokens, lengths = np.concatenate([[1.0], 1 + p.cumsum()]), np.arange(most + 1)
    worth = tokens / (schedule.steps.at(1 + lengths) + lengths * (schedule.draft.value if schedule.drafting else 0.0))
    return int(worth.argmax()) if worth.max() >= MARGIN * worth[0] else 0


def test_bad_options() -> None:
    with pytest.raises(UserError, match="k=-1 must not be negative"):
        check("draft", -1, "goodput")
    with pytest.raises(UserError, match="did you mean 'goodput'"):
        check("draft", 1, "goodputs")
    with pytest.raises(UserError, match="branches=0 must be at least 1"):
        check("ngram", 1, "goodput", 0)
    with pytest.raises(UserError, match="ngram: branches: trees go through torch"):
        check_trees("ngram: branches", SimpleNamespace(model=SimpleNamespace(small_step=SimpleNamespace(int8=True))))
