"""The verifier on a tabular model: the law of what it commits, by position type, and planted bugs that the tests must see."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from hasten import rng
from hasten.lm.decode import theory, verify
from hasten.lm.tree import ROOT, Growing, Tree

V, K, LENGTH = 4, 3, 5
LIMIT = 1e-5  # of a chi-square test; a few dozen are made


def chain(seed: int) -> torch.Tensor:
    rows = np.random.default_rng(seed).random((V, V)) + 0.05
    return torch.tensor(rows / rows.sum(-1, keepdims=True))


P, Q = chain(1), chain(2)
Rule = Callable[..., list[int]]


def decode(rule: Rule, seed: int, uniform: Any = None) -> tuple[list[int], list[str]]:
    """LENGTH tokens from token 0 with drafts of K from the chain P; and the type of each position."""
    text, kinds, before = [0], [], "first"
    while len(text) <= LENGTH:
        start = len(text)

        def number(purpose: int, i: int, start: int = start) -> float:
            return rng.uniform(seed, start, purpose, i)

        u = number if uniform is None else uniform(seed, start)
        proposal: list[int] = []
        for i in range(K):
            proposal.append(verify.drawn(P[(proposal or text)[-1]], u(verify.DRAFT, i)))
        at = torch.tensor([text[-1], *proposal])
        new = rule(proposal, P[at[:-1]], Q[at], u)
        kinds += [before, *["accepted"] * (len(new) - 2), "bonus" if len(new) == K + 1 else "corrected"][: len(new)]
        before = "after all" if len(new) == K + 1 else "after a rejection"
        text += new
    return text[1 : LENGTH + 1], kinds[:LENGTH]


def p_value(counts: Counter[int], law: torch.Tensor) -> float:
    from scipy.stats import chisquare

    n = sum(counts.values())
    return float(chisquare([counts[v] for v in range(V)], (law / law.sum() * n).tolist()).pvalue)


def worst(rule: Rule, runs: int, uniform: Any = None) -> float:
    """The least p-value over position types and tokens before, of the law of the next token.

    A position's type may depend on the token itself ("accepted"), so types are those of how the round began; inside a round all are pooled.
    """
    seen: dict[tuple[str, int], Counter[int]] = {}
    for seed in range(runs):
        text, kinds = decode(rule, seed, uniform)
        for i, token in enumerate(text):
            kind = kinds[i] if kinds[i].startswith(("first", "after")) else "inside"
            seen.setdefault((kind, text[i - 1] if i else 0), Counter())[token] += 1
            seen.setdefault((f"position {i}", text[i - 1] if i else 0), Counter())[token] += 1
    return min(p_value(c, Q[before]) for (kind, before), c in seen.items() if kind != "inside" and sum(c.values()) > 200)


@pytest.mark.parametrize("rule", [verify.rejection, verify.block])
def test_output_has_the_targets_law_at_every_position_type(rule: Rule) -> None:
    assert worst(rule, 6000) > LIMIT


def resampled(proposal: Any, p: Any, q: Any, u: Any) -> list[int]:
    new = verify.rejection(proposal, p, q, u)
    n = len(new) - 1
    return new if n == K else [*new[:-1], verify.drawn(q[n], u(verify.AFTER, n))]


def shared(seed: int, start: int) -> verify.Uniform:
    """One number for the draft, its test and the correction of a position."""
    return lambda purpose, i: rng.uniform(seed, start, i)


def reused(seed: int, start: int) -> verify.Uniform:
    """Numbers do not depend on the round but on the position alone: one that has decided something is used again."""
    return lambda purpose, i: rng.uniform(seed, purpose, start + i)


@pytest.mark.parametrize(("rule", "uniform"), [(resampled, None), (verify.rejection, shared), (verify.block, reused)])
def test_planted_bugs_are_seen(rule: Rule, uniform: Any) -> None:
    assert worst(rule, 3000, uniform) < LIMIT


def grown(text: list[int], u: verify.Uniform) -> tuple[Tree, dict[int, torch.Tensor]]:
    """Two children without replacement from the chain P of the row's last token and of each child; the last node's children are certain."""
    tree, laws = Growing(), {}
    for node in (ROOT, 0, 1):
        laws[node] = P[text[-1] if node == ROOT else tree.tokens[node]]
        for token in verify.several(laws[node], 2, lambda i, node=node: u(verify.DRAFT, 10 * (node + 1) + i)):  # type: ignore[misc]
            tree.add(node, token)
    for token in (2, 0):
        tree.add(5, token)
    return tree.tree(), laws


Walk = Callable[[Tree, dict[int, torch.Tensor], torch.Tensor, verify.Uniform], list[int]]


def worst_of_trees(walk: Walk, runs: int) -> float:
    """As `worst`, of rounds over trees; the type of a round's first position is how many tokens the round before it has kept."""
    seen: dict[tuple[str, int], Counter[int]] = {}
    for seed in range(runs):
        text, kind = [0], "first"
        while len(text) <= LENGTH:
            u = partial(rng.uniform, seed, len(text))
            tree, laws = grown(text, u)
            new = walk(tree, laws, Q[torch.tensor([text[-1], *tree.tokens])], u)
            seen.setdefault((kind, text[-1]), Counter())[new[0]] += 1
            kind, text = f"after {len(new)}", text + new
        for i, token in enumerate(text[1 : LENGTH + 1]):
            seen.setdefault((f"position {i}", text[i]), Counter())[token] += 1
    return min(p_value(c, Q[before]) for (_, before), c in seen.items() if sum(c.values()) > 200)


