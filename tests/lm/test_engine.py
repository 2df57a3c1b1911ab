"""The engine gives transformers' own greedy text: any family, ragged batches, prompts in chunks, forks, preemption, speculation, constraints."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from conftest import CONFIGS, reference

from hasten.engine import run
from hasten.lm.constrain.allowed import Allowed
from hasten.lm.decode import lookahead, suffix
from hasten.lm.decode.lookahead import Lookahead
from hasten.lm.decode.ngram import Ngram, Options
from hasten.lm.decode.suffix import Suffix
from hasten.lm.engine import TokenEngine
from hasten.values import Request, Sampling, UserError

MAX = 20


def prompts(seed: int, count: int = 7) -> list[list[int]]:
    rand = random.Random(seed)
    shared = [rand.randrange(3, 97) for _ in range(18)]
    heads = [[], shared[:9], shared]
    return [heads[i % 3] + [rand.randrange(3, 97) for _ in range(rand.choice([1, 2, 5, 17, 40]))] for i in range(count)]


def answers(engine: TokenEngine, asked: list[list[int]], **sampling: Any) -> list[list[int]]:
    s = Sampling(**{"max_tokens": MAX, **sampling})
    return [list(r.tokens) for r in run(engine, {i: Request(p, s) for i, p in enumerate(asked)}).values()]


SETTINGS: dict[str, Any] = {
    "batch": {},
    "chunks": {"step_tokens": 7},
    "few rows": {"max_rows": 2},
    "ngram": {"decode": lambda: Ngram(Options(k=3, shortest=1, schedule="constant"))},
    "ngram in chunks": {"decode": lambda: Ngram(Options(k=5, shortest=1)), "step_tokens": 11, "max_rows": 4},
    "suffix": {"decode": lambda: Suffix(suffix.Options(k=5, schedule="constant")), "max_rows": 4},
    "ngram trees": {"decode": lambda: Ngram(Options(k=7, shortest=1, schedule="constant", branches=3))},
    "suffix trees": {"decode": lambda: Suffix(suffix.Options(k=8, schedule="constant", branches=3)), "max_rows": 4},
    "lookahead": {"decode": lambda: Lookahead(lookahead.Options(window=3, ngram=3, guesses=3, schedule="constant"))},
    "nothing shared": {"share": False, "retained": 0},
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("family", CONFIGS)
def test_greedy_is_identical_in_fp64(pairs: Any, family: str, setting: str) -> None:
    model, ours = pairs(family)
    options = {k: v() if callable(v) else v for k, v in SETTINGS[setting].items()}
    asked = prompts(1)
    assert answers(TokenEngine(ours, **options), asked) == reference(model, asked, MAX)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 8))
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("family", CONFIGS)
def test_greedy_is_identical_many_seeds(pairs: Any, family: str, setting: str, seed: int) -> None:
    model, ours = pairs(family)
    options = {k: v() if callable(v) else v for k, v in SETTINGS[setting].items()}
    asked = prompts(seed, 20)
    assert answers(TokenEngine(ours, **options), asked) == reference(model, asked, MAX)


@pytest.mark.parametrize("family", CONFIGS)
def test_greedy_in_fp32_differs_only_at_near_ties(pairs: Any, family: str) -> None:
    """The design's rule: equal, or the first difference has a gap of the top two logits under 1e-4. Near-ties are reported."""
    model, ours = pairs(family, torch.float32)
    asked = prompts(3)
    near = 0
    for prompt, got, want in zip(asked, answers(TokenEngine(ours), asked), reference(model, asked, MAX), strict=True):
        if got != want:
            at = next(i for i, (a, b) in enumerate(zip(got, want, strict=False)) if a != b)
            logits = model(torch.tensor([prompt + want[:at]])).logits[0, -1]
            top = logits.topk(2).values
            assert top[0] - top[1] < 1e-4
            near += 1
    assert near <= 1


