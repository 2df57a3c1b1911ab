"""Early exits: identical output whatever the exit is worth, the target's law by rejection, its own cache unharmed, what cannot be cut refused."""

from __future__ import annotations

import copy
import types
from collections import Counter
from typing import Any

import pytest
import torch
from conftest import CONFIGS, reference
from test_engine import MAX, answers, prompts

import hasten
from hasten import hf
from hasten.engine import run
from hasten.lm.constrain.allowed import Allowed
from hasten.lm.decode import early_exit, verify
from hasten.lm.decode.draft import Vocabulary
from hasten.lm.decode.early_exit import EarlyExit, Options
from hasten.lm.engine import TokenEngine
from hasten.values import Request, Sampling, UserError


def exits(model: Any, layers: int = 2, **options: Any) -> EarlyExit:
    return EarlyExit(Options(**{"schedule": "constant", **options}), hf.cut(model, layers), Vocabulary(97))


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("family", CONFIGS)
def test_greedy_is_identical(pairs: Any, family: str, layers: int) -> None:
    model, ours = pairs(family)
    asked = prompts(1)
    engine = TokenEngine(ours, decode=exits(ours, layers), max_rows=4, step_tokens=30)
    assert answers(engine, asked) == reference(model, asked, MAX)
    assert engine.cache.active == 0


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 6))
@pytest.mark.parametrize("k", [1, 4, 8])
@pytest.mark.parametrize("family", CONFIGS)
def test_greedy_is_identical_many_seeds(pairs: Any, family: str, k: int, seed: int) -> None:
    model, ours = pairs(family)
    asked = prompts(seed, 32)
    assert answers(TokenEngine(ours, decode=exits(ours, 1 + seed % 2, k=k)), asked) == reference(model, asked, MAX)


def test_what_an_exit_says_is_the_model_without_its_last_layers(pairs: Any) -> None:
    """Against transformers: the hidden state after the layer, under the model's last norm and head."""
    model, ours = pairs("qwen3")
    ids = torch.tensor([prompts(1)[2]])
    with torch.no_grad():
        state = model(ids, output_hidden_states=True).hidden_states[1]
        want = model.lm_head(model.model.norm(state))[0, -1]
    engine = TokenEngine(hf.cut(ours, 1))
    seen: list[torch.Tensor] = []
    engine.decode.accept = lambda row, proposal, chosen, logits: seen.append(logits) or [*chosen]  # type: ignore[method-assign]
    run(engine, {0: Request(ids[0].tolist(), Sampling(max_tokens=1))})
    torch.testing.assert_close(seen[0][0], want)


@pytest.mark.parametrize("schedule", ["goodput", "heuristic", "constant"])
@pytest.mark.parametrize("k", [1, 3, 8])
def test_samples_are_identical_at_any_temperature(pairs: Any, k: int, schedule: str) -> None:
    _, ours = pairs("llama")
    s = {"temperature": 0.9, "top_k": 30, "top_p": 0.95, "repetition_penalty": 1.2, "presence_penalty": 0.3, "min_tokens": 4, "seed": 5}
    asked = prompts(6)
    memory = 400 * TokenEngine(ours).cache.shape.bytes_per_position  # so little that rows step back
    engine = TokenEngine(ours, decode=exits(ours, k=k, schedule=schedule), memory=memory)
    assert answers(engine, asked, **s) == answers(TokenEngine(ours), asked, **s)


def test_constraints_hold_for_the_exit_too(pairs: Any) -> None:
    _, ours = pairs("qwen3")
    plain = TokenEngine(ours, constraint=Allowed(range(10, 14)))
    engine = TokenEngine(ours, constraint=Allowed(range(10, 14)), decode=exits(ours))
    s = {"temperature": 1.0, "max_tokens": 12}
    assert answers(engine, prompts(5), **s) == answers(plain, prompts(5), **s)
    assert engine.steps < plain.steps


def test_an_exit_that_says_the_same_is_kept_whole(pairs: Any) -> None:
    """With layers behind the exit that add nothing; the ledger counts its passes and no prompt."""
    model, _ = pairs("llama")
    same = copy.deepcopy(model)
    for layer in same.model.layers[1:]:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    ours = hf.prepare(same)
    engine = TokenEngine(ours, decode=exits(ours, 1, k=3))
    got = run(engine, {0: Request(list(range(5, 45)), Sampling(max_tokens=9, ignore_eos=True))})[0]
    target, exit_ = got.usage.by_role["target"], got.usage.by_role["exit"]
    assert (target.forwards, target.proposed, target.accepted) == (3, 6, 6)  # the prompt, then two rounds of 3 + 1
    assert (exit_.forwards, exit_.generated, exit_.prompt) == (6, 6, 0)
    assert 0 < exit_.flops < target.flops and exit_.bytes > 0


def joint_law(model: Any, prompt: list[int], ids: list[int]) -> dict[tuple[int, int], float]:
    """Of two tokens out of `ids`, at temperature 2."""
    law = {}
    for a in ids:
        first = torch.softmax(model(torch.tensor([prompt])).logits[0, -1, ids] / 2, -1)
        second = torch.softmax(model(torch.tensor([[*prompt, a]])).logits[0, -1, ids] / 2, -1)
        law |= {(a, b): float(first[ids.index(a)] * second[j]) for j, b in enumerate(ids)}
    return law


