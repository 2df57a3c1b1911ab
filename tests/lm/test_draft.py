"""Draft models: identical output in `coupled` mode whatever the draft is; the target's law in the others; the draft's cache and ledger."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from conftest import CONFIGS, make, reference
from test_engine import MAX, answers, prompts

from hasten import hf
from hasten.engine import run
from hasten.lm.constrain.allowed import Allowed
from hasten.lm.decode.draft import Draft, Options, Translated, Vocabulary
from hasten.lm.engine import TokenEngine
from hasten.values import Request, Sampling, UserError


@pytest.fixture(scope="module")
def drafts(pairs: Any) -> Any:
    """A draft of each kind for a target: itself, a stranger, and itself with noise (which agrees about half of the time)."""
    made: dict[Any, Any] = {}

    def get(family: str, kind: str) -> Any:
        if (family, kind) not in made:
            model = copy.deepcopy(pairs(family)[0]) if kind != "stranger" else make("llama", seed=9)
            if kind == "near":
                torch.manual_seed(1)
                for p in model.parameters():
                    p.data += 0.08 * p.data.std() * torch.randn_like(p)
            made[family, kind] = hf.prepare(model)
        return made[family, kind]

    return get


def draft(model: Any, **options: Any) -> Draft:
    return Draft(Options(model="x", **{"k": 4, "schedule": "constant", **options}), model, Vocabulary(97))


@pytest.mark.parametrize("kind", ["itself", "stranger", "near"])
@pytest.mark.parametrize("family", CONFIGS)
def test_greedy_is_identical(pairs: Any, drafts: Any, family: str, kind: str) -> None:
    model, ours = pairs(family)
    asked = prompts(1)
    engine = TokenEngine(ours, decode=draft(drafts(family, kind)), max_rows=4, step_tokens=30)
    assert answers(engine, asked) == reference(model, asked, MAX)
    assert engine.decode.cache.active == 0
    if kind == "itself":
        assert engine.steps < MAX + 8  # nearly all is accepted


@pytest.mark.parametrize("schedule", ["goodput", "heuristic", "constant"])
@pytest.mark.parametrize("k", [1, 3, 8])
def test_samples_are_identical_at_any_temperature(pairs: Any, drafts: Any, k: int, schedule: str) -> None:
    _, ours = pairs("llama")
    s = {"temperature": 0.9, "top_k": 30, "top_p": 0.95, "repetition_penalty": 1.2, "presence_penalty": 0.3, "min_tokens": 4, "seed": 5}
    asked = prompts(6)
    plain = answers(TokenEngine(ours), asked, **s)
    engine = TokenEngine(
        ours, decode=draft(drafts("llama", "near"), k=k, schedule=schedule), memory=400 * TokenEngine(ours).cache.shape.bytes_per_position
    )
    assert answers(engine, asked, **s) == plain


def test_constraints_hold_for_the_draft_too(pairs: Any, drafts: Any) -> None:
    _, ours = pairs("qwen3")
    plain, allowed = TokenEngine(ours, constraint=Allowed(range(10, 40))), Allowed(range(10, 40))
    engine = TokenEngine(ours, constraint=allowed, decode=draft(drafts("qwen3", "near")))
    s = {"temperature": 1.0, "max_tokens": 12}
    assert answers(engine, prompts(5), **s) == answers(plain, prompts(5), **s)
    assert engine.steps < plain.steps


@pytest.mark.parametrize("family", CONFIGS)
def test_greedy_trees_are_identical(pairs: Any, drafts: Any, family: str) -> None:
    model, ours = pairs(family)
    asked = prompts(1)
    plain, tree = (TokenEngine(ours, decode=draft(drafts(family, "near"), k=k, branches=b), max_rows=4) for k, b in ((3, 1), (9, 3)))
    assert answers(plain, asked) == answers(tree, asked) == reference(model, asked, MAX)
    assert tree.steps <= plain.steps  # drafts of the same depth, three tokens tried at each position


@pytest.mark.parametrize("schedule", ["goodput", "heuristic", "constant"])
def test_samples_of_trees_are_identical_at_any_temperature(pairs: Any, drafts: Any, schedule: str) -> None:
    _, ours = pairs("llama")
    s = {"temperature": 0.9, "top_k": 30, "top_p": 0.95, "repetition_penalty": 1.2, "presence_penalty": 0.3, "min_tokens": 4, "seed": 5}
    plain = answers(TokenEngine(ours, constraint=Allowed(range(2, 60))), prompts(6), **s)
    decode = draft(drafts("llama", "near"), k=8, branches=3, schedule=schedule, confidence=0.1 if schedule == "constant" else 0.0)
    assert answers(TokenEngine(ours, decode=decode, constraint=Allowed(range(2, 60))), prompts(6), **s) == plain


@pytest.mark.parametrize("mode", ["rejection", "block", "rejection tree"])
def test_the_law_is_the_targets(pairs: Any, drafts: Any, mode: str) -> None:
    """Chi-square of the first two tokens together against the exact law, for an engine that speculates through them."""
    from scipy.stats import chisquare

    model, ours = pairs("llama")
    prompt, ids = [5, 6, 7], list(range(20, 23))
    bias = dict.fromkeys(ids, 30.0)  # a law on three tokens
    law = {}
    for a in ids:
        first = torch.softmax(model(torch.tensor([prompt])).logits[0, -1, ids] / 2, -1)
        second = torch.softmax(model(torch.tensor([[*prompt, a]])).logits[0, -1, ids] / 2, -1)
        law |= {(a, b): float(first[ids.index(a)] * second[j]) for j, b in enumerate(ids)}
    for kind in ("near", "stranger"):
        decode = draft(drafts("llama", kind), mode=mode.split()[0], k=5 if "tree" in mode else 2, branches=3 if "tree" in mode else 1)
        engine = TokenEngine(ours, decode=decode)
        warm = Sampling(temperature=2.0, logit_bias=bias, max_tokens=3, n=3000, ignore_eos=True, seed=3)
        first = run(engine, {0: Request(prompt, warm)})[0]
        seen = Counter(r.tokens[:2] for r in (first, *first.others))
        inside = sum(seen[pair] for pair in law)
        assert inside >= 2995  # the bias leaves next to nothing to the others
        pairs_ = [pair for pair in law if law[pair] * inside > 5]
        rest = inside - sum(seen[p] for p in pairs_)
        want = [law[p] * inside for p in pairs_]
        extra = inside - sum(want)
        observed, expected = ([*(seen[p] for p in pairs_), rest], [*want, extra]) if extra > 5 else ([seen[p] for p in pairs_], want)
        scale = sum(observed) / sum(expected)
        assert chisquare(observed, [e * scale for e in expected]).pvalue > 1e-5


def test_greedy_rejection_is_identical(pairs: Any, drafts: Any) -> None:
    model, ours = pairs("gemma")
    engine = TokenEngine(ours, decode=draft(drafts("gemma", "near"), mode="rejection"))
    assert answers(engine, prompts(2, 4)) == reference(model, prompts(2, 4), MAX)


def test_the_drafts_cost_is_in_the_ledger_and_its_prompt_is_fed_once(pairs: Any, drafts: Any) -> None:
    _, ours = pairs("llama")
    engine = TokenEngine(ours, decode=draft(drafts("llama", "itself"), k=3))
    prompt = list(range(5, 45))
    got = run(engine, {0: Request(prompt, Sampling(max_tokens=9, ignore_eos=True))})[0]
    target, drafted = got.usage.by_role["target"], got.usage.by_role["draft"]
    # the target's first token comes from the prompt; then two rounds of 3 + 1
    assert (target.forwards, target.proposed, target.accepted) == (3, 6, 6)
    assert (drafted.forwards, drafted.generated, drafted.prompt) == (6, 6, 41)
    assert drafted.flops > 0 and drafted.bytes > 0
    again = run(engine, {1: Request(prompt, Sampling(max_tokens=9, ignore_eos=True))})[1]
    assert again.tokens == got.tokens and again.usage.by_role["draft"].reused == 40


def test_a_row_that_the_draft_has_no_room_for_is_decoded_plainly(pairs: Any, drafts: Any) -> None:
    model, ours = pairs("phi3")
    technique = draft(drafts("phi3", "itself"))
    engine = TokenEngine(ours, decode=technique)
    technique.cache.max_len = 30
    asked = prompts(3, 5)
    assert answers(engine, asked) == reference(model, asked, MAX)


class Words:
    """A tokenizer of letters; `shift` moves the ids, `pairs` adds two-letter tokens."""

    def __init__(self, shift: int = 0, pairs: bool = False) -> None:
        letters = [chr(33 + i) for i in range(60)]
        words = [*letters, *(a + a for a in letters[:20])] if pairs else letters
        self.words = {w: (i + shift) % 90 for i, w in enumerate(words)}
        self.back = {i: w for w, i in self.words.items()}

    def get_vocab(self) -> dict[str, int]:
        return self.words

    def __call__(self, text: str) -> dict[str, list[int]]:
        ids = []
        while text:
            n = 2 if text[:2] in self.words else 1
            ids.append(self.words[text[:n]])
            text = text[n:]
        return {"input_ids": ids}

    def decode(self, tokens: list[int], skip_special_tokens: bool = True) -> str:
        return "".join(self.back.get(t, "") for t in tokens)


def test_a_draft_with_another_tokenizer_leaves_the_output_identical(pairs: Any, drafts: Any) -> None:
    model, ours = pairs("llama")
    words = Translated(97, Words(), Words(shift=7, pairs=True))
    assert words.context([0, 0, 5]) == [67, 12] and words.own(5) == 12
    aligned = words.aligned(torch.arange(97.0)[None])
    assert aligned[0, 5] == 12 and aligned[0, 96] == float("-inf")
    engine = TokenEngine(ours, decode=Draft(Options(model="x", k=3, schedule="constant"), drafts("llama", "stranger"), words))
    asked = [[t % 60 for t in p] for p in prompts(3, 5)]
    assert answers(engine, asked) == reference(model, asked, MAX)
    with pytest.raises(UserError, match="shares no tokens"):
        Translated(97, Words(), type("Other", (Words,), {"get_vocab": lambda self: {"zz": 1}})())


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"branches": 0}, "branches=0"), ({"branches": 2, "mode": "block"}, "branches go with"),
        ({"k": -1}, "k=-1"), ({"mode": "block", "schedule": "goodput"}, "clock"), ({"mode": "blok"}, "did you mean 'block'"),
        ({"confidence": 1.0}, "confidence"), ({"ensemble_weight": 0.5}, "mode=rejection only"), ({"schedule": "x"}, "no such schedule"),
    ],
)  # fmt: skip
def test_bad_options(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Options(model="x", **wrong)


def test_the_engine_tells_the_schedule_how_long_steps_took(pairs: Any, drafts: Any) -> None:
    """Without that the controller never has a plain step to compare with, and never proposes anything."""
    _, ours = pairs("llama")
    technique = draft(drafts("llama", "itself"), schedule="goodput")
    run(TokenEngine(ours, decode=technique), {0: Request([5, 6, 7], Sampling(max_tokens=12, ignore_eos=True))})
    assert 1 in technique.schedule.steps.known and technique.passes > 0


def test_a_recipe_is_as_exact_as_the_drafts_options() -> None:
    from hasten import techniques
    from hasten.recipe import Recipe

    for options, exact in (("", "identical"), (",mode=block", "distribution"), (",mode=rejection,ensemble_weight=0.5", "approximate")):
        assert techniques.exactness(Recipe.parse(f"m +draft(model=x{options})")) == exact


def test_a_recipe_with_a_draft(tmp_path: Any) -> None:
    import hasten

    plain, drafted = hasten.load("zoo:arith-s"), hasten.load("zoo:arith-s +draft(model=zoo:arith-xs)")
    asked = ["a = 7 ; b = a * 3 ; c = b + a ; ? c :", "k = 2 ; d = 5 ; e = k * d ; ? e :"]
    s = Sampling(max_tokens=24)
    a, b = plain.generate(asked, s), drafted.generate(asked, s)
    assert [r.text for r in a] == [r.text for r in b]
    assert "draft" in b[0].usage.by_role
    with pytest.raises(UserError, match="needs a draft model"):
        hasten.load("zoo:arith-s +draft")
