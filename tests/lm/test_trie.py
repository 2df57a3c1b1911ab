"""The trie's steps against brute force, its index against the items it was built from."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import brute
import numpy as np
import pytest
import torch

from hasten.lm.constrain import trie as tries
from hasten.lm.constrain.trie import DEAD, Trie
from hasten.lm.constrain.trie_edit import edited
from hasten.lm.constrain.trie_filter import filtered
from hasten.lm.constrain.trie_step import begin, mask, step, transitions, walk
from hasten.native import build as native
from hasten.values import UserError

Item = tuple[int, ...]
KINDS = ["torch", "native"] if native.compiler() else ["torch"]


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def made(kind: str, items: Any, vocabulary: int, **options: Any) -> Trie:
    trie = tries.build(items, vocabulary, **options)
    if kind == "torch":
        trie.arrays.native = None
    assert (trie.arrays.native is not None) == (kind == "native")
    return trie


def random_items(rng: random.Random, n: int, vocabulary: int, lengths: Sequence[int], alike: float) -> list[Item]:
    """alike: how often a token is one of the first two of the vocabulary, so that prefixes are shared."""
    draw = lambda: rng.randrange(2 if rng.random() < alike else vocabulary) % vocabulary  # noqa: E731
    return [tuple(draw() for _ in range(rng.choice(lengths))) for _ in range(n)]


def model(vocabulary: int, seed: int, dtype: torch.dtype, levels: int = 0) -> Callable[[list[Item]], torch.Tensor]:
    """Log-probabilities as a function of the prefix. levels: logits take so few values, the same for each prefix in another order, so that many
    scores are equal."""

    def logp(some: list[Item]) -> torch.Tensor:
        rows = []
        for prefix in some:
            draw = torch.Generator().manual_seed(hash((seed, prefix)) % 2**31)
            rows.append(
                torch.arange(vocabulary)[torch.randperm(vocabulary, generator=draw)] % levels
                if levels
                else torch.randn(vocabulary, generator=draw)
            )
        return torch.log_softmax(torch.stack(rows).to(dtype).to(torch.float64 if dtype == torch.float64 else torch.float32), -1)

    return logp


def searched(trie: Trie, logp: Callable[[list[Item]], torch.Tensor], most: int, **options: Any) -> list[tuple[Item, float, int]]:
    """(item, score, row) of every beam that lives at the end."""
    beams, prefixes = begin([trie], logp([()]).dtype), [()]
    for depth in range(trie.width):
        s = step(trie.arrays, logp(prefixes), beams, most, trie.branch[depth], **options)
        chosen = zip(s.parents[0].tolist(), s.tokens[0].tolist(), strict=True)
        prefixes, beams = [prefixes[p] if t < 0 else (*prefixes[p], t) for p, t in chosen], s.beams
        assert bool((beams.alive == (beams.scores > -torch.inf)).all())
    last = zip(prefixes, beams.scores[0].tolist(), beams.states[0].tolist(), strict=True)
    return [(p, score, ~state) for p, score, state in last if state != DEAD]


CASES = [
    # items, vocabulary, lengths, alike, beams, dtype, levels
    (30, 50, [5], 0.0, 8, torch.float32, 0),
    (200, 7, [4], 0.5, 16, torch.float32, 2),
    (200, 7, [4], 0.5, 300, torch.float32, 2),
    (60, 3, [6], 0.9, 5, torch.bfloat16, 0),
    (40, 300, [3], 0.3, 10, torch.float64, 3),
    (1, 11, [4], 0.0, 3, torch.float32, 0),
    (9, 4, [1], 0.0, 6, torch.float32, 1),
    (50, 2000, [2], 0.8, 70, torch.bfloat16, 1),
    (60, 40, [2, 3, 5], 0.0, 7, torch.float32, 0),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_beams_are_those_of_brute_force_in_order(kind: str, case: Any) -> None:
    """Items, scores to the last bit and the order of ties."""
    n, vocabulary, lengths, alike, most, dtype, levels = case
    for seed in range(4):
        items = random_items(random.Random(seed), n, vocabulary - 1, lengths, alike)
        end = vocabulary - 1 if len(lengths) > 1 else None
        trie, logp = made(kind, items, vocabulary, end=end), model(vocabulary, seed, dtype, levels)
        whole = [(*item, end) if end is not None else item for item in items]
        found = searched(trie, logp, most)
        assert [(i, s) for i, s, _ in found] == brute.beams(whole, logp, most)
        for item, _, row in found:
            assert trie.tuple_of(row) == item
            assert list(trie.items(row)) == [k for k, other in enumerate(whole) if other == item]


def test_as_many_beams_as_items_give_all_of_them_in_order_of_score(kind: str) -> None:
    items = random_items(random.Random(5), 120, 9, [4], 0.3)
    logp = model(9, 5, torch.float64)
    scores = {i: sum(float(logp([i[:n]])[0, t]) for n, t in enumerate(i)) for i in items}
    found = searched(made(kind, items, 9), logp, 150)
    assert [i for i, _, _ in found] == sorted(scores, key=lambda i: -scores[i])


def test_items_of_different_lengths_without_an_end(kind: str) -> None:
    items = [(1, 2), (1, 3, 4), (0,), (2, 2, 2, 2), (2, 2, 2, 3)]
    logp = model(6, 1, torch.float32)
    found = searched(made(kind, items, 6), logp, 4)
    assert [(i, s) for i, s, _ in found] == brute.beams(items, logp, 4)


def test_tokens_that_cannot_be_chosen_are_not(kind: str) -> None:
    """Minus infinity and NaN; beams that are missing are dead and stay dead."""
    trie = made(kind, [(0, 1), (1, 1), (2, 1), (3, 0)], 4)
    first = torch.tensor([[-1.0, float("-inf"), float("nan"), -2.0]])
    one = step(trie.arrays, first, begin([trie]), 4, 4)
    assert one.tokens.tolist() == [[0, 3, -1, -1]] and one.beams.alive.tolist() == [[True, True, False, False]]
    two = step(trie.arrays, torch.zeros(4, 4), one.beams, 4, 4)
    assert two.tokens.tolist() == [[1, 0, -1, -1]] and two.beams.scores.tolist() == [[-1.0, -2.0, -torch.inf, -torch.inf]]
    none = step(trie.arrays, torch.full((4, 4), -torch.inf), one.beams, 3, 4)
    assert none.beams.states.tolist() == [[DEAD] * 3]


def test_both_kinds_of_step_agree_on_a_large_skewed_set() -> None:
    if "native" not in KINDS:
        pytest.skip("no compiler")
    draw = np.random.default_rng(0)
    items = np.minimum(draw.zipf(1.3, (30000, 6)), 700) - 1
    a, b = made("native", items, 1024), made("torch", items, 1024)
    passing = draw.random(30000) < 0.3
    filters = [[filtered(t, passing), None] for t in (a, b)]
    beams = begin([a, a])
    for depth in range(6):
        rows = beams.states.numel()
        logp = torch.log_softmax(torch.randn(rows, 1024, generator=torch.Generator().manual_seed(depth)).bfloat16().float(), -1)
        one, two = (step(t.arrays, logp, beams, 33, t.branch[depth], f) for t, f in zip((a, b), filters, strict=True))
        for x, y in (
            (one.parents, two.parents),
            (one.tokens, two.tokens),
            (one.beams.states, two.beams.states),
            (one.beams.scores, two.beams.scores),
        ):
            assert torch.equal(x, y)
        many = [f for f in filters[0] for _ in range(rows // 2)]
        masks = [
            mask(t.arrays, beams.states.flatten(), beams.depths.repeat_interleave(rows // 2), 1024, t.branch[depth], f)
            for t, f in ((a, many), (b, [filters[1][0] if f else None for f in many]))
        ]
        assert torch.equal(*masks) and bool(masks[0].any(1).all())
        beams = one.beams
    for state in (~beams.states[0]).tolist():
        assert any(passing[i] for i in a.items(state))


def test_mask_and_candidates_are_one_thing(kind: str) -> None:
    items = random_items(random.Random(2), 80, 20, [4], 0.5)
    trie, follow = made(kind, items, 20), brute.prefixes(items)
    some = sorted({i[:n] for i in items for n in range(4)}, key=lambda p: (len(p), p))
    for prefix in some:
        state = walk(trie.arrays, torch.tensor([trie.root], dtype=torch.int32), torch.tensor([prefix], dtype=torch.long).view(1, -1), 20)
        depth = torch.tensor([len(prefix)], dtype=torch.int32)
        allowed = mask(trie.arrays, state, depth, 20, 20)[0]
        tokens, _, valid = transitions(trie.arrays, state, depth, 20)
        assert set(allowed.nonzero()[:, 0].tolist()) == follow[prefix] == set(tokens[valid].tolist())
        assert set(trie.children(int(state), len(prefix))[0].tolist()) == follow[prefix]
    wrong = walk(trie.arrays, torch.zeros(3, dtype=torch.int32), torch.tensor([[19, 19, 19, 19], [-1, 0, 0, 0], [10**12, 0, 0, 0]]), 20)
    assert wrong.tolist() == [DEAD] * 3


def test_sorted_or_not_numpy_or_tuples_the_index_is_the_same() -> None:
    items = np.random.default_rng(1).integers(0, 60, (500, 5))
    one, two, three = (
        tries.build(items, 64),
        tries.build(items[np.lexsort(items.T[::-1])], 64),
        tries.build([tuple(i) for i in items.tolist()], 64),
    )
    for other in (two, three, tries.build(torch.from_numpy(items.astype(np.int32)), 64)):
        for name in ("first", "tokens", "next", "table"):
            assert torch.equal(getattr(one.arrays, name), getattr(other.arrays, name)), name
    assert two.order is None and one.order is not None


@pytest.mark.parametrize("high", [3, 200, 60000, 2_000_000])
def test_tokens_of_any_size_and_keys_of_several_words(high: int) -> None:
    items = np.random.default_rng(high).integers(0, high, (300, 9)) + 100
    items[100:200, :7] = items[0, :7]
    trie = tries.build(items, high + 100)
    assert sorted({trie.tuple_of(r) for r in range(trie.rows)}) == sorted(set(map(tuple, items.tolist())))
    assert [trie.tuple_of(r) for r in range(trie.rows)] == sorted(trie.tuple_of(r) for r in range(trie.rows))
    ends = walk(trie.arrays, torch.zeros(300, dtype=torch.int32), torch.from_numpy(items), max(trie.branch))
    for i, state in enumerate(ends.tolist()):
        assert i in trie.items(~state)


def test_sets_in_one_batch_keep_to_themselves(kind: str) -> None:
    sets = [random_items(random.Random(s), 40, 30, [4], 0.4) for s in range(2)] + [random_items(random.Random(9), 20, 500, [3], 0.2)]
    joined = tries.join([tries.build(s, 600) for s in sets])
    for t in joined:
        t.arrays.native = None if kind == "torch" else t.arrays.native
    logp = model(600, 3, torch.float32)
    beams, prefixes = begin(joined), [[()] for _ in joined]
    for depth in range(4):
        rows = torch.cat([logp(p) for p in prefixes])
        s = step(joined[0].arrays, rows, beams, 6, max(t.branch[depth] for t in joined if depth < t.width))
        beams = s.beams
        prefixes = [
            [old[p] if t < 0 else (*old[p], t) for p, t in zip(ps, ts, strict=True)]
            for old, ps, ts in zip(prefixes, s.parents.tolist(), s.tokens.tolist(), strict=True)
        ]
    for trie, items, found, scores, states in zip(joined, sets, prefixes, beams.scores.tolist(), beams.states.tolist(), strict=True):
        assert list(zip(found, scores, strict=True)) == brute.beams(items, logp, 6)
        for item, state in zip(found, states, strict=True):
            assert [items[i] for i in trie.items(~state)] and all(items[i] == item for i in trie.items(~state))


def test_a_filter_is_the_trie_of_what_passes(kind: str) -> None:
    items = random_items(random.Random(7), 150, 12, [4], 0.5)
    passing = np.array([random.Random(i).random() < 0.2 for i in range(150)])
    trie, logp = made(kind, items, 12), model(12, 7, torch.float32, 2)
    found = searched(trie, logp, 9, filters=[filtered(trie, passing)])
    assert [(i, s) for i, s, _ in found] == brute.beams([i for i, p in zip(items, passing, strict=True) if p], logp, 9)
    with pytest.raises(UserError, match="no item passes"):
        filtered(trie, np.zeros(150, bool))
    with pytest.raises(UserError, match="150 items"):
        filtered(trie, np.ones(149, bool))


def test_saved_and_mapped(tmp_path: Any, kind: str) -> None:
    items = random_items(random.Random(3), 90, 40, [2, 4], 0.3)
    one = tries.build(items, 41, end=40)
    one.save(tmp_path / "set")
    two = tries.load(tmp_path / "set", 41)
    if kind == "torch":
        two.arrays.native = None
    logp = model(41, 0, torch.float32)
    assert searched(one, logp, 8) == searched(two, logp, 8)
    assert [one.items(r) for r in range(one.rows)] == [two.items(r) for r in range(two.rows)]
    with open("/proc/self/maps") as maps:
        assert str(tmp_path / "set" / "arrays.safetensors") in maps.read()
    with pytest.raises(UserError, match="another vocabulary"):
        tries.load(tmp_path / "set", 50)


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([], "the item set is empty"),
        (np.zeros((0, 3), int), "the item set is empty"),
        ([(1, 2), ()], "item 1 has no tokens"),
        ([(1, 2), (1, 9)], "item 1 has the token 9 at place 1, outside the vocabulary of 8 tokens"),
        ([(1, 2), (-1, 2)], "item 1 has the token -1 at place 0"),
        ([(1, 2), (2**70, 2)], "item 1 has a token that is no id"),
        ([(1, 2), (1.5, 2)], r"item 1 is \(1.5, 2\), and tokens are whole numbers"),
        ([(1, 2), (True, 2)], "item 1 is"),
        ([(1, 2), 3], "item 1 is 3, not a tuple of tokens"),
        ([(1, 2), "12"], "item 1 is '12', not a tuple of tokens"),
        (np.ones((2, 2)), "whole numbers"),
        (np.ones(4, int), r"an array \[N, length\]"),
        ([(3, 4, 5), (1,), (3, 4)], "item 2 is the beginning of item 0; give end"),
        ([(3, 4), (1,), (3, 4), (3, 4, 5), (1,)], "item 1 is|item 0 is the beginning of item 3|item 2 is the beginning"),
    ],
)
def test_wrong_items_are_refused_in_a_sentence(items: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        tries.build(items, 8)
    with pytest.raises(UserError, match="end=8 is outside"):
        tries.build([(1, 2)], 8, end=8)


def test_edits_give_the_trie_of_what_is_left_and_older_versions_stay(kind: str) -> None:
    rng = random.Random(11)
    every = list(dict.fromkeys(random_items(rng, 400, 9, [4], 0.5)))
    now, trie = set(every[:60]), made(kind, every[:60], 500)
    places = dict(enumerate(every[:60]))
    versions = []
    logp = model(500, 4, torch.float32, 2)
    for i in range(12):
        gone = rng.sample(sorted(now), 9)
        new = [*[e for e in every if e not in now][:7], gone[0], sorted(now)[5], (i, 400 - i, 7, 7)]
        places |= dict(enumerate(new, trie.size))
        trie, now = edited(trie, new, gone), (now - set(gone)) | set(new)
        versions.append((trie, sorted(now)))
        if rng.random() < 0.3:
            edited(trie, [(8, 8, 8, 8)])  # a version beside the one that goes on
    for version, items in versions:
        found = searched(version, logp, 11)
        assert [(p, s) for p, s, _ in found] == brute.beams(items, logp, 11)
        assert all(places[i] == p for p, _, row in found for i in version.items(row)) and all(version.items(row) for _, _, row in found)
        passing = np.array([sum(places[i]) % 3 == 0 for i in range(version.size)])
        found = searched(version, logp, 11, filters=[filtered(version, passing)])
        assert [(p, s) for p, s, _ in found] == brute.beams([i for i in items if sum(i) % 3 == 0], logp, 11)


def test_a_search_goes_on_with_its_version_while_the_set_changes(kind: str) -> None:
    items = random_items(random.Random(1), 80, 10, [4], 0.5)
    trie, logp = made(kind, items, 10), model(10, 1, torch.float32)
    current = edited(trie, [(9, 9, 9, 9)])  # with room to be edited in place
    inside = brute.beams([*items, (9, 9, 9, 9)], logp, 8)
    beams, prefixes = begin([current], torch.float32), [()]
    for depth in range(4):
        later = edited(current, [(depth, 9, 9, 8)], [items[depth]])
        assert later.arrays is current.arrays or depth > 0
        s = step(current.arrays, logp(prefixes), beams, 8, current.branch[depth])
        prefixes, beams = [(*prefixes[p], t) for p, t in zip(s.parents[0].tolist(), s.tokens[0].tolist(), strict=True)], s.beams
    assert list(zip(prefixes, beams.scores[0].tolist(), strict=True)) == inside


def test_sets_may_be_emptied_lengthened_and_be_ragged(kind: str) -> None:
    trie = made(kind, [(5, 1), (5, 2)], 300)
    assert searched(edited(trie, delete=[(5, 1), (5, 2)]), model(300, 0, torch.float32), 3) == []
    one = edited(trie, delete=[(5, 1)])
    assert [p for p, _, _ in searched(one, model(300, 0, torch.float32), 3)] == [(5, 2)]
    more = edited(edited(one, delete=[(5, 2)]), [(1, 2, 3), (299,), (5, 1)])
    items = [(1, 2, 3), (299,), (5, 1)]
    found = searched(more, model(300, 0, torch.float32), 5)
    assert [(p, s) for p, s, _ in found] == brute.beams(items, model(300, 0, torch.float32), 5)
    assert [more.items(row) for p, _, row in sorted(found)] == [(2,), (4,), (3,)]
    assert [edited(more, [(299,)]).items(row) for p, _, row in found if p == (299,)] == [(3, 5)]
    with pytest.raises(UserError, match=r"item \(1, 2\) is the beginning of another"):
        edited(more, [(1, 2)])
    with pytest.raises(UserError, match="item 1 to delete"):
        edited(more, delete=[(5, 1), (5, 2)])
    with pytest.raises(UserError, match="item 0 has the token 300"):
        edited(more, [(300, 1)])


INTERPRETED = """
import random, torch
import test_trie as t
from hasten.lm.constrain import trie_step, trie_triton
from hasten.lm.constrain.trie_step import Beams, step
rng = random.Random(0)
for case in range(12):
    lengths, vocabulary = ([5], [2, 3, 5])[case % 2], (9, 300, 70000)[case % 3]
    trie = t.made("torch", t.random_items(rng, 60, vocabulary - 1, lengths, 0.6), vocabulary, end=vocabulary - 1)
    beams = trie_step.begin([trie, trie], torch.float64 if case % 4 == 3 else torch.float32)
    for depth in range(trie.width):
        rows = beams.states.numel()
        logp = torch.log_softmax(torch.randn(rows, vocabulary, dtype=beams.scores.dtype), -1)
        logp[0, :3], logp[-1, 1] = float("nan"), float("-inf")
        one = trie_step.candidates(trie.arrays, logp, beams.states, beams.depths, beams.scores, trie.branch[depth])
        two = trie_triton.candidates(trie.arrays, logp, beams.states, beams.depths, beams.scores, trie.branch[depth])
        assert all(torch.equal(a, b) for a, b in zip(one, two)), (case, depth)
        beams = step(trie.arrays, logp, beams, 5, trie.branch[depth]).beams
print("same")
"""


def test_the_triton_kernel_gives_the_same_candidates() -> None:
    """In Triton's interpreter, which must be chosen before Triton is imported."""
    pytest.importorskip("triton")
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", INTERPRETED], env=env, capture_output=True, text=True)
    assert done.stdout == "same\n", done.stderr[-3000:]