def p_value(model: Any, ours: Any, mode: str) -> float:
    """Chi-square of the second and third token together given the first: proposals that the exit drew."""
    from scipy.stats import chisquare

    ids = [30, 31, 32]  # the exit and the model disagree on them: TV 0.3
    bias = dict.fromkeys(ids, 60.0)
    engine = TokenEngine(ours, decode=exits(ours, 1, mode=mode, k=2))
    warm = Sampling(temperature=2.0, logit_bias=bias, max_tokens=3, n=3000, ignore_eos=True, seed=3)
    first = run(engine, {0: Request([5, 6, 7], warm)})[0]
    texts = [r.tokens for r in (first, *first.others)]
    common = Counter(t[0] for t in texts).most_common(1)[0][0]
    law = joint_law(model, [5, 6, 7, common], ids)
    seen = Counter(t[1:3] for t in texts if t[0] == common)
    n = sum(seen.values())
    assert n > 500 and set(seen) <= set(law)
    pairs_ = [pair for pair in law if law[pair] * n > 5]
    rest = sum(law[pair] for pair in law if pair not in pairs_)
    observed, expected = [seen[p] for p in pairs_], [law[p] * n for p in pairs_]
    if rest * n > 1:
        observed, expected = [*observed, n - sum(observed)], [*expected, rest * n]
    scale = sum(observed) / sum(expected)
    return float(chisquare(observed, [e * scale for e in expected]).pvalue)


@pytest.mark.parametrize("mode", ["rejection", "block"])
def test_the_law_is_the_targets(pairs: Any, mode: str) -> None:
    assert p_value(*pairs("llama"), mode) > 1e-5


def test_a_planted_bias_is_seen(pairs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing from the target itself after a rejection, in place of what the draft has left over."""

    def planted(proposal: Any, p: Any, q: Any, uniform: Any, keep: float = 1.0) -> list[int]:
        for i, token in enumerate(proposal):
            if uniform(verify.ACCEPT, i) * float(p[i, token]) >= float(q[i, token]):
                return [*proposal[:i], verify.drawn(q[i], uniform(verify.AFTER, i))]
        return [*proposal, verify.drawn(q[len(proposal)], uniform(verify.AFTER, len(proposal)))]

    monkeypatch.setattr(verify, "rejection", planted)
    assert p_value(*pairs("llama"), "rejection") < 1e-5


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"k": -1}, "early_exit: k=-1"), ({"layers": -2}, "layers=-2"), ({"mode": "x"}, "early_exit: mode='x'"),
        ({"mode": "block", "schedule": "goodput"}, "clock"), ({"ensemble_weight": 0.5}, "mode=rejection only"),
    ],
)  # fmt: skip
def test_bad_options(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Options(**wrong)


def test_what_cannot_be_cut_is_refused_with_the_reason(pairs: Any) -> None:
    _, ours = pairs("llama")
    with pytest.raises(UserError, match="it has 3 layers, so an exit is after layer 1 to 2"):
        hf.cut(ours, 3)
    reason = early_exit.why_not(Options(layers=9), types.SimpleNamespace(model=ours))
    assert reason is not None and reason.startswith("early_exit: LlamaForCausalLM")
    odd = hf.shared_copy(ours)
    odd.model._modules["layers"] = torch.nn.Sequential(*odd.model.layers)
    with pytest.raises(UserError, match="do not stand in one list"):
        hf.cut(odd, 1)
    with pytest.raises(UserError, match="a reward model generates nothing"):
        hasten.load("zoo:arith-prm-s +early_exit")


@pytest.mark.parametrize("transform", ["native", "int8", "int8(fused=false)", "compile(backend=eager,graphs=false)"])
def test_the_exit_of_a_transformed_model(transform: str) -> None:
    """The exit is cut from what the transforms made, and takes steps in one call where the model does."""
    from hasten.native import build

    if build.why_not() is not None and transform != "compile(backend=eager,graphs=false)":
        pytest.skip(f"native code: {build.why_not()}")
    plain = hasten.load(f"zoo:arith-s +{transform}")
    quick = hasten.load(f"zoo:arith-s +{transform} +early_exit(layers=2,schedule=constant)")
    asked = ["a = 7 ; b = a * 3 ; c = b + a ; ? c :", "k = 2 ; d = 5 ; e = k * d ; ? e :"]
    s = Sampling(max_tokens=24)
    a, b = plain.generate(asked, s), quick.generate(asked, s)
    assert [r.text for r in a] == [r.text for r in b]
    assert b[0].usage.by_role["exit"].generated > 0
    technique = quick.engines["target"].decode
    assert isinstance(technique, EarlyExit)
    if transform in ("native", "int8"):
        assert technique.model.small_step.bits == (8 if transform == "int8" else 32)


def test_the_whole_model_stays_as_it_was(pairs: Any) -> None:
    _, ours = pairs("qwen2")
    before = (ours.config.num_hidden_layers, list(ours.config.layer_types), len(ours.model.layers), hf.facts(ours).layers)
    short = hf.cut(ours, 1)
    assert (ours.config.num_hidden_layers, list(ours.config.layer_types), len(ours.model.layers), hf.facts(ours).layers) == before
    assert hf.facts(short).layers == 1 and short.config.layer_types == ours.config.layer_types[:1]
    assert short.lm_head.weight is ours.lm_head.weight