def test_rounds_over_a_tree_have_the_targets_law_at_every_position_type() -> None:
    assert worst_of_trees(verify.rounds, 6000) > LIMIT


def unreduced(tree: Tree, laws: dict[int, torch.Tensor], q: torch.Tensor, u: verify.Uniform) -> list[int]:
    """Each child is judged by q, as if those before it had not been refused."""
    out, node = [], ROOT
    while (at := next((c for c in tree.children.get(node, ()) if kept(tree, c, laws.get(node), q[node + 1], u)), None)) is not None:
        out.append(tree.tokens[at])
        node = at
    return [*out, verify.drawn(q[node + 1], u(verify.AFTER, node + 1))]


def kept(tree: Tree, child: int, p: torch.Tensor | None, q: torch.Tensor, u: verify.Uniform) -> bool:
    token = tree.tokens[child]
    return u(verify.ACCEPT, child) * (1.0 if p is None else float(p[token])) < float(q[token])


def from_the_target(tree: Tree, laws: dict[int, torch.Tensor], q: torch.Tensor, u: verify.Uniform) -> list[int]:
    """What follows the last node that is kept is drawn from q, as if nothing had been refused there."""
    new = verify.rounds(tree, laws, q, u)
    node = [ROOT, *tree.follow(new[:-1])][-1]
    return [*new[:-1], verify.drawn(q[node + 1], u(verify.AFTER, node + 1))]


def one_number(tree: Tree, laws: dict[int, torch.Tensor], q: torch.Tensor, u: verify.Uniform) -> list[int]:
    """All children of a round are judged by the same number."""
    return verify.rounds(tree, laws, q, lambda purpose, i: u(purpose, 0 if purpose == verify.ACCEPT else i))


@pytest.mark.parametrize("walk", [unreduced, from_the_target, one_number])
def test_planted_bugs_of_trees_are_seen(walk: Walk) -> None:
    assert worst_of_trees(walk, 3000) < LIMIT


def test_a_second_child_is_kept_where_the_first_is_not_and_a_full_set_always() -> None:
    """Without replacement all tokens together leave nothing to refuse."""
    everything = Tree((3, 2, 1, 0), (-1, -1, -1, -1))
    kept = dict.fromkeys((1, 2, 4), 0)
    for seed in range(2000):
        u = partial(rng.uniform, seed)
        tokens = tuple(verify.several(P[1], V, lambda i, u=u: u(verify.DRAFT, i)))
        for n in kept:
            kept[n] += len(verify.rounds(Tree(tokens, everything.parents).head(n), {ROOT: P[1]}, Q[[1, *tokens[:n]]], u)) > 1
    assert abs(kept[1] / 2000 - float(torch.minimum(P[1], Q[1]).sum())) < 0.045
    assert kept[1] < kept[2] < kept[4] == 2000


