"""The technique `trie`: plain and speculative decoding give items of the set, the ones that masked greedy decoding gives."""

from __future__ import annotations

import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import brute
import numpy as np
import pytest
import torch

from hasten.engine import run
from hasten.lm.constrain import items as technique
from hasten.lm.constrain import trie as tries
from hasten.lm.constrain.items import Items, Options
from hasten.lm.constrain.trie_edit import edited
from hasten.lm.decode.ngram import Ngram
from hasten.lm.decode.ngram import Options as NgramOptions
from hasten.lm.engine import TokenEngine
from hasten.values import Request, Sampling, UserError

END = 2


def some(seed: int, n: int = 60) -> list[tuple[int, ...]]:
    rng = random.Random(seed)
    return [tuple(rng.randrange(3, 97 if rng.random() < 0.3 else 7) for _ in range(6)) for _ in range(n)]


def masked_greedy(model: Any, prompt: list[int], items: list[tuple[int, ...]]) -> list[int]:
    follow, out = brute.prefixes(items), []
    while tuple(out) in follow:
        logits = model(torch.tensor([prompt + out])).logits[0, -1]
        out.append(max(sorted(follow[tuple(out)]), key=lambda t: float(logits[t])))
    return out


@pytest.mark.parametrize("k", [0, 4])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_greedy_answers_are_those_of_masked_decoding(pairs: Any, family: str, k: int) -> None:
    model, ours = pairs(family)
    items = some(1)
    asked = [[5, 6, 7, 8], [50, 3, *(t for i in items[:15] for t in i)], [*items[3], *items[3], 3]]
    decode = Ngram(NgramOptions(k=k, shortest=1, schedule="constant"))
    engine = TokenEngine(ours, constraint=Items(tries.build(items, 97), [END]), decode=decode)
    results = list(run(engine, {i: Request(p, Sampling()) for i, p in enumerate(asked)}).values())
    for prompt, result in zip(asked, results, strict=True):
        assert list(result.tokens) == [*masked_greedy(model, prompt, items), END] and result.finish_reason == "stop"
    assert (sum(r.usage.total.proposed for r in results) > 0) == (k > 0)


def test_speculation_changes_nothing_when_sampling(pairs: Any) -> None:
    _, ours = pairs("qwen3")
    items = some(2)
    asked = {
        i: Request([40, 4, 5, *items[i][:4], *items[i]], Sampling(temperature=1.5, seed=i, ignore_eos=i == 3, max_tokens=9))
        for i in range(5)
    }
    found = []
    for k in (0, 5):
        decode = Ngram(NgramOptions(k=k, shortest=1, schedule="constant"))
        found.append(
            [r.tokens for r in run(TokenEngine(ours, constraint=Items(tries.build(items, 97), [END]), decode=decode), asked).values()]
        )
    assert found[0] == found[1]
    assert all(t[:6] in items for t in found[0]) and found[0][3][6:] == (END, END, END)


def test_requests_keep_the_set_that_they_began_with(pairs: Any) -> None:
    model, ours = pairs("llama")
    items = some(3)
    constraint = Items(tries.build(items, 97), [END])
    engine = TokenEngine(ours, constraint=constraint)
    engine.add("old", Request([9, 8, 7]))
    engine.step()
    best = tuple(masked_greedy(model, [9, 8, 7], items))
    constraint.swap(edited(constraint.trie, delete=[best]))
    rest = [i for i in items if i != best]
    engine.add("new", Request([9, 8, 7]))
    done: dict[Any, Any] = {}
    while not engine.idle:
        done |= {e.key: e.result.tokens for e in engine.step() if e.result}
    assert done == {"old": (*best, END), "new": (*masked_greedy(model, [9, 8, 7], rest), END)}
    with pytest.raises(UserError, match="made for a vocabulary of 98"):
        constraint.swap(tries.build(items, 98))


def test_what_no_item_allows_is_refused(pairs: Any) -> None:
    engine = TokenEngine(pairs("llama")[1], constraint=Items(tries.build(some(4), 97), [END]))
    with pytest.raises(UserError, match="min_tokens=7, but the set has an item of 6 tokens"):
        engine.add(1, Request([5], Sampling(min_tokens=7)))
    with pytest.raises(UserError, match="stop_token_ids"):
        engine.add(1, Request([5], Sampling(min_tokens=2, stop_token_ids=(5,))))
    (result,) = run(engine, {1: Request([5], Sampling(min_tokens=6))}).values()
    assert len(result.tokens) == 7


def test_sets_are_read_from_artifacts_and_files(tmp_path: Path) -> None:
    target: Any = SimpleNamespace(vocabulary=97, end_ids=(END,))
    items = some(5)
    np.save(tmp_path / "set.npy", np.array(items))
    (tmp_path / "set.jsonl").write_text("\n".join(json.dumps(i) for i in items))
    saved = tries.build(items, 97).save(tmp_path / "set")
    for where in (tmp_path / "set.npy", tmp_path / "set.jsonl", tmp_path / "set", saved.reference):
        found = technique.build(Options(str(where)), target)
        assert {found.trie.tuple_of(r) for r in range(found.trie.rows)} == set(items)
    ended = technique.build(Options(str(tmp_path / "set.npy"), end=True), target).trie
    assert {ended.tuple_of(r) for r in range(ended.rows)} == {(*i, END) for i in items}


def test_wrong_sets_are_refused_in_a_sentence(tmp_path: Path) -> None:
    target: Any = SimpleNamespace(vocabulary=97, end_ids=(END,))
    (tmp_path / "a.jsonl").write_text("[1, 2]\n{}\n")
    (tmp_path / "b.npy").write_text("no array")
    (tmp_path / "c.txt").write_text("")
    for where, message in {
        "": "needs a set",
        "a.jsonl": "line 2 is not a list",
        "b.npy": "no array",
        "c.txt": "is .npy or .jsonl",
        "d": "no artifact",
    }.items():
        with pytest.raises(UserError, match=message):
            technique.build(Options(str(tmp_path / where) if where else ""), target)
    with pytest.raises(UserError, match="no end token"):
        technique.build(Options("x"), SimpleNamespace(vocabulary=97, end_ids=()))