@pytest.mark.parametrize("family", CONFIGS)
def test_preempted_rows_resume_exactly(pairs: Any, family: str) -> None:
    model, ours = pairs(family)
    asked = prompts(4)
    engine = TokenEngine(ours, memory=120 * TokenEngine(ours).cache.shape.bytes_per_position)
    stepped_back = []
    original = engine.scheduler._step_back
    engine.scheduler._step_back = lambda row: (stepped_back.append(row), original(row))[1]  # type: ignore[method-assign, func-returns-value]
    assert answers(engine, asked) == reference(model, asked, MAX)
    assert stepped_back, "the setting must force at least one row to step back"


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("k", [0, 4])
def test_allowed_tokens_equal_masked_greedy(pairs: Any, family: str, k: int) -> None:
    model, ours = pairs(family)
    ids = set(range(10, 40))
    engine = TokenEngine(ours, constraint=Allowed(ids), decode=Ngram(Options(k=k, shortest=1, schedule="constant")))
    for prompt, got in zip(prompts(5, 4), answers(engine, prompts(5, 4), max_tokens=9), strict=True):
        text = list(prompt)
        for _ in range(9):
            logits = model(torch.tensor([text])).logits[0, -1]
            text.append(max(ids, key=lambda t: float(logits[t])))
        assert got == text[len(prompt) :]


def test_sampling_does_not_depend_on_the_batch(pairs: Any) -> None:
    _, ours = pairs("llama")
    asked = prompts(6)
    s = {"temperature": 0.9, "top_k": 20, "top_p": 0.95, "seed": 5}
    together = answers(TokenEngine(ours, step_tokens=13), asked, **s)
    alone = [answers(TokenEngine(ours), [p], **s)[0] for p in asked]
    speculated = answers(TokenEngine(ours, decode=Ngram(Options(k=4, shortest=1, schedule="heuristic"))), asked, **s)
    assert together == alone == speculated
    assert answers(TokenEngine(ours), asked, **{**s, "seed": 6}) != together


def test_n_samples_share_the_prompt_and_differ(pairs: Any) -> None:
    _, ours = pairs("qwen3")
    prompt = list(range(5, 45))
    engine = TokenEngine(ours)
    first = run(engine, {"a": Request(prompt, Sampling(n=4, temperature=1.0, max_tokens=8))})["a"]
    samples = [first, *first.others]
    assert len({r.tokens for r in samples}) > 1
    assert [r.usage.by_role["target"].reused for r in samples] == [0, 39, 39, 39]
    assert engine.positions == 40 + 3 + 4 * 7
    single = [run(engine, {"b": Request(prompt, Sampling(temperature=1.0, max_tokens=8), sample=i)})["b"].tokens for i in range(4)]
    assert single == [r.tokens for r in samples]


@pytest.mark.parametrize("share", [True, False])
def test_a_finished_request_serves_as_prefix_and_as_parent(pairs: Any, share: bool) -> None:
    model, ours = pairs("mistral")
    engine = TokenEngine(ours, share=share)
    prompt = list(range(3, 33))
    parent = run(engine, {"p": Request(prompt, Sampling(max_tokens=6), keep=True)})["p"]
    child = run(engine, {"c": Request([50, 51], Sampling(max_tokens=6), parent="p")})["c"]
    whole = prompt + list(parent.tokens) + [50, 51]
    assert list(child.tokens) == reference(model, [whole], 6)[0]
    # all but the parent's last token, which was never computed, and the new ones
    assert child.usage.by_role["target"].reused == len(whole) - 3
    run(engine, {"d": Request([9], Sampling(max_tokens=1), release=("p",))})
    with pytest.raises(UserError, match="not a finished request that was kept"):
        engine.add("e", Request([1], parent="p"))


def test_scores_are_log_probabilities(pairs: Any) -> None:
    model, ours = pairs("gemma")
    prompt = prompts(7)[5]
    logp = torch.log_softmax(model(torch.tensor([prompt])).logits[0], -1)
    want = [0.0] + [float(logp[i, t]) for i, t in enumerate(prompt[1:])]
    engine = TokenEngine(ours, step_tokens=5)
    for start in (0, 1, 4, len(prompt) - 1):
        got = run(engine, {"s": Request(prompt, score=True, score_from=start)})["s"]
        assert got.scores == pytest.approx(want[start:], abs=1e-6)
        assert got.finish_reason == "scored"


