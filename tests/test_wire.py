"""Every value that crosses to a worker comes back equal, through JSON text; what cannot cross is named."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from hasten import wire
from hasten.usage import Cost, Usage
from hasten.values import Event, Request, Result, Sampling, TokenLogprob

SAMPLING = Sampling(
    max_tokens=7, min_tokens=1, temperature=0.1 + 0.2, top_k=5, top_p=1 / 3, min_p=1e-9, repetition_penalty=1.1, presence_penalty=-2,
    frequency_penalty=0.3, logit_bias={3: -1.5, 70: 2}, stop=("\n\n", "é"), stop_token_ids=(4, 5), ignore_eos=True, seed=-(2**63), n=3, logprobs=2,
    prompt_logprobs=0,
)  # fmt: skip
LOGPROB = TokenLogprob(4, -0.1, ((4, -0.1), (9, float("-inf"))))
USAGE = Usage({"target": Cost(1, 2, 3, 4, 5, 6e12, 7.25, 8, 9), "reward": Cost()}, 0.1, 0.2, 0.3, 4 << 40)
RESULT = Result(
    "text", (1, 2), (LOGPROB,), "length", USAGE, (0.5, -3.0), (Result("other"),), {"answers": {"7": 2}, "tree": [("a", 1), None], 3: "three"},
    (5, 6), (None, LOGPROB),
)  # fmt: skip


@pytest.mark.parametrize(
    "value",
    [
        SAMPLING, Sampling(), USAGE, RESULT, Result(), LOGPROB, Event("k"), Event(("a", 1), (3,), RESULT, 2),
        Request("words"), Request([1, 2, 3]), Request((1, 2)), Request([{"role": "user", "content": [{"type": "text", "text": "é"}]}]),
        Request("more", SAMPLING, "id", "reward", 4, True, 9, ("node", (1, "x")), True, (1, ("a", None))), {"@": "a user's key"},
    ],
)  # fmt: skip
def test_comes_back_equal(value: Any) -> None:
    text = json.dumps(wire.dump(value))
    assert wire.read(json.loads(text)) == value
    assert "\n" not in text


def test_numbers_that_equal_nothing() -> None:
    back = wire.read(json.loads(json.dumps(wire.dump(Result(scores=(math.nan, math.inf, 1e-310))))))
    assert math.isnan(back.scores[0])
    assert back.scores[1:] == (math.inf, 1e-310)


def test_kinds_are_kept_apart() -> None:
    for value in ([1], (1,), {"a": [1]}, {"a": (1,)}, True, 1, 1.0, "1", None, {1: 2}, {"1": 2}):
        back = wire.read(json.loads(json.dumps(wire.dump(value))))
        assert back == value
        assert type(back) is type(value)


def test_what_has_its_default_is_not_sent() -> None:
    assert wire.dump(Event(3, (5,))) == {"@": "Event", "key": 3, "tokens": [5]}
    assert len(json.dumps(wire.dump(Request([1], Sampling(max_tokens=4))))) < 120


@pytest.mark.parametrize("value", [object(), {1, 2}, print, Request("a", id=b"x"), Result(trace={"model": object()})])  # type: ignore[arg-type]
def test_what_cannot_cross_is_named(value: Any) -> None:
    with pytest.raises(TypeError, match="a (object|set|builtin_function_or_method|bytes)"):
        wire.dump(value)


@pytest.mark.parametrize("document", [{"@": "Popen", "args": "x"}, {"@": "Event"}, {"@": "Event", "key": 1, "more": 2}, {"@": 3}])
def test_what_is_no_value_is_refused(document: Any) -> None:
    with pytest.raises(ValueError, match="not a"):
        wire.read(document)
