"""Lookahead decoding: identical output, the window as Jacobi iteration has it, the pool, and bad options. Greedy output of all families is
tested with the engine.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import CONFIGS
from test_engine import answers, prompts

from hasten.engine import run
from hasten.lm.constrain.allowed import Allowed
from hasten.lm.decode.lookahead import Lookahead, Options, Pool, build
from hasten.lm.engine import TokenEngine
from hasten.values import Request, Sampling, UserError


@pytest.mark.parametrize("family", CONFIGS)
def test_samples_under_a_constraint_are_identical(pairs: Any, family: str) -> None:
    _, ours = pairs(family)
    s = {"temperature": 0.9, "top_p": 0.95, "repetition_penalty": 1.2, "seed": 5}
    plain = TokenEngine(ours, constraint=Allowed(range(10, 40)))
    engine = TokenEngine(ours, constraint=Allowed(range(10, 40)), decode=Lookahead(Options(window=4, ngram=4, schedule="constant")))
    assert answers(engine, prompts(6), **s) == answers(plain, prompts(6), **s)


def test_a_model_that_counts_is_guessed_ahead(pairs: Any) -> None:
    """A target whose next token is a function of the last: once the window has gone round, whole n-grams are kept."""
    decode, text = Lookahead(Options(window=4, ngram=3, guesses=4, prompt=False)), [5]
    row: Any = SimpleNamespace(tokens=text, prompt=1, decode_state=None)
    after = lambda token: (3 * token + 1) % 7  # noqa: E731
    steps = 0
    while len(text) < 60:
        [proposal] = decode.draft([row], [9])
        chosen = [after(t) for t in (text[-1], *proposal.tokens)]
        text += decode.accept(row, proposal, chosen, torch.empty(0))
        steps += 1
    assert text == [text[0], *(after(t) for t in text[:-1])]
    assert steps < 30 and all(len(level) == 4 for level in row.decode_state.levels) and len(row.decode_state.levels) == 2
    grams = {(a, *rest) for a, several in row.decode_state.pool.after.items() for rest in several}
    assert {(t, after(t), after(after(t))) for t in text[-6:]} <= grams


def test_columns_stand_where_their_guesses_belong() -> None:
    """Level l of column i is a guess for position i + l + 1, however many tokens a pass has committed: a target that says each position's
    number fills the window with them. What it commits is above 1000, but in every fourth pass, when two guesses come true.
    """
    decode = Lookahead(Options(window=6, ngram=4, guesses=0, prompt=False))
    row: Any = SimpleNamespace(tokens=[1000], prompt=1, decode_state=None)
    for step in range(24):
        [proposal] = decode.draft([row], [99])
        last = len(row.tokens) - 1
        chosen = [1001 + step if step % 4 < 3 else last + 1, *(last + d + 2 for d in proposal.depths)]
        if step % 4 == 3:
            chosen[proposal.follow([last + 1, last + 2])[-1] + 1] = 1001 + step
        committed = decode.accept(row, proposal, chosen, torch.empty(0))
        assert len(committed) == (1 if step % 4 < 3 else 3)
        row.tokens += committed
        for lv, level in enumerate(row.decode_state.levels):
            assert all(x == len(row.tokens) + i + lv or x >= 1000 or x < len(row.tokens) for i, x in enumerate(level))
            assert level[0] == len(row.tokens) + lv or step < 4


def test_it_gains_on_text_that_repeats_and_counts_as_proposed(pairs: Any) -> None:
    _, ours = pairs("llama")
    s = Sampling(max_tokens=40, ignore_eos=True, logit_bias={7: 30.0, 8: 30.0}, seed=1)
    engine = TokenEngine(ours, decode=Lookahead(Options(schedule="constant")))
    got = run(engine, {0: Request([5, 6], s)})[0]
    assert got.tokens == run(TokenEngine(ours), {0: Request([5, 6], s)})[0].tokens
    cost = got.usage.by_role["target"]
    assert engine.steps < 30 and cost.accepted == 40 - cost.forwards and cost.proposed > cost.accepted


def test_the_pool_keeps_the_latest_of_each_token() -> None:
    pool = Pool(2)
    for gram in ((1, 2, 3), (1, 4, 5), (2, 2, 2), (1, 2, 3), (1, 6, 7)):
        pool.add(gram)
    assert pool.guesses(1) == [(6, 7), (2, 3)] and pool.guesses(2) == [(2, 2)] and pool.guesses(3) == []


def test_it_is_off_until_a_plain_step_is_known(pairs: Any) -> None:
    _, ours = pairs("llama")
    decode = Lookahead(Options())
    run(TokenEngine(ours, decode=decode), {0: Request([5, 6, 7], Sampling(max_tokens=12, ignore_eos=True))})
    assert (1, False) in decode.schedule.seconds and (1, True) in decode.schedule.seconds


@pytest.mark.parametrize(
    "wrong", [{"window": 0}, {"ngram": 1}, {"guesses": -1}, {"schedule": "heuristic"}, {"schedule": "goodputt"}, {"window": -3}]
)
def test_bad_options_are_refused_by_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="lookahead"):
        Options(**wrong)


def test_a_model_whose_steps_round_otherwise_is_refused() -> None:
    with pytest.raises(UserError, match=r"int8\(fused=false\)"):
        build(Options(), SimpleNamespace(model=SimpleNamespace(small_step=SimpleNamespace(int8=True))))