def test_cancel_frees_the_row_and_reports_its_cost(pairs: Any) -> None:
    _, ours = pairs("llama")
    engine = TokenEngine(ours)
    engine.add("a", Request([5, 6, 7], Sampling(max_tokens=50, ignore_eos=True)))
    engine.add("b", Request([5, 6, 8], Sampling(max_tokens=3, ignore_eos=True)))
    engine.step()
    engine.cancel("a")
    engine.cancel("nobody")
    results = {}
    while not engine.idle:
        results |= {e.key: e.result for e in engine.step() if e.result}
    assert results["a"].finish_reason == "cancelled"
    assert results["a"].usage.by_role["target"].forwards == 1
    assert len(results["b"].tokens) == 3
    assert engine.cache.active == 0


def test_ledger_counts_what_was_done(pairs: Any) -> None:
    _, ours = pairs("llama")
    engine = TokenEngine(ours)
    prompt = list(range(3, 20))
    got = run(engine, {"a": Request(prompt, Sampling(max_tokens=5, ignore_eos=True))})["a"]
    cost = got.usage.by_role["target"]
    assert (cost.prompt, cost.reused, cost.generated, cost.forwards) == (17, 0, 5, 5)
    assert cost.flops == engine.costs.flops(17, 0, 1) + sum(engine.costs.flops(1, 17 + i, 1) for i in range(4))
    assert 0 < got.usage.ttft <= got.usage.seconds


def test_stop_strings_and_ids_min_and_max_tokens(pairs: Any) -> None:
    _, ours = pairs("llama")

    class Words:
        """Token t is the letter of its number: enough of a tokenizer to test text."""

        def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
            return {"input_ids": [ord(c) - 33 for c in text]}

        def decode(self, tokens: list[int], skip_special_tokens: bool = True) -> str:
            return "".join(chr(t + 33) for t in tokens)

    engine = TokenEngine(ours, Words())
    base = run(engine, {0: Request("hello", Sampling(max_tokens=12, ignore_eos=True))})[0]
    stop = base.text[4:6]
    cut = run(engine, {0: Request("hello", Sampling(max_tokens=12, ignore_eos=True, stop=stop))})[0]
    assert cut.text == base.text[: base.text.index(stop)]
    assert cut.finish_reason == "stop"
    token = base.tokens[3]
    at = base.tokens.index(token)
    by_id = run(engine, {0: Request("hello", Sampling(max_tokens=12, ignore_eos=True, stop_token_ids=(token,)))})[0]
    assert by_id.tokens == base.tokens[: at + 1]
    late = run(engine, {0: Request("hello", Sampling(max_tokens=12, ignore_eos=True, stop_token_ids=(token,), min_tokens=at + 2))})[0]
    assert len(late.tokens) > at + 1
    assert token not in late.tokens[: at + 1]
    none = run(engine, {0: Request("hello", Sampling(max_tokens=0))})[0]
    assert (none.tokens, none.finish_reason) == ((), "length")


def test_logprobs_are_the_models_own(pairs: Any) -> None:
    model, ours = pairs("phi3")
    prompt = [4, 5, 6]
    got = run(TokenEngine(ours), {0: Request(prompt, Sampling(max_tokens=4, logprobs=3, ignore_eos=True, temperature=0.7))})[0]
    assert got.logprobs is not None
    whole = prompt + list(got.tokens)
    logp = torch.log_softmax(model(torch.tensor([whole])).logits[0].float(), -1)
    for i, entry in enumerate(got.logprobs):
        row = logp[len(prompt) + i - 1]
        assert entry.token == got.tokens[i]
        assert entry.logprob == pytest.approx(float(row[entry.token]), abs=1e-5)
        assert [t for t, _ in entry.top] == row.topk(3).indices.tolist()


