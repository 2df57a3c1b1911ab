"""Suffix decoding: the tree's counts, what is forgotten, what is proposed. That output is identical is tested with the engine."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hasten.lm.decode.suffix import Node, Options, Suffix, Tree, branching, continuation
from hasten.values import UserError

texts = st.lists(st.integers(0, 3), min_size=1, max_size=30)


def counted(tree: Tree) -> Counter[tuple[int, ...]]:
    out: Counter[tuple[int, ...]] = Counter()

    def walk(node: Node, path: tuple[int, ...]) -> None:
        for token, child in node.after.items():
            out[*path, token] = child.count
            walk(child, (*path, token))

    walk(tree.root, ())
    return out


def substrings(text: list[int], depth: int) -> Counter[tuple[int, ...]]:
    return Counter(tuple(text[i:j]) for i in range(len(text)) for j in range(i + 1, min(len(text), i + depth) + 1))


def grown(tree: Tree, text: list[int]) -> list[Node]:
    at: list[Node] = []
    for token in text:
        at = tree.grow(at, token)
    return at


@given(texts, st.integers(2, 5))
def test_the_tree_counts_all_substrings(text: list[int], depth: int) -> None:
    tree = Tree(depth)
    at = grown(tree, text)
    assert counted(tree) == substrings(text, depth)
    assert [node.count for node in at] == [
        substrings(text, depth)[tuple(text[len(text) - n :])] for n in range(1, min(depth, len(text)) + 1)
    ]


@given(st.lists(texts, min_size=1, max_size=5))
def test_what_is_forgotten_leaves_no_trace(several: list[list[int]]) -> None:
    tree = Tree(4)
    for text in several:
        grown(tree, text)
    for text in several[1:]:
        tree.forget(text)
    assert counted(tree) == substrings(several[0], 4)


def test_the_frequent_continuation_of_a_long_match_is_proposed() -> None:
    tree = Tree(8)
    text = [1, 2, 3, 4, 5, 9, 1, 2, 3, 4, 6, 9, 1, 2, 3, 4, 5, 8, 1, 2, 3]
    at = grown(tree, text)
    score, tokens = continuation(at, 16, 2.0, 0.1, open_end=1)
    assert tokens[:2] == [4, 5] and 1 + 2 / 3 - 1e-9 <= score <= 3
    assert continuation(at, 1, 2.0, 0.1, open_end=1)[1] == [4]
    assert continuation(at, 16, 2.0, 0.9, open_end=1)[1] == [4]  # 5 follows in two of three cases
    assert continuation([], 16, 2.0, 0.1) == (0.0, [])


def test_a_tree_holds_the_likeliest_continuations_of_all_matches() -> None:
    tree = Tree(8)
    text = [1, 2, 3, 4, 5, 9, 1, 2, 3, 4, 6, 9, 1, 2, 3, 7, 5, 8, 1, 2, 3]
    at = grown(tree, text)
    found = branching([at], 16, 3, 2.0, 0.05)
    assert found.path(0) == [4] and found.path(1) == [7], "after 1 2 3 there was 4 twice and 7 once"
    paths = [found.path(i) for i in range(len(found))]
    assert [4, 5] in paths and [4, 6] in paths and [7, 5] in paths and len({*map(tuple, paths)}) == len(paths)
    for n in (1, 2, 5):
        assert branching([at], n, 3, 2.0, 0.05) == found.head(n), "trees of fewer nodes are heads of larger ones"
    assert branching([at], 16, 1, 2.0, 0.05).path(1) == [4, 5], "one branch follows the most frequent"
    assert branching([at], 16, 3, 0.4, 0.05).depth == 1 and len(branching([at, []], 16, 3, 2.0, 0.99)) == 0
    assert len(branching([[]], 16, 3, 2.0, 0.1)) == 0


def test_what_two_trees_know_becomes_one() -> None:
    mine, other = Tree(4), Tree(4)
    at, shared = grown(mine, [1, 2, 3, 1, 2]), grown(other, [1, 2, 4, 1, 2])
    found = branching([at, shared], 16, 2, 2.0, 0.1)
    assert {found.path(i)[0] for i in range(len(found))} == {3, 4}
    decode = Suffix(Options(k=8, branches=2, schedule="constant"))
    decode.finish(row([9, 1, 2, 4, 5], 1))
    [proposal] = decode.propose([row([1, 2, 3, 1, 2], 5)], [10])
    assert {proposal.path(i)[0] for i in range(len(proposal))} == {3, 4} and len(proposal) <= 8


def row(tokens: list[int], prompt: int) -> Any:
    return SimpleNamespace(tokens=tokens, prompt=prompt, decode_state=None, control=None)


def test_finished_answers_are_remembered_up_to_the_memory_given() -> None:
    decode = Suffix(Options(memory=8, schedule="constant"))
    for answer in ([5, 6, 7, 8], [1, 2, 3, 4]):
        decode.finish(row([9, *answer], 1))
    assert decode.propose([row([0, 5, 6], 1)], [10]) == [[7, 8]]
    decode.finish(row([9, 1, 1, 1], 1))  # the oldest goes
    assert decode.propose([row([0, 5, 6], 1)], [10]) == [[]]
    assert decode.held == 7
    decode.finish(row(list(range(9)), 0))  # longer than the memory: not kept, nothing goes
    assert decode.held == 7
    assert decode.propose([row([0, 1, 2], 1)], [0]) == [[]]


@pytest.mark.parametrize(
    "wrong", [{"k": -1}, {"memory": -1}, {"depth": 1}, {"factor": 0}, {"least": 2}, {"branches": 0}, {"schedule": "fast"}]
)
def test_bad_options_are_refused_by_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="suffix"):
        Options(**wrong)
