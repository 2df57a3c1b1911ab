"""Speculation under the names that users know: vLLM's `speculative_config` and the keywords of transformers' `generate`, as a recipe's part.

What has no counterpart here is refused by name, never ignored. hasten chooses how many tokens are proposed by goodput, up to the number given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from hasten.recipe import Use
from hasten.values import UserError, did_you_mean

Settle = Callable[[Any], dict[str, Any]]


def _as(name: str) -> Settle:
    return lambda value: {name: value}


def _one_of(what: str, known: Mapping[str, dict[str, Any]]) -> Settle:
    def settle(value: Any) -> dict[str, Any]:
        if value not in known:
            raise UserError(f"{what}={value!r}{did_you_mean(str(value), known)}")
        return known[value]

    return settle


VLLM: dict[str, dict[str, Settle]] = {
    "ngram": {"num_speculative_tokens": _as("k"), "prompt_lookup_min": _as("shortest"), "prompt_lookup_max": _as("longest")},
    "suffix": {
        "num_speculative_tokens": _as("k"), "suffix_decoding_max_tree_depth": _as("depth"),
        "suffix_decoding_max_spec_factor": _as("factor"), "suffix_decoding_min_token_prob": _as("least"),
    },
    "draft_model": {
        "num_speculative_tokens": _as("k"), "model": _as("model"),
        "rejection_sample_method": _one_of("rejection_sample_method", {"standard": {"mode": "rejection"}, "block": {"mode": "block"}}),
        "draft_sample_method": _one_of("draft_sample_method", {"probabilistic": {}}),
        "use_heterogeneous_vocab": _one_of("use_heterogeneous_vocab", {True: {}, False: {}}),  # type: ignore[dict-item]
    },
}  # fmt: skip
NAMES = {"ngram": "ngram", "suffix": "suffix", "draft_model": "draft"}

SCHEDULE = _one_of(
    "num_assistant_tokens_schedule",
    {"constant": {"schedule": "constant"}, "heuristic": {"schedule": "heuristic"}, "heuristic_transient": {"schedule": "heuristic"}},
)
TRANSFORMERS: dict[str, dict[str, Settle]] = {
    "draft": {
        "assistant_model": _as("model"), "num_assistant_tokens": _as("k"), "num_assistant_tokens_schedule": SCHEDULE,
        "assistant_confidence_threshold": _as("confidence"),
        "assistant_ensemble_weight": lambda w: {"ensemble_weight": w, "mode": "rejection"},
    },
    "early_exit": {
        "assistant_early_exit": _as("layers"), "num_assistant_tokens": _as("k"), "num_assistant_tokens_schedule": SCHEDULE,
        "assistant_confidence_threshold": _as("confidence"),
    },
    "ngram": {"prompt_lookup_num_tokens": _as("k"), "max_matching_ngram_size": lambda n: {"longest": n, "shortest": 1}},
}  # fmt: skip
KEYWORDS = {name for group in TRANSFORMERS.values() for name in group}


def from_vllm(config: Mapping[str, Any]) -> Use:
    """`{"method": "ngram", "num_speculative_tokens": 5}` -> the use of a technique. UserError for what is unknown or has no counterpart."""
    given = dict(config)
    method = given.pop("method", None) or ("draft_model" if "model" in given else None)
    if method not in VLLM:
        raise UserError(f"speculative_config: method={method!r}{did_you_mean(str(method), VLLM)}")
    return Use(NAMES[method], _settled("speculative_config: ", given, VLLM[method], f" of method {method!r}"))


def from_transformers(keywords: Mapping[str, Any]) -> Use:
    """`{"assistant_model": "zoo:arith-xs", "num_assistant_tokens": 5}` -> the use of a technique. UserError as `from_vllm`."""
    name = next((name for name, group in TRANSFORMERS.items() if next(iter(group)) in keywords), None)
    if name is None:
        heads = [next(iter(group)) for group in TRANSFORMERS.values()]
        raise UserError(f"{', '.join(keywords)}: needs {', '.join(heads[:-1])} or {heads[-1]} beside it")
    return Use(name, _settled("", keywords, TRANSFORMERS[name], f" beside {next(iter(TRANSFORMERS[name]))}"))


def _settled(where: str, given: Mapping[str, Any], known: Mapping[str, Settle], beside: str) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, value in given.items():
        if name not in known:
            raise UserError(f"{where}unknown key {name!r}{beside}{did_you_mean(name, known)}")
        out |= known[name](value)
    return out