@pytest.mark.parametrize("max_tokens", [0, 1, 5])
def test_prompt_logprobs_are_read_whole_whatever_is_cached_cut_or_pushed_out(pairs: Any, max_tokens: int) -> None:
    model, ours = pairs("qwen2")
    asked = [[*p, 7, 8] for p in prompts(4)]
    memory = 100 * TokenEngine(ours).cache.shape.bytes_per_position
    for engine in (TokenEngine(ours), TokenEngine(ours, step_tokens=5), TokenEngine(ours, memory=memory)):
        s = Sampling(max_tokens=max_tokens, prompt_logprobs=2, ignore_eos=True)
        for _ in range(2):  # the second time the prompts are in the cache
            got = run(engine, {i: Request(p, s) for i, p in enumerate(asked)})
            for i, prompt in enumerate(asked):
                first, *rest = got[i].prompt_logprobs
                logp = torch.log_softmax(model(torch.tensor([prompt])).logits[0].float(), -1)
                assert first is None and [e.token for e in rest] == prompt[1:]
                assert [e.logprob for e in rest] == pytest.approx([float(logp[j, t]) for j, t in enumerate(prompt[1:])], abs=1e-5)
                assert [e.top[0][0] for e in rest] == logp[:-1].argmax(-1).tolist()
                assert list(got[i].tokens) == reference(model, [prompt], 6)[0][:max_tokens]
    several = run(TokenEngine(ours), {0: Request(asked[0], Sampling(n=3, temperature=1.0, max_tokens=2, prompt_logprobs=0))})[0]
    assert all(r.prompt_logprobs == several.prompt_logprobs and len(r.prompt_logprobs) == len(asked[0]) for r in several.others)
    assert run(TokenEngine(ours), {0: Request([5], Sampling(max_tokens=0, prompt_logprobs=0))})[0].prompt_logprobs == (None,)


def test_scores_are_whole_when_a_row_steps_back(pairs: Any) -> None:
    model, ours = pairs("llama")
    asked = prompts(4)
    engine = TokenEngine(ours, step_tokens=7, memory=70 * TokenEngine(ours).cache.shape.bytes_per_position)
    running = {f"g{i}": Request(p, Sampling(max_tokens=20, ignore_eos=True)) for i, p in enumerate(asked)}
    got = run(engine, running | {i: Request(p, score=True) for i, p in enumerate(asked)})
    for i, prompt in enumerate(asked):
        logp = torch.log_softmax(model(torch.tensor([prompt])).logits[0], -1)
        assert got[i].scores == pytest.approx([0.0] + [float(logp[j, t]) for j, t in enumerate(prompt[1:])], abs=1e-6)


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (Request([]), "empty"),
        (Request([5, 97]), "97 is outside"),
        (Request([-1]), "-1 is outside"),
        (
            Request([5] * 200, Sampling(max_tokens=57), id="big"),
            "request big: 200 prompt tokens \\+ max_tokens=57 = 257 positions, but the cache holds 256",
        ),
        (Request("text"), "without a tokenizer"),
        (Request([5], Sampling(stop="x")), "stop strings need a tokenizer"),
        (Request([5], Sampling(n=2), keep=True), "n > 1"),
        (Request([5], Sampling(logit_bias={500: 1.0})), "logit_bias"),
        (Request([5], parent="x"), "parent 'x'"),
        (Request([{"role": "user"}]), "a prompt is"),
    ],
)
def test_bad_requests_are_refused_by_name(pairs: Any, request_: Request, words: str) -> None:
    _, ours = pairs("llama")
    engine = TokenEngine(ours)
    with pytest.raises(UserError, match=words):
        engine.add("k", request_)
    assert engine.idle


def test_a_long_prompt_does_not_delay_rows_that_decode(pairs: Any) -> None:
    _, ours = pairs("llama")
    engine = TokenEngine(ours, step_tokens=16)
    engine.add("short", Request([5, 6], Sampling(max_tokens=20, ignore_eos=True)))
    engine.step()
    engine.add("long", Request(list(range(3, 97)) * 2, Sampling(max_tokens=2, ignore_eos=True)))
    for _ in range(10):
        assert any(e.key == "short" and e.tokens for e in engine.step())


def test_positions_computed_are_the_useful_ones(pairs: Any) -> None:
    """No padding enters a matrix product: positions computed = prompt positions not reused + tokens fed back."""
    _, ours = pairs("llama")
    engine = TokenEngine(ours)
    asked = prompts(8, 12)
    done = run(engine, {i: Request(p, Sampling(max_tokens=MAX)) for i, p in enumerate(asked)})
    costs = [r.usage.by_role["target"] for r in done.values()]
    assert engine.positions == sum(c.prompt - c.reused + c.generated - 1 for c in costs)
