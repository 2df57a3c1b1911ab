"""Trees of proposed tokens: what a node sees, what is kept, and that output stays that of plain decoding whatever tree is proposed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from conftest import CONFIGS, reference
from hypothesis import given
from hypothesis import strategies as st
from test_engine import MAX, answers, prompts

from hasten.engine import run
from hasten.lm.attention import Span, branched
from hasten.lm.constrain import pruned
from hasten.lm.constrain.allowed import Allowed
from hasten.lm.decode import Decode
from hasten.lm.engine import TokenEngine
from hasten.lm.tree import ROOT, Growing, Tree, shaped
from hasten.values import Request, Sampling

paths = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=5), min_size=1, max_size=6)


def merged(several: Sequence[Sequence[int]]) -> Tree:
    grown = Growing()
    for path in several:
        grown.path(path)
    return grown.tree()


class Guesses(Decode):
    """Random trees in which the true continuation (given by the test) is there as far as chance wants, seldom as the first chain."""

    def __init__(self, truth: Sequence[Sequence[int]], seed: int = 0) -> None:
        self.truth, self.rand, self.moved = truth, random.Random(seed), 0

    def propose(self, rows: Sequence[Any], room: Sequence[int]) -> list[Tree]:
        return [merged([self._path(row, k) for _ in range(self.rand.randrange(6))]) for row, k in zip(rows, room, strict=True)]

    def _path(self, row: Any, k: int) -> list[int]:
        n = min(k, self.rand.randrange(1, 6))
        true = self.truth[row.key][row.generated :][: self.rand.randrange(n + 1)]
        return [*true, *(self.rand.randrange(3, 97) for _ in range(n))][:n]

    def accept(self, row: Any, proposal: Any, chosen: Sequence[int], logits: torch.Tensor) -> list[int]:
        committed = super().accept(row, proposal, chosen, logits)
        path = proposal.follow(committed[:-1]) if isinstance(proposal, Tree) else []
        self.moved += path != list(range(len(path)))
        return committed


@pytest.mark.parametrize("family", CONFIGS)
def test_greedy_is_identical_whatever_tree_is_proposed(pairs: Any, family: str) -> None:
    model, ours = pairs(family)
    asked = prompts(1)
    want = reference(model, asked, MAX)
    engine = TokenEngine(ours, decode=Guesses(want), step_tokens=40, max_rows=4)
    assert answers(engine, asked) == want
    assert engine.decode.moved > 10, "the setting must close up paths that were not stored first"


@pytest.mark.parametrize("family", CONFIGS)
def test_samples_with_penalties_a_constraint_and_logprobs_are_identical(pairs: Any, family: str) -> None:
    """Little memory: rows step back and resume, prefixes are forked from rows that have closed up."""
    _, ours = pairs(family)
    s = {"temperature": 0.9, "top_k": 20, "repetition_penalty": 1.3, "frequency_penalty": 0.2, "min_tokens": 5, "seed": 3, "logprobs": 2}
    asked = {i: Request(p, Sampling(max_tokens=12, **s)) for i, p in enumerate(prompts(6))}
    plain = run(TokenEngine(ours, constraint=Allowed(range(2, 40))), asked)
    decode = Guesses([list(r.tokens) for r in plain.values()])
    memory = 200 * TokenEngine(ours).cache.shape.bytes_per_position
    got = run(TokenEngine(ours, constraint=Allowed(range(2, 40)), decode=decode, memory=memory), asked)
    assert [r.tokens for r in got.values()] == [r.tokens for r in plain.values()] and decode.moved > 2
    for mine, theirs in zip(got.values(), plain.values(), strict=True):
        assert [e.logprob for e in mine.logprobs] == pytest.approx([e.logprob for e in theirs.logprobs], abs=1e-6)
        assert [[t for t, _ in e.top] for e in mine.logprobs] == [[t for t, _ in e.top] for e in theirs.logprobs]


def test_a_row_that_closed_up_serves_as_a_prefix(pairs: Any) -> None:
    model, ours = pairs("mistral")
    prompt = list(range(3, 33))
    truth = reference(model, [prompt], MAX)
    engine = TokenEngine(ours, decode=Guesses(truth))
    first = run(engine, {0: Request(prompt, Sampling(max_tokens=MAX))})[0]
    assert list(first.tokens) == truth[0] and engine.decode.moved
    whole = [*prompt, *first.tokens, 50]
    engine.decode = Decode()
    again = run(engine, {0: Request(whole, Sampling(max_tokens=6))})[0]
    assert again.usage.by_role["target"].reused == len(whole) - 2
    assert list(again.tokens) == reference(model, [whole], 6)[0]


def test_a_compiled_step_takes_trees(pairs: Any) -> None:
    from hasten import hf
    from hasten.lm.compiled import CompiledStep

    model, ours = pairs("llama")
    step = CompiledStep(ours, backend="none")
    asked = prompts(1)
    want = reference(model, asked, MAX)
    assert answers(TokenEngine(hf.stepped(hf.shared_copy(ours), step), decode=Guesses(want)), asked) == want
    assert not step.failed


def test_a_window_counts_positions_not_places() -> None:
    """Two paths of two after a row of 3: the fourth node stands at position 4, its parent at position 3 but in place 5."""
    tree = merged([[5, 6], [7, 8]])
    seen = branched(Span(0, 2, 5, 0, tree), tree, 8, 3)
    assert seen.int().tolist() == [
        [0, 1, 1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 1, 0, 0, 0], [0, 1, 1, 0, 0, 1, 0, 0], [0, 0, 1, 0, 0, 1, 1, 0]
    ]  # fmt: skip
    assert (branched(Span(0, 2, 5, 0, tree), tree, 8, 1).int() == torch.eye(8, dtype=torch.int)[3:7]).all()


@given(paths)
def test_a_tree_holds_the_paths_it_was_made_of(several: list[list[int]]) -> None:
    tree = merged(several)
    assert {tuple(tree.path(i)) for i in range(len(tree))} == {tuple(p[:n]) for p in several for n in range(1, len(p) + 1)}
    assert tree.depth == max(map(len, several)) and tree.path(ROOT) == []
    for path in several:
        nodes = tree.follow([*path, 9])
        assert tree.path(nodes[-1]) == path and nodes == sorted(nodes)
        assert [tree.depths[n] for n in nodes] == list(range(len(path)))
        assert tree.sees[nodes[-1]].nonzero()[0].tolist() == nodes
    assert isinstance(shaped(tree), list) == (len(tree) == tree.depth)
    assert all(p < i for i, p in enumerate(tree.head(2).parents)) and len(tree.head(2)) == min(2, len(tree))


@given(paths, st.lists(st.integers(0, 3), min_size=40, max_size=40))
def test_a_walk_is_what_one_token_at_a_time_would_give(several: list[list[int]], chosen: list[int]) -> None:
    tree, text, node = merged(several), [], ROOT
    while True:
        text.append(chosen[node + 1])
        if tuple(text) not in {tuple(tree.path(i)) for i in range(len(tree))}:
            break
        node = next(i for i in range(len(tree)) if tree.path(i) == text)
    assert tree.walk(chosen) == text


@given(paths, st.sets(st.integers(0, 3)))
def test_a_constraint_takes_whole_branches(several: list[list[int]], allowed: set[int]) -> None:
    tree, states = pruned(Allowed(allowed), None, merged(several))
    want = {tuple(p[:n]) for p in several for n in range(1, len(p) + 1) if allowed.issuperset(p[:n])}
    assert {tuple(tree.path(i)) for i in range(len(tree))} == want and len(states) == len(want) + 1


@pytest.mark.parametrize(("tokens", "parents"), [((1, 2), (-1,)), ((1,), (0,)), ((1, 2), (-1, -2))])
def test_what_is_no_tree_is_refused(tokens: tuple[int, ...], parents: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="parent"):
        Tree(tokens, parents)
