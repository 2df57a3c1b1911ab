"""REBASE on engines without a model: what is asked, kept and given back, how the width goes, and what rewards that say nothing must give."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest
from fake_engine import FakeEngine

from hasten import rng
from hasten.engine import run
from hasten.strategies import rebase, steps
from hasten.strategies.drive import Drive
from hasten.strategies.rebase import Options
from hasten.values import Key, Request, Result, Sampling, UserError

END = 99


@dataclass
class Kept(FakeEngine):
    """Keeps sequences as the token engine does: a child's prompt stands behind its parent's whole sequence."""

    sequences: dict[Key, tuple[int, ...]] = field(default_factory=dict)
    under: dict[Key, Request] = field(default_factory=dict)

    def add(self, key: Key, request: Request) -> None:
        before = () if request.parent is None else self.sequences[request.parent]
        self.under[key] = request
        super().add(key, replace(request, prompt=(*before, *request.prompt)))

    def _finish(self, key: Key, result: Result) -> None:
        asked, whole = self.under[key], self.waiting[key][0]
        if asked.keep and result.finish_reason != "cancelled":
            self.sequences[key] = (*whole.prompt, *result.tokens)
        super()._finish(key, replace(result, prompt_tokens=tuple(whole.prompt)))

    def cancel(self, key: Key) -> None:
        self.sequences.pop(key, None)
        super().cancel(key)


def writes(request: Request) -> Result:
    """A policy: one token a step, 0..3, drawn from the stream at this position; a solution is three steps and the end."""
    position = len(request.prompt)
    token = rng.integer(4, request.sampling.seed, request.sample, position)
    if position - 2 == 3:
        return Result(f"#### {sum(request.prompt[2:]) % 3}", (END,), "stop")
    return Result(f"{token}", (token,), "stop", stop_reason=";")


def rewards(value: Any) -> Any:
    return lambda request: Result(scores=(value(tuple(request.prompt[2:])),), finish_reason="scored")


def searched(value: Any, n: int = 1, sampling: Sampling | None = None, **options: Any) -> tuple[list[Result], Kept, Kept]:
    policy, judge = Kept(writes, rows=100), Kept(rewards(value), role="reward", rows=100)
    strategy = rebase.build(Options(reward="judge", step=";", **options))
    drive = Drive({"target": policy, "reward": judge}, strategy)
    sampling = sampling or Sampling(max_tokens=50)
    done = run(drive, {i: Request((7, 7), replace(sampling, seed=i)) for i in range(n)})
    return [done[i] for i in range(n)], policy, judge


def test_width_one_is_one_sample() -> None:
    (found,), policy, _ = searched(lambda tokens: 0.5, width=1)
    plain = tuple(rng.integer(4, 0, 0, position) for position in (2, 3, 4))
    assert found.tokens == (*plain, END)
    assert found.trace["widths"] == (1, 1, 1, 1)
    assert len(policy.asked) == 4


def test_the_better_get_the_width_and_caches_go_back() -> None:
    """A judge that likes threes: every branch that lives on has the most threes there are, and nothing stays kept."""
    (found,), policy, judge = searched(lambda tokens: sum(t == 3 for t in tokens if t != END) / 3, width=16, balance=0.01)
    firsts = {r.prompt[2] for r in policy.asked if len(r.prompt) == 3}
    assert firsts == {3}
    assert found.tokens == (3, 3, 3, END)
    assert found.trace["n"] == 16 and found.trace["widths"] == (16, 16, 16, 16)
    assert not policy.sequences and not judge.sequences


def test_siblings_that_wrote_the_same_are_scored_once() -> None:
    _, policy, judge = searched(lambda tokens: 0.5, width=32)
    written = Counter(len(r.prompt) for r in policy.asked)
    assert written == {2: 32, 3: 32, 4: 32, 5: 32}
    assert len([r for r in judge.asked if len(r.prompt) == 3]) == 4  # of 32 first steps, four differ
    assert len({tuple(r.prompt) for r in judge.asked}) == len(judge.asked)


def test_only_new_tokens_are_scored() -> None:
    """A child's reward is asked for with its own tokens alone, behind its parent's sequence."""
    _, _, judge = searched(lambda tokens: 0.5, width=4)
    assert {len(r.prompt) for r in judge.under.values() if r.parent is not None} == {1}
    assert all(r.score_from == len(a.prompt) - 1 for r, a in zip(judge.under.values(), judge.asked, strict=True) if r.parent is not None)


def test_a_constant_reward_is_plain_sampling_in_law() -> None:
    """Tokens of the last step over many searches against the policy's own law (all alike)."""
    found, *_ = searched(lambda tokens: 0.5, n=300, width=4, choose="best")
    counts = [Counter(r.tokens[i] for r in found) for i in range(3)]
    for count in counts:
        assert sum((count[t] - 75) ** 2 / 75 for t in range(4)) < 16.3  # chi-square, 3 degrees of freedom, p = 0.001


