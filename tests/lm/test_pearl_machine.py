"""PEARL's state machine and window by themselves, and the law of its samples at every position type, with planted bugs that the test must see."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from hasten import rng
from hasten.lm.decode import verify
from hasten.lm.decode.pearl import Lane, Options, Pearl, Window
from hasten.lm.decode.theory import pearl_tokens
from hasten.lm.scheduler import Row, Work
from hasten.values import Request, Sampling

# --- the state machine -------------------------------------------------------------------------------------------------------------


def by_the_paper(agrees: Callable[[int], bool], window: int, end: int) -> list[int]:
    """Tokens gained in each iteration, by the state machine of the released code: pre-verify, post-verify, where the first failure is."""
    gained, at, post = [], 0, False
    while at < end:
        n = next((i for i in range(window if post else 1) if not agrees(at + i)), None)
        gained.append((window if post else 1) if n is None else n + 1)
        at, post = at + gained[-1], n is None
    return gained


def by_lane(agrees: Callable[[int], bool], window: int, end: int) -> list[int]:
    """The same with a lane: the right token of a position is its number, the draft's is that or -1."""
    lane, tokens, known, gained = Lane(number=7), [0], list[int](), []
    while len(tokens) <= end:
        number, sure, hold, tail, wanted = lane.tell(tokens, window)
        known[hold:] = tail
        assert (number, sure, wanted) == (7, len(tokens), window) and known == tokens + lane.rest
        start = len(known)
        drafted = [i if agrees(i - 1) else -1 for i in range(start, start + window)]
        known += drafted
        proposal = list(lane.rest)
        lane.drafted(drafted, ())
        right = [len(tokens) + i for i in range(len(proposal) + 1)]
        kept = next((i for i, token in enumerate(proposal) if token != right[i]), len(proposal))
        lane.settle(right[: kept + 1])
        gained.append(kept + 1)
        tokens += right[: kept + 1]
    return gained


@pytest.mark.parametrize("window", [1, 2, 3, 8])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.8, 0.95, 1.0])
def test_a_lane_is_the_papers_state_machine(window: int, alpha: float) -> None:
    def agrees(position: int) -> bool:
        return rng.uniform(3, position) < alpha

    gained = by_lane(agrees, window, 4000)
    assert gained == by_the_paper(agrees, window, 4000)
    assert sum(gained) / len(gained) == pytest.approx(pearl_tokens(alpha, window), rel=0.06)


def test_a_lane_goes_on_from_a_proposal_that_was_cut() -> None:
    lane = Lane(rest=[1, 2, 3], window=[4, 5], p=[0.1, 0.2, 0.3, 0.4, 0.5])
    lane.settle([1])  # the target read none of it, and chose what was assumed
    assert (lane.rest, lane.window, lane.p) == ([2, 3, 4, 5], [], [0.2, 0.3, 0.4, 0.5])
    lane.settle([2, 9])
    assert (lane.rest, lane.p) == ([], [])


# --- the law -----------------------------------------------------------------------------------------------------------------------

V, LENGTH, LIMIT = 4, 7, 1e-5


def chain(seed: int) -> torch.Tensor:
    rows = np.random.default_rng(seed).random((V, V)) + 0.05
    return torch.tensor(rows / rows.sum(-1, keepdims=True))


P, Q = chain(1), chain(2)


class Chain:
    """A drafter that draws from the chain P; it is asked one row at a time."""

    def __init__(self) -> None:
        self.said: dict[str, Any] = {}
        self.text: list[int] = []
        self.laws: dict[int, int] = {}
        self.seed = 0

    def send(self, message: Mapping[str, Any]) -> None:
        self.said = getattr(self, message["do"])(message)

    def receive(self) -> dict[str, Any]:
        return self.said

    def open(self, message: Mapping[str, Any]) -> dict[str, Any]:
        self.text, self.seed = [], message["sampling"].get("seed", 0)
        return {}

    def go_on(self, message: Mapping[str, Any]) -> dict[str, Any]:
        [(_, _, hold, tail, wanted)] = message["rows"]
        self.text[hold:] = tail
        drafted, p = [], []
        for _ in range(wanted):
            before, at = self.text[-1], len(self.text)
            token = verify.drawn(P[before], rng.uniform(self.seed, 0, at, verify.DRAFT))
            self.laws[at] = before
            self.text.append(token)
            drafted.append(token)
            p.append(float(P[before, token]))
        return {"drafted": [drafted], "p": [p], "seconds": 0.0, "passes": wanted}

    def law(self, message: Mapping[str, Any]) -> dict[str, Any]:
        return {"law": base64.b64encode(P[self.laws[message["position"]]].numpy().tobytes()).decode()}

    def processor_seconds(self) -> float:
        return 0.0

    def close(self, message: Any = None) -> dict[str, Any]:
        return {"cost": [0] * 6}


