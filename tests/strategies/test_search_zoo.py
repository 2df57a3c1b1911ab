"""Searches over the zoo's models: what forks and incremental rewards give is what whole samples and whole scores give."""

from __future__ import annotations

from typing import Any

import pytest

import hasten
from hasten.load import Models
from hasten.measure.tasks import load_task
from hasten.values import Sampling

JUDGE = "reward=zoo:arith-prm-s"


@pytest.fixture(scope="module")
def models() -> Models:
    return Models()


@pytest.fixture(scope="module")
def prompts() -> list[Any]:
    return [item.prompt for item in load_task("arith").items["calibration"][:6]]


def test_width_one_is_one_sample(models: Models, prompts: list[Any]) -> None:
    sampling = Sampling(max_tokens=160, temperature=1.0, seed=3)
    plain = hasten.load("zoo:arith-xs", models=models).generate(prompts, sampling)
    one = hasten.load(f"zoo:arith-xs +rebase(width=1,{JUDGE})", models=models).generate(prompts, sampling)
    assert [r.tokens for r in one] == [r.tokens for r in plain]
    assert [r.text for r in one] == [r.text for r in plain]


def test_forks_change_nothing_and_rewards_are_those_of_whole_solutions(models: Models, prompts: list[Any]) -> None:
    sampling = Sampling(max_tokens=160, seed=1)
    forked = hasten.load(f"zoo:arith-s +rebase(width=6,{JUDGE})", models=models)
    found = forked.generate(prompts, sampling)
    alone = hasten.load(f"zoo:arith-s +prefix(share=false) +rebase(width=6,{JUDGE})", models=models).generate(prompts, sampling)
    assert [r.tokens for r in found] == [r.tokens for r in alone]
    assert sum(r.usage.by_role["target"].reused for r in found) > sum(r.usage.by_role["target"].prompt for r in found) / 2
    judge = hasten.load("zoo:arith-prm-s", models=models)
    for r in found:
        whole = judge.score([(*r.prompt_tokens, *r.tokens)], len(r.prompt_tokens))[0].scores
        assert whole[-1] == pytest.approx(r.trace["rewards"][r.trace["chosen"]], abs=1e-4)
