"""Prompt lookup: which occurrence is proposed, and several at once as a tree. That output is identical is tested with the engine."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from hasten.lm.decode.ngram import Index, Ngram, Options
from hasten.lm.tree import Tree
from hasten.values import UserError

TEXT = [1, 2, 3, 4, 9, 1, 2, 5, 6, 9, 8, 2, 7, 9, 1, 2]  # after 1 2 came 5 6 9, before that 3 4 9; after 2 alone also 7 9


def index(tokens: list[int]) -> Index:
    made = Index(3, 1)
    for n in range(1, len(tokens) + 1):
        made.grow(tokens[:n])
    return made


def test_the_last_occurrence_of_the_longest_suffix_is_proposed() -> None:
    assert index(TEXT).look_up(TEXT, 3) == [5, 6, 9]  # 9 1 2 was followed by 5, later than 1 2 by 3
    assert index(TEXT[:-2]).look_up(TEXT[:-2], 2) == [8, 2]
    assert index([1, 2]).look_up([1, 2], 3) == []


def test_several_occurrences_become_a_tree_in_which_the_last_goes_first() -> None:
    tree = index(TEXT).branches(TEXT, 8, 3)
    assert isinstance(tree, Tree)
    assert tree.path(0) == [5] and tree.path(3) == [5, 6, 9, 8], "as deep as others are behind"
    assert [tree.tokens[i] for i in tree.children[-1]] == [5, 3], "the third has no turn within eight nodes"
    more = index(TEXT).branches(TEXT, 16, 3)
    assert [more.tokens[i] for i in more.children[-1]] == [5, 3, 7] and more.head(8) == tree and len(tree) == 8
    assert index(TEXT).branches(TEXT, 4, 1).is_chain and len(index([1, 2]).branches([1, 2], 4, 3)) == 0


def test_continuations_that_are_alike_count_once() -> None:
    text = [1, 2, 3, 1, 2, 3, 1, 2, 3, 1, 2, 4, 1]
    assert [index(text).branches(text, 2, 2).path(i) for i in range(2)] == [[2], [2, 4]]
    tree = index(text).branches(text, 9, 2)
    assert {tuple(tree.path(i)[:2]) for i in range(1, len(tree))} == {(2, 4), (2, 3)}


@pytest.mark.parametrize("branches", [1, 3])
def test_a_proposal_is_no_longer_than_asked(branches: int) -> None:
    decode = Ngram(Options(k=6, shortest=1, schedule="constant", branches=branches))
    row: Any = SimpleNamespace(tokens=TEXT, decode_state=None)
    [found] = decode.propose([row], [4])
    assert 0 < len(found) <= 4
    assert decode.propose([row], [0]) == [[]]


@pytest.mark.parametrize("wrong", [{"k": -1}, {"shortest": 0}, {"shortest": 5}, {"branches": 0}, {"schedule": "fast"}])
def test_bad_options_are_refused_by_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="ngram"):
        Options(**wrong)
