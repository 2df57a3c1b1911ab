"""The values that cross a seam: what is asked (Request, Sampling), what comes back (Result, Event), what a strategy yields (Ask).

All are frozen dataclasses of plain Python; no tensor crosses a seam. Errors that a user can cause are `UserError`: one clear
sentence, which the command line prints without a traceback and with exit code 2.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeAlias

from hasten.usage import Usage

Key: TypeAlias = Hashable
Message: TypeAlias = Mapping[str, Any]
Prompt: TypeAlias = "str | Sequence[int] | Sequence[Message]"


class UserError(ValueError):
    """Something the user asked for cannot be done; the message is one sentence that says what and what to do."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen. temperature 0 is greedy. Names and meanings are the field's (vLLM's, OpenAI's).

    `seed` names a stream of counter-based random numbers: the same request gives the same tokens alone or in any batch.
    `logprobs` = k asks for the chosen token's log-probability and those of the k most likely (0: the chosen only, None: none);
    `prompt_logprobs` = k the same for the tokens of the prompt, which is then computed whole (max_tokens=0 asks for nothing else).
    """

    max_tokens: int | None = None  # None: 256, or what the model's context has room for
    min_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    seed: int = 0
    n: int = 1
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        for name in ("stop", "stop_token_ids"):
            value = getattr(self, name)
            object.__setattr__(self, name, (value,) if isinstance(value, str | int) else tuple(value))
        if any(not s for s in self.stop):
            raise UserError("stop: an empty stop string would end every answer at once")
        for name, low, high in _RANGES:
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise UserError(f"{name}={value}: must lie between {low:g} and {high:g}")

    def but(self, **changes: Any) -> Sampling:
        """A copy with some fields changed; an unknown field is refused by name."""
        known = {f.name for f in fields(self)}
        for name in changes:
            if name not in known:
                raise UserError(f"unknown sampling field {name!r}{did_you_mean(name, known)}")
        return replace(self, **changes)


_BIG = float(2**31 - 1)
_RANGES: tuple[tuple[str, float, float], ...] = (
    ("max_tokens", 0, _BIG), ("min_tokens", 0, _BIG), ("temperature", 0, 100), ("top_k", 0, _BIG), ("top_p", 1e-9, 1), ("min_p", 0, 1),
    ("repetition_penalty", 1e-3, 100), ("presence_penalty", -100, 100), ("frequency_penalty", -100, 100), ("n", 1, 65536),
    ("logprobs", 0, 1024), ("prompt_logprobs", 0, 1024), ("seed", -(2**63), 2**63 - 1),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Request:
    """One thing asked of one engine.

    prompt: text, token ids, or chat messages. role: which model of the recipe is asked ("target", "reward", "draft").
    sample: index of this sample among its siblings; with `sampling.seed` it names the random stream (n > 1 counts up from it).
    score: no tokens are generated. From a causal model `Result.scores` holds, for each prompt position >= score_from, the token's
      log-probability given what precedes it (0.0 at position 0); from a reward model, the reward in [0, 1] of each step that ends at
      a position >= score_from (a step ends at the model's step tokens; the last position always counts as one).
    parent: key of a finished request that was kept; the prompt's ids are appended to the parent's whole sequence, whose cache is reused.
    keep: the cache of this request stays pinned after it finishes, for children, until a later request names it in `release`.
    """

    prompt: Prompt
    sampling: Sampling = field(default_factory=Sampling)
    id: str = ""
    role: str = "target"
    sample: int = 0
    score: bool = False
    score_from: int = 0
    parent: Key | None = None
    keep: bool = False
    release: tuple[Key, ...] = ()


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability of a chosen token, its rank-ordered alternatives as (token id, log-probability)."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Result:
    """An answer. finish_reason: "stop" (end of sequence or stop string), "length", "cancelled", or "scored".

    stop_reason: the stop string or stop token id that ended it; None for the model's own end of sequence.
    For n > 1 an engine gives n results, in `others` of the first (the Python API flattens them).
    """

    text: str = ""
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] | None = None
    finish_reason: str = "stop"
    usage: Usage = field(default_factory=Usage)
    scores: tuple[float, ...] | None = None
    others: tuple[Result, ...] = ()
    trace: Mapping[str, Any] = field(default_factory=dict)  # how a strategy arrived at its answer: votes, rewards, …
    prompt_tokens: tuple[int, ...] = ()
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None  # one for each prompt token; None for the first, which follows nothing
    stop_reason: str | int | None = None


@dataclass(frozen=True, slots=True)
class Event:
    """What one engine step says of one request: new tokens of sample `sample`, and the result once it is finished."""

    key: Key
    tokens: tuple[int, ...] = ()
    result: Result | None = None
    sample: int = 0


@dataclass(frozen=True, slots=True)
class Ask:
    """What a strategy yields: new requests by a key of its own choosing, and keys of running ones to cancel."""

    new: Mapping[Key, Request] = field(default_factory=dict)
    cancel: Sequence[Key] = ()


def did_you_mean(name: str, known: Any) -> str:
    """`; did you mean 'x'?` for the nearest known name, else the list of what there is."""
    import difflib

    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; there are: {', '.join(sorted(map(str, known)))}"
