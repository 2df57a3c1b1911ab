"""Staircases: the output is causal verification's, from a model of which no output but a row's last is ever asked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import CONFIGS, make, reference
from test_engine import MAX, answers, prompts

import hasten
from hasten import hf
from hasten.engine import run
from hasten.lm.attention import Plan, Span
from hasten.lm.constrain.allowed import Allowed
from hasten.lm.decode.draft import Vocabulary
from hasten.lm.decode.stairs import Options, Stairs, rows_of
from hasten.lm.engine import TokenEngine
from hasten.values import Request, Sampling, UserError


class LastOnly:
    """A model that gives one output a row: any other is an error."""

    def __init__(self, model: Any) -> None:
        self.model, self.rows = model, 0

    def takes(self, ids: torch.Tensor, plan: Any) -> bool:
        return isinstance(plan, Plan)

    def __call__(self, ids: torch.Tensor, positions: torch.Tensor, outputs: torch.Tensor | None, plan: Plan) -> torch.Tensor:
        ends = {s.offset + s.n - 1 for s in plan.spans}
        asked = range(len(ids)) if outputs is None else outputs.tolist()
        assert {*asked} <= ends
        self.rows = max(self.rows, len(plan.spans))
        return hf.torch_forward(self.model, ids, positions, outputs, plan)


def last_only(model: Any) -> Any:
    return hf.stepped(hf.shared_copy(model), LastOnly(model))


@pytest.fixture(scope="module")
def near(pairs: Any) -> Any:
    """A draft that agrees with its target about half of the time."""
    made: dict[str, Any] = {}

    def get(family: str) -> Any:
        if family not in made:
            model = make(family)
            torch.manual_seed(1)
            for p in model.parameters():
                p.data += 0.08 * p.data.std() * torch.randn_like(p)
            made[family] = hf.prepare(model)
        return made[family]

    return get


def stairs(model: Any, **options: Any) -> Stairs:
    return Stairs(Options(model="x", **{"schedule": "constant", **options}), model, Vocabulary(97))


@pytest.mark.parametrize("family", CONFIGS)
def test_greedy_is_identical_with_one_output_a_row(pairs: Any, near: Any, family: str) -> None:
    model, ours = pairs(family)
    asked = prompts(1)
    only = last_only(ours)
    engine = TokenEngine(only, decode=stairs(near(family)), max_rows=4, step_tokens=30)
    assert answers(engine, asked) == reference(model, asked, MAX)
    assert only.small_step.rows > 4  # several rows of one request in a pass


def test_causal_verification_needs_more_than_that(pairs: Any, near: Any) -> None:
    from hasten.lm.decode.draft import Draft
    from hasten.lm.decode.draft import Options as Causal

    _, ours = pairs("llama")
    engine = TokenEngine(last_only(ours), decode=Draft(Causal(model="x", schedule="constant"), near("llama"), Vocabulary(97)))
    with pytest.raises(AssertionError):
        answers(engine, prompts(1))


@pytest.mark.parametrize("schedule", ["goodput", "constant"])
def test_samples_are_identical_at_any_temperature(pairs: Any, near: Any, schedule: str) -> None:
    _, ours = pairs("llama")
    s = {"temperature": 0.9, "top_p": 0.95, "repetition_penalty": 1.2, "min_tokens": 4, "seed": 5}
    asked = prompts(6)
    memory = 400 * TokenEngine(ours).cache.shape.bytes_per_position
    engine = TokenEngine(last_only(ours), decode=stairs(near("llama"), k=8, schedule=schedule), memory=memory)
    assert answers(engine, asked, **s) == answers(TokenEngine(ours), asked, **s)


def test_constraints_hold(pairs: Any, near: Any) -> None:
    _, ours = pairs("qwen3")
    plain = TokenEngine(ours, constraint=Allowed(range(10, 14)))
    engine = TokenEngine(last_only(ours), constraint=Allowed(range(10, 14)), decode=stairs(near("qwen3")))
    s = {"temperature": 1.0, "max_tokens": 12}
    assert answers(engine, prompts(5), **s) == answers(plain, prompts(5), **s)
    assert engine.steps < plain.steps


def test_prompt_logprobs_come_from_stairs_too(pairs: Any, near: Any) -> None:
    _, ours = pairs("mistral")
    request = Request(list(range(5, 25)), Sampling(max_tokens=4, prompt_logprobs=0))
    want = run(TokenEngine(ours), {0: request})[0].prompt_logprobs
    got = run(TokenEngine(last_only(ours), decode=stairs(near("mistral"))), {0: request})[0].prompt_logprobs
    assert want is not None and got is not None
    for a, b in zip(want[1:], got[1:], strict=True):
        assert a is not None and b is not None
        assert a.token == b.token and a.logprob == pytest.approx(b.logprob)


def test_a_staircase_rises_by_one_token_a_row() -> None:
    spans = [Span(0, 7, 3, 0), Span(1, 4, 1, 3), Span(2, 0, 5, 4)]
    found = [(s.slot, s.start, s.n, s.offset, s.asked) for s in rows_of(spans, [0, 1, 2, 3])]
    assert found == [(0, 7, 1, 0, True), (0, 7, 2, 0, True), (0, 7, 3, 0, True), (1, 4, 1, 3, True), (2, 0, 5, 4, False)]


def test_the_ledger_counts_what_is_computed_again(pairs: Any) -> None:
    _, ours = pairs("llama")
    engine = TokenEngine(ours, decode=stairs(ours, k=3))
    got = run(engine, {0: Request(list(range(5, 45)), Sampling(max_tokens=5, ignore_eos=True))})[0]
    costs = engine.costs
    assert got.usage.by_role["stairs"].flops == sum(costs.flops(n, 40, 0) for n in (1, 2, 3))
    assert not engine.decode.extra


def test_a_recipe_and_bad_input() -> None:
    asked, s = ["a = 7 ; b = a * 3 ; c = b + a ; ? c :", "k = 2 ; d = 5 ; e = k * d ; ? e :"], Sampling(max_tokens=24)
    plain = hasten.load("zoo:arith-s").generate(asked, s)
    stepped = hasten.load("zoo:arith-s +stairs(model=zoo:arith-xs,schedule=constant)").generate(asked, s)
    assert [r.text for r in plain] == [r.text for r in stepped]
    with pytest.raises(UserError, match="stairs needs a draft model"):
        hasten.load("zoo:arith-s +stairs")
    for wrong, words in (({"k": -1}, "stairs: k=-1"), ({"schedule": "x"}, "no such schedule")):
        with pytest.raises(UserError, match=words):
            Options(model="x", **wrong)