def test_the_same_tree_whatever_runs_beside_it() -> None:
    many, *_ = searched(lambda tokens: (len(tokens) * 7 + sum(tokens)) % 5 / 5, n=8, width=8)
    alone, *_ = searched(lambda tokens: (len(tokens) * 7 + sum(tokens)) % 5 / 5, n=1, width=8)
    assert many[0].tokens == alone[0].tokens and many[0].trace == alone[0].trace


def test_finished_solutions_take_their_width_away() -> None:
    """Solutions that end at once leave the rest to the others; none is lost, and all vote."""

    def early(request: Request) -> Result:
        return Result("#### 1", (END,), "stop") if request.sample % 2 and len(request.prompt) == 2 else writes(request)

    policy, judge = Kept(early, rows=100), Kept(rewards(lambda tokens: 0.5), role="reward", rows=100)
    drive = Drive({"target": policy, "reward": judge}, rebase.build(Options(width=8, reward="judge", step=";")))
    found = run(drive, {0: Request((7, 7), Sampling(max_tokens=50))})[0]
    widths = found.trace["widths"]
    assert found.trace["n"] == 8 and widths[0] == 8 and widths[1] < 8


def test_a_solution_without_room_is_given_up_and_has_no_vote() -> None:
    (found,), *_ = searched(lambda tokens: 0.5, width=4, sampling=Sampling(max_tokens=2))
    assert found.finish_reason == "length"
    assert found.trace["unparsed"] == 4 and found.trace["unfinished"] == 4


def test_choices() -> None:
    node = [
        steps.Node((i,), i, (i,), f"#### {a}", (s,), "stop")
        for i, (a, s) in enumerate([(1, 0.9), (2, 0.6), (2, 0.5), (3, 0.1), (3, 0.1), (3, 0.1)])
    ]
    answer = {choose: rebase.chosen(node, Options(choose=choose), lambda text: text[-1], None, {}).text[-1] for choose in rebase.CHOICES}
    assert answer == {"best": "1", "weighted": "2", "majority": "3"}


def test_where_a_step_ends() -> None:
    words = SimpleNamespace(get_vocab=lambda: {"a": 1}, decode=lambda ids: " ;")
    target = SimpleNamespace(
        models={"reward": SimpleNamespace(config=SimpleNamespace(step_token_ids=[5]))}, tokenizers={"target": words, "reward": words}
    )
    assert steps.delimiter("auto", target) == ";"
    assert steps.delimiter("auto", SimpleNamespace(models={}, tokenizers={})) == "\n\n"
    assert steps.delimiter("\\n", target) == "\n"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"width": 0}, "width=0"),
        ({"balance": 0.0}, "balance"),
        ({"rounding": "up"}, "rounding='up'"),
        ({"choose": "bset"}, "did you mean 'best'"),
        ({"aggregate": "max"}, "aggregate"),
        ({"temperature": -1.0}, "temperature"),
        ({"step_tokens": 0}, "step_tokens"),
    ],
)
def test_bad_options(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Options(**options)


def test_a_reward_model_is_needed() -> None:
    with pytest.raises(UserError, match="reward=MODEL"):
        rebase.build(Options())
