"""vLLM's and transformers' names for speculation."""

from __future__ import annotations

from typing import Any

import pytest

import hasten
from hasten.lm.decode.names import from_transformers, from_vllm
from hasten.recipe import Use
from hasten.values import Sampling, UserError


@pytest.mark.parametrize(
    ("config", "use"),
    [
        (
            {"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_max": 4, "prompt_lookup_min": 2},
            Use("ngram", {"k": 5, "longest": 4, "shortest": 2}),
        ),
        ({"method": "suffix", "suffix_decoding_max_tree_depth": 12}, Use("suffix", {"depth": 12})),
        ({"model": "zoo:arith-xs", "num_speculative_tokens": 3}, Use("draft", {"model": "zoo:arith-xs", "k": 3})),
        ({"method": "draft_model", "model": "m", "rejection_sample_method": "block"}, Use("draft", {"model": "m", "mode": "block"})),
    ],
)  # fmt: skip
def test_vllm(config: dict[str, Any], use: Use) -> None:
    assert from_vllm(config) == use


def test_transformers() -> None:
    keywords = {"assistant_model": "m", "num_assistant_tokens": 4, "num_assistant_tokens_schedule": "heuristic_transient"}
    assert from_transformers(keywords) == Use("draft", {"model": "m", "k": 4, "schedule": "heuristic"})
    assert from_transformers({"assistant_early_exit": 2, "num_assistant_tokens": 3}) == Use("early_exit", {"layers": 2, "k": 3})
    assert from_transformers({"prompt_lookup_num_tokens": 9, "max_matching_ngram_size": 3}) == Use(
        "ngram", {"k": 9, "longest": 3, "shortest": 1}
    )


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"method": "eagle"}, "method='eagle'"),
        ({"num_speculative_tokens": 3}, "method=None"),
        ({"method": "ngram", "model": "x"}, "unknown key 'model' of method 'ngram'"),
        ({"method": "ngram", "num_speculative_token": 3}, "did you mean 'num_speculative_tokens'"),
        ({"model": "m", "draft_sample_method": "greedy"}, "draft_sample_method='greedy'"),
    ],
)
def test_what_has_no_counterpart_is_refused(config: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        from_vllm(config)


def test_transformers_keywords_need_their_technique() -> None:
    with pytest.raises(UserError, match="num_assistant_tokens: needs assistant_model"):
        from_transformers({"num_assistant_tokens": 3})
    with pytest.raises(UserError, match="unknown key 'num_assistant_tokens' beside"):
        from_transformers({"prompt_lookup_num_tokens": 3, "num_assistant_tokens": 3})


def test_load_takes_both() -> None:
    a = hasten.load("zoo:arith-s", speculative_config={"method": "ngram", "num_speculative_tokens": 3})
    b = hasten.load("zoo:arith-s", assistant_model="zoo:arith-xs", num_assistant_tokens=2)
    assert (str(a.recipe), str(b.recipe)) == ("zoo:arith-s +ngram(k=3)", "zoo:arith-s +draft(model=zoo:arith-xs,k=2)")
    [x], [y] = (lm.generate("a = 7 ; b = a * 3 ; ? b :", Sampling(max_tokens=9)) for lm in (a, b))
    assert x.text == y.text
    with pytest.raises(UserError, match="decode techniques"):
        hasten.load("zoo:arith-s +ngram", speculative_config={"method": "suffix"})
    with pytest.raises(UserError, match="both"):
        hasten.load("zoo:arith-s", speculative_config={"method": "suffix"}, prompt_lookup_num_tokens=3)