class Released(Pearl):
    """The released code's seeds: those of post-verify begin one position early, with the number that pre-verify has just used."""

    def _uniform(self, row: Row, purpose: int, i: int) -> float:
        return super()._uniform(row, purpose, i - (purpose == verify.ACCEPT and bool(row.decode_state.rest)))


class FromTheTarget(Pearl):
    """Takes what follows a refusal from q."""

    def _law(self, row: Row, i: int) -> torch.Tensor | None:
        return torch.zeros(V, dtype=torch.float64)


def sequences(kind: type[Pearl], runs: int) -> Iterator[tuple[list[int], list[str]]]:
    """Texts after token 0 of an engine whose target is the chain Q, and how each position came to be judged, which its token does not tell."""
    technique = kind(Options(model="x", mode="rejection", window=3), lambda rows: Chain())
    technique.bind(SimpleNamespace(scheduler=SimpleNamespace(max_rows=1), cache=SimpleNamespace(max_len=1000)))
    for seed in range(runs):
        row = Row(0, Request((), Sampling(temperature=1.0, seed=seed, max_tokens=LENGTH)), 0, [0], 1, 0.0)
        kinds: list[str] = []
        before = "first"
        while row.generated < LENGTH:
            work = Work(row, len(row.tokens) - 1, 1, outputs=1)
            technique.planned([work])
            [work.proposal] = technique.propose([row], [LENGTH - row.generated - 1])
            logits = Q[[row.tokens[-1], *work.proposal]].log()
            new = technique.accept(row, work.proposal, [], logits)
            post = bool(work.proposal)
            kinds += [before, *(["inside post-verify"] * (len(new) - 1))]
            kept = bool(row.decode_state.rest)
            before = ("after a whole post-verify" if post else "after a kept pre-verify") if kept else "pre-verify"
            row.tokens += new
        technique.finish(row)
        yield row.tokens[1 : LENGTH + 1], kinds[:LENGTH]


def worst(kind: type[Pearl], runs: int) -> tuple[float, str]:
    """The least p-value over position types and tokens before, of the law of the next token; and where it is."""
    seen: dict[tuple[str, int], Counter[int]] = {}
    for text, kinds in sequences(kind, runs):
        for i, token in enumerate(text):
            for name in (kinds[i], f"position {i}"):
                seen.setdefault((name, text[i - 1] if i else 0), Counter())[token] += 1
    assert {name for name, _ in seen} >= {
        "first",
        "pre-verify",
        "after a kept pre-verify",
        "after a whole post-verify",
        "inside post-verify",
    }
    return min((p_value(c, Q[before]), name) for (name, before), c in seen.items() if sum(c.values()) > 200)


def p_value(counts: Counter[int], law: torch.Tensor) -> float:
    from scipy.stats import chisquare

    return float(chisquare([counts[v] for v in range(V)], (law / law.sum() * sum(counts.values())).tolist()).pvalue)


def test_samples_have_the_targets_law_at_every_position_type() -> None:
    assert worst(Pearl, 4000)[0] > LIMIT


def test_planted_bugs_are_seen() -> None:
    p, where = worst(Released, 2500)
    assert p < LIMIT and where in ("after a kept pre-verify", "position 1")
    assert worst(FromTheTarget, 2500)[0] < LIMIT


# --- the window --------------------------------------------------------------------------------------------------------------------


def measured(ratio: float, acceptance: float, slope: float = 0.0) -> Window:
    """One that has seen a target `ratio` times as slow as its draft, each further position costing so much of a step."""
    window = Window(0, 16)
    for _ in range(400):
        window.judged(int(10 * acceptance), 10 - int(10 * acceptance))
    for positions in (1, 4, 12) * Window.FEWEST:
        window.timed(1, positions, 4, 4.0, ratio * (1 + slope * (positions - 1)))
    window.timed(1, 5, 4, 4.0, 50 * ratio)  # once, and so of no account
    return window


def test_where_checking_is_free_the_window_is_the_ratio_of_speeds() -> None:
    assert [measured(c, 0.9).length(1) for c in (2.0, 3.0, 5.0, 12.0)] == [2, 3, 5, 12]
    assert measured(40.0, 0.9).length(1) == 16


def test_the_window_is_short_where_little_is_kept_and_where_checking_costs() -> None:
    assert measured(5.0, 0.0).length(1) == 1
    assert measured(6.0, 0.9, slope=0.6).length(1) < 6
    assert Window(0, 16).length(1) == 4 and Window(0, 2).length(3) == 2 and Window(7, 16).length(1) == 7
    assert Window(0, 16).acceptance == 0.8
