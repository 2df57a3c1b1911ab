"""Beam search against its definition: the same items or texts, scores and order as brute force with the naive model."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import brute
import numpy as np
import pytest
import torch

from hasten.engine import run
from hasten.lm import beam_select
from hasten.lm.beam import BeamEngine
from hasten.lm.constrain import trie as tries
from hasten.lm.constrain.allowed import Allowed
from hasten.lm.constrain.items import Items
from hasten.lm.constrain.trie_edit import edited
from hasten.lm.constrain.trie_filter import filtered
from hasten.lm.decode.beam import Beam, Options
from hasten.values import Request, Result, Sampling, UserError

END = 2
Item = tuple[int, ...]


def some(seed: int, n: int = 80, lengths: tuple[int, ...] = (6,), alike: float = 0.7) -> list[Item]:
    rng = random.Random(seed)
    draw = lambda: rng.randrange(3, 6 if rng.random() < alike else 97)  # noqa: E731
    return list(dict.fromkeys(tuple(draw() for _ in range(rng.choice(lengths))) for _ in range(n)))


def naive(model: Any, prompt: list[int]) -> Callable[[list[Item]], torch.Tensor]:
    return lambda prefixes: torch.stack([torch.log_softmax(model(torch.tensor([[*prompt, *p]])).logits[0, -1], -1) for p in prefixes])


def engine(ours: Any, trie: Any = None, engine_options: Any = None, **options: Any) -> BeamEngine:
    constraint = None if trie is None else Items(trie, [END])
    made = Beam(Options(**options)).engine(ours, constraint=constraint, **engine_options or {})
    assert isinstance(made, BeamEngine)
    return made


def answers(result: Result) -> list[tuple[Item, float]]:
    return [(tuple(r.tokens), r.trace["logprob"]) for r in (result, *result.others)]


def agree(found: list[tuple[Item, float]], wanted: list[tuple[Item, float]]) -> None:
    assert [i for i, _ in found] == [i for i, _ in wanted]
    assert [s for _, s in found] == pytest.approx([s for _, s in wanted], rel=1e-9)


ASKED = [[5, 6, 7, 8, 9, 10], [5, 6, 7, 8, 40], [11]]


@pytest.mark.parametrize("forced", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_items_are_those_of_brute_force(pairs: Any, family: str, forced: bool) -> None:
    model, ours = pairs(family)
    items = some(1)
    for width, options in ((5, {}), (1, {}), (12, {"step_tokens": 4, "max_rows": 15})):
        one = engine(ours, tries.build(items, 97), options, width=width, forced=forced)
        done = run(one, {i: Request(p, Sampling(n=width)) for i, p in enumerate(ASKED)})
        for i, prompt in enumerate(ASKED):
            agree(answers(done[i]), brute.beams(items, naive(model, prompt), width))
            assert all(items[k] == r.tokens for r in (done[i], *done[i].others) for k in r.trace["items"])
        assert one.cache.active == 0 and one.idle


def test_as_many_beams_as_items_give_all_of_them(pairs: Any) -> None:
    model, ours = pairs("llama")
    items = some(2, 30)
    logp = naive(model, [4, 5])
    scores = {i: sum(float(logp([i[:n]])[0, t]) for n, t in enumerate(i)) for i in items}
    (done,) = run(engine(ours, tries.build(items, 97), width=40), {0: Request([4, 5], Sampling(n=40))}).values()
    agree(answers(done), sorted(scores.items(), key=lambda x: -x[1]))


def test_what_is_forced_costs_no_pass(pairs: Any) -> None:
    _, ours = pairs("llama")
    items = some(3, 60, alike=0.1)
    costs = {}
    for forced in (True, False):
        done = run(engine(ours, tries.build(items, 97), width=4, forced=forced), {0: Request([7, 8, 9], Sampling(n=4))})[0]
        costs[forced] = done.usage.by_role["target"], answers(done)
    agree(costs[True][1], costs[False][1])
    assert costs[False][0].forwards == 6 and costs[False][0].saved == 0
    assert costs[True][0].forwards + costs[True][0].saved == 6 and costs[True][0].saved >= 2


def test_items_of_different_lengths_with_and_without_an_end(pairs: Any) -> None:
    model, ours = pairs("qwen3")
    items = some(4, 60, (2, 4, 7), 0.5)
    trie = tries.build(items, 97, end=END)
    (done,) = run(engine(ours, trie, width=9), {0: Request([4, 5], Sampling(n=9))}).values()
    agree(answers(done), brute.beams([(*i, END) for i in items], naive(model, [4, 5]), 9))
    free = [i for i in items if not any(o[: len(i)] == i and o != i for o in items)]
    for forced in (True, False):
        (done,) = run(engine(ours, tries.build(free, 97), width=9, forced=forced), {0: Request([4, 5], Sampling(n=9))}).values()
        agree(answers(done), brute.beams(free, naive(model, [4, 5]), 9))


def test_exact_tail_finds_the_best_item_below_the_beams(pairs: Any) -> None:
    """And prunes less: somewhere it is better than plain beam search, nowhere worse."""
    model, ours = pairs("llama")
    better = 0
    for seed in range(6):
        items = some(seed, 40, alike=0.5)
        plain, exact = (
            answers(run(engine(ours, tries.build(items, 97), width=2, exact_tail=k), {0: Request([seed + 3], Sampling(n=2))})[0])
            for k in (0, 64)
        )
        logp = naive(model, [seed + 3])
        scores = {i: sum(float(logp([i[:n]])[0, t]) for n, t in enumerate(i)) for i in items}
        first = {i[0] for i, _ in brute.beams([i[:1] for i in items], logp, 2)}
        agree(exact, sorted(((i, x) for i, x in scores.items() if i[0] in first), key=lambda x: -x[1])[:2])
        assert exact[0][1] >= plain[0][1] - 1e-9
        better += exact[0][1] > plain[0][1] + 1e-6 or exact[1][1] > plain[1][1] + 1e-6
    assert better


def test_a_filter_and_a_swap(pairs: Any) -> None:
    model, ours = pairs("llama")
    items = some(5)
    trie = tries.build(items, 97)
    one = engine(ours, trie, width=6)
    passing = np.array([sum(i) % 2 == 0 for i in items])
    keep = filtered(trie, passing)
    one.add("some", Request([9, 9], Sampling(n=6)), keep=keep)
    one.step()
    one.constraint.swap(edited(trie, delete=items[:40]))
    one.add("rest", Request([9, 9], Sampling(n=6)))
    with pytest.raises(UserError, match="the version of the item set"):
        one.add("late", Request([9, 9]), keep=keep)
    done = {}
    while not one.idle:
        done |= {e.key: e.result for e in one.step() if e.result}
    agree(answers(done["some"]), brute.beams([i for i, p in zip(items, passing, strict=True) if p], naive(model, [9, 9]), 6))
    agree(answers(done["rest"]), brute.beams(items[40:], naive(model, [9, 9]), 6))


def plain_beams(model: Any, prompt: list[int], width: int, tokens: int, allowed: range, ends: tuple[int, ...]) -> list[tuple[Item, float]]:
    live: list[tuple[Item, float]] = [((), 0.0)]
    for _ in range(tokens):
        found = []
        for text, score in live:
            if text and text[-1] in ends:
                found.append((text, score))
                continue
            logp = torch.log_softmax(model(torch.tensor([[*prompt, *text]])).logits[0, -1], -1)
            found += [((*text, t), score + float(logp[t])) for t in allowed]
        live = sorted(found, key=lambda f: -f[1])[:width]
    return live


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_without_items_texts_are_those_of_brute_force(pairs: Any, family: str) -> None:
    model, ours = pairs(family)
    ends = (END, *range(60, 75))
    s = Sampling(n=3, max_tokens=6, stop_token_ids=ends[1:])
    done = run(engine(ours, width=3), {i: Request(p, s) for i, p in enumerate(ASKED)})
    for i, prompt in enumerate(ASKED):
        agree(answers(done[i]), plain_beams(model, prompt, 3, 6, range(97), ends))
        assert [r.finish_reason for r in (done[i], *done[i].others)] == ["stop" if t[-1] in ends else "length" for t, _ in answers(done[i])]
    masked = Beam(Options(width=3)).engine(ours, constraint=Allowed(range(10, 70)))
    (one,) = run(masked, {0: Request(ASKED[0], s)}).values()
    agree(answers(one), plain_beams(model, ASKED[0], 3, 6, range(10, 70), ends))


def test_equal_scores_are_taken_in_order() -> None:
    x = torch.tensor([1.0, 3.0, 2.0, 3.0, 2.0, 2.0, -math.inf])
    assert [beam_select.largest(x, n).tolist() for n in (1, 2, 4, 7)] == [[1], [1, 3], [1, 3, 2, 4], [1, 3, 2, 4, 5, 0, 6]]
    assert beam_select.largest(torch.zeros(5), 2).tolist() == [0, 1]


def test_cancelled_and_scored(pairs: Any) -> None:
    _, ours = pairs("llama")
    one = engine(ours, tries.build(some(6), 97), width=4)
    one.add("a", Request([5, 6, 7]))
    one.add("s", Request([5, 6, 7], score=True))
    done = {e.key: e.result.finish_reason for e in one.step() if e.result}
    one.cancel("a")
    while not one.idle:
        done |= {e.key: e.result.finish_reason for e in one.step() if e.result}
    assert done == {"a": "cancelled", "s": "scored"} and one.cache.active == 0


@pytest.mark.parametrize(
    ("request_options", "message"),
    [
        ({"temperature": 0.5}, "temperature=0.5 means nothing"),
        ({"logprobs": 1}, "logprobs=1"),
        ({"n": 5}, r"n=5 answers of 4 beams; give beam\(width=5\)"),
        ({"max_tokens": 5}, "max_tokens=5 is too few, and the longest item has 6"),
        ({"max_tokens": 400}, "positions"),
    ],
)
def test_what_means_nothing_is_refused(pairs: Any, request_options: dict[str, Any], message: str) -> None:
    one = engine(pairs("llama")[1], tries.build(some(6), 97), width=4)
    with pytest.raises(UserError, match=message):
        one.add(1, Request([5], Sampling(**request_options)))
    with pytest.raises(UserError, match="do not fit"):
        engine(pairs("llama")[1], width=200).add(1, Request([5]))