@pytest.mark.parametrize("replaced", [False, True])
def test_a_second_child_is_judged_as_drawn_without_replacement(replaced: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """And were it judged as drawn with replacement, the law would be another."""
    p, q = torch.tensor([0.6, 0.3, 0.1, 0.0], dtype=torch.float64), torch.tensor([0.2, 0.35, 0.35, 0.1], dtype=torch.float64)
    drawn = [tuple(verify.several(p, 2, lambda i, seed=seed: rng.uniform(seed, verify.DRAFT, i))) for seed in range(3000)]
    if replaced:
        monkeypatch.setattr(verify, "_without", lambda law, token: law)
    seen = Counter(
        verify.rounds(Tree(pair, (-1, -1)), {ROOT: p}, q.expand(3, -1), partial(rng.uniform, seed))[0] for seed, pair in enumerate(drawn)
    )
    assert (p_value(seen, q) > LIMIT) != replaced


def test_without_replacement_each_token_comes_once() -> None:
    law = torch.tensor([0.0, 0.5, 0.3, 0.2])
    assert sorted(verify.several(law, 9, lambda i: 0.5)) == [1, 2, 3] and verify.several(law, 1, lambda i: 0.01) == [1]


def test_certain_proposals_need_no_law() -> None:
    """A proposal that was looked up, not drawn: accepted with q(x), else drawn from the rest."""
    counts: Counter[int] = Counter()
    for seed in range(6000):
        new = verify.rejection([2], None, Q[[0, 2]], lambda purpose, i, seed=seed: rng.uniform(seed, purpose, i))
        counts[new[0]] += 1
    assert p_value(counts, Q[0]) > LIMIT


def test_expected_tokens_of_a_round_are_those_of_theory_and_a_block_keeps_more() -> None:
    """Position by position 1 - TV is accepted; verified jointly, never less."""
    kept = {rule: [len(decode_one(rule, seed)) for seed in range(8000)] for rule in (verify.rejection, verify.block)}
    at, want = torch.tensor([1.0, 0, 0, 0], dtype=torch.float64), 1.0
    for _ in range(K):
        at = at @ torch.minimum(P, Q)
        want += float(at.sum())
    mean, error = np.mean(kept[verify.rejection]), np.std(kept[verify.rejection]) / 8000**0.5
    assert abs(mean - want) < 4.5 * error
    assert np.mean(kept[verify.block]) > mean


def decode_one(rule: Rule, seed: int) -> list[int]:
    proposal: list[int] = []
    for i in range(K):
        proposal.append(verify.drawn(P[(proposal or [0])[-1]], rng.uniform(seed, verify.DRAFT, i)))
    at = torch.tensor([0, *proposal])
    return rule(proposal, P[at[:-1]], Q[at], lambda purpose, i: rng.uniform(seed, purpose, i))


def test_a_lossy_weight_lies_on_the_line_of_bias_and_rejections() -> None:
    p, q = P[1].numpy(), Q[1].numpy()
    for w in (1.0, 0.5):
        first, refused = Counter[int](), 0
        for seed in range(6000):
            u = partial(rng.uniform, seed)
            x = verify.drawn(P[1], u(verify.DRAFT, 0))
            new = verify.rejection([x], P[1:2], torch.stack([Q[1], Q[x]]), u, keep=w)
            first[new[0]] += 1
            refused += len(new) == 1
        tv = float(theory.tv(p, q))
        assert abs(refused / 6000 - w * tv) < 4 * (w * tv / 6000) ** 0.5
        assert p_value(first, torch.tensor(theory.output_law(theory.ensemble_acceptance(p, q, w), p, theory.residual(p, q)))) > LIMIT


def test_coupled_commits_the_targets_choices() -> None:
    assert verify.coupled([1, 2, 3], [1, 2, 4, 9]) == [1, 2, 4]
    assert verify.coupled([1, 2], [1, 2, 3]) == [1, 2, 3]
    assert verify.coupled([], [7]) == [7]


def test_nothing_of_probability_zero_is_drawn() -> None:
    law = torch.tensor([0.0, 0.5, 0.5, 0.0], dtype=torch.float64)
    assert {verify.drawn(law, u) for u in (1e-17, 0.4999999, 0.5, 0.9999999999999999, 1.0)} == {1, 2}
