"""`native`, `int8` and `int4`: the fused step gives the tokens of the modules it replaces, in every setting of the engine."""

from __future__ import annotations

import copy
import os
import random
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import CONFIGS, make, reference
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForTokenClassification

import hasten
from hasten import hf, native
from hasten.engine import run
from hasten.lm.constrain.allowed import Allowed
from hasten.lm.decode.ngram import Ngram
from hasten.lm.decode.ngram import Options as NgramOptions
from hasten.lm.engine import TokenEngine
from hasten.lm.fused import Unfit, attach
from hasten.lm.transform import int4, int8
from hasten.lm.transform import native as transform
from hasten.native import build
from hasten.values import Request, Sampling, UserError

pytestmark = pytest.mark.skipif(build.why_not() is not None, reason=f"native code: {build.why_not()}")
FUSED = ("llama", "qwen2", "qwen3", "mistral", "phi3", "gemma")
MAX = 20


def prompts(seed: int, count: int = 7) -> list[list[int]]:
    rand = random.Random(seed)
    return [[rand.randrange(3, 97) for _ in range(rand.choice([1, 2, 5, 17, 40, 80]))] for _ in range(count)]


def answers(model: Any, asked: list[list[int]], **options: Any) -> list[list[int]]:
    engine = TokenEngine(model, **options)
    return [list(r.tokens) for r in run(engine, {i: Request(p, Sampling(max_tokens=MAX)) for i, p in enumerate(asked)}).values()]


@pytest.fixture(scope="module")
def models() -> Any:
    """family -> (reference, fused fp32), with widths that the fused step takes."""
    made: dict[str, Any] = {}

    def get(family: str) -> Any:
        if family not in made:
            model = make(family, torch.float32)
            made[family] = (model, attach(hf.prepare(copy.deepcopy(model))))
        return made[family]

    return get


SETTINGS: dict[str, Any] = {
    "batch": {},
    "all steps fused": {"step_tokens": 64},
    "chunks": {"step_tokens": 7},
    "few rows": {"max_rows": 2},
    "ngram": {"decode": lambda: Ngram(NgramOptions(k=3, shortest=1))},
    "preempted": {"memory": 90_000},
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("family", FUSED)
def test_greedy_text_differs_only_at_near_ties(models: Any, family: str, setting: str) -> None:
    model, ours = models(family)
    options = {k: v() if callable(v) else v for k, v in SETTINGS[setting].items()}
    asked, near = prompts(1), 0
    for prompt, got, want in zip(asked, answers(ours, asked, **options), reference(model, asked, MAX), strict=True):
        if got != want:
            at = next(i for i, (a, b) in enumerate(zip(got, want, strict=False)) if a != b)
            top = model(torch.tensor([prompt + want[:at]])).logits[0, -1].topk(2).values
            assert top[0] - top[1] < 1e-4
            near += 1
    assert near <= 1


@pytest.mark.parametrize("family", FUSED)
def test_allowed_tokens_and_threads(models: Any, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = models(family)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    ours = attach(hf.prepare(copy.deepcopy(model)))
    asked = prompts(2, 3)
    got = answers(ours, asked, constraint=Allowed(range(10, 40)))
    assert got == answers(hf.prepare(copy.deepcopy(model)), asked, constraint=Allowed(range(10, 40)))
    assert all(10 <= t < 40 for row in got for t in row)


@pytest.mark.parametrize("family", [f for f in CONFIGS if f not in FUSED])
def test_other_architectures_are_refused_with_the_reason(family: str) -> None:
    target = SimpleNamespace(model=hf.prepare(make(family, torch.float32)))
    assert "is not built as Llama is" in (transform.why_not(transform.Options(), target) or "")


@pytest.mark.skipif(build.why_not() is not None or not build.library().hasten_bf16(), reason="no products of bf16 here")
@pytest.mark.parametrize("family", FUSED)
def test_bf16_rounds_weights_and_inputs_alone(models: Any, family: str) -> None:
    """Nearer to the fp32 model with rounded linear layers than that is to the fp32 model."""
    from hasten.lm.fused import _logits

    class Rounded(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.linear(x.bfloat16().float(), self.weight.bfloat16().float(), self.bias)

    ids, model = torch.arange(3, 40), hf.prepare(copy.deepcopy(models(family)[0]))
    ours, want = attach(model, bits=16), hf.prepare(copy.deepcopy(models(family)[0]))
    for module in want.modules():
        if isinstance(module, torch.nn.Linear):
            module.__class__ = Rounded
    mine = _logits(lambda *a: hf.forward(ours, *a), ids, ours)
    theirs, plain = (_logits(lambda *a, m=m: hf.torch_forward(m, *a), ids, m) for m in (want, model))
    assert 0 < (mine - theirs).abs().mean() < 0.3 * (theirs - plain).abs().mean()


def test_bf16_is_refused_where_the_processor_lacks_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "library", lambda: SimpleNamespace(hasten_bf16=lambda: 0))
    assert "no products of bf16" in (transform.why_not(transform.Options(dtype="bf16"), None) or "")
    with pytest.raises(UserError, match="fp32 or bf16"):
        transform.Options(dtype="fp8")
    assert [transform.exactness(transform.Options(dtype=d)) for d in ("fp32", "bf16")] == ["identical", "approximate"]


def test_doubles_are_refused() -> None:
    with pytest.raises(Unfit, match="fp32 on a CPU"):
        attach(hf.prepare(make("llama")))


def test_a_part_that_was_not_read_is_noticed() -> None:
    """The check at the end of building is what stands between a wrong reading and wrong text: it must see one."""
    model = hf.prepare(make("llama", torch.float32))
    layer = model.model.layers[1].mlp
    plain = layer.forward
    layer.forward = lambda x: plain(x) + 1.5 * x.roll(1, -1)
    with pytest.raises(Unfit, match="computes something"):
        attach(model)


def test_the_original_model_is_left_alone(models: Any) -> None:
    model = hf.prepare(make("llama", torch.float32))
    before = dict(model.named_modules()).keys()
    fused = attach(model)
    for technique, layer in ((int8, int8.Int8Linear), (int4, int4.Int4Linear)):
        quantised = technique.build(technique.Options(), SimpleNamespace(model=model))
        assert not hasattr(model, "small_step") and dict(model.named_modules()).keys() == before
        assert not any(isinstance(m, layer) for m in model.modules())
        assert any(isinstance(m, layer) for m in quantised.modules())
    assert fused.model.layers[0].mlp.up_proj.weight.data_ptr() == model.model.layers[0].mlp.up_proj.weight.data_ptr()


def simulated(model: Any, bits: int, head: int) -> Any:
    """The formula in plain torch, in place of every linear layer: weights of `bits`, those of the output layer of `head`; activations of 8."""
    output = model.get_output_embeddings().weight

    class Simulated(torch.nn.Module):
        def __init__(self, layer: torch.nn.Linear) -> None:
            super().__init__()
            self.weight, self.bias = layer.weight, layer.bias
            if (head if layer.weight is output else bits) == 8:
                self.q, self.s = native.quantised(layer.weight.detach())
            else:
                q, step, self.s = native.quantised4(layer.weight.detach())
                self.q = q * step.repeat_interleave(native.GROUP, 1)[:, : q.shape[1]]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, s = native.quantised(x.reshape(-1, x.shape[-1]))
            y = ((q.double() @ self.q.double().T) * s[:, None] * self.s).float().view(*x.shape[:-1], -1)
            return y if self.bias is None else y + self.bias

    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, torch.nn.Linear):
                setattr(module, name, Simulated(child))
    return model


WHOLE = {"int8": (int8, {}, (8, 8)), "int4": (int4, {}, (4, 8)), "int4 head": (int4, {"head": 4}, (4, 4))}


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("family", [f for f in CONFIGS if f != "gpt2"])
@pytest.mark.parametrize("name", WHOLE)
def test_whole_numbers_are_their_formula(name: str, family: str, fused: bool) -> None:
    technique, options, bits = WHOLE[name]
    model = make(family, torch.float32)
    ours = technique.build(technique.Options(fused=fused, **options), SimpleNamespace(model=hf.prepare(copy.deepcopy(model))))
    assert (getattr(ours, "small_step", None) is not None) == (fused and family in FUSED)
    ids = torch.arange(3, 40)
    from hasten.lm.fused import _logits

    def by_formula(bits: int, head: int) -> torch.Tensor:
        want = simulated(hf.prepare(copy.deepcopy(model)), bits, head)
        return _logits(lambda *a: hf.torch_forward(want, *a), ids, want)

    mine, theirs = _logits(lambda *a: hf.forward(ours, *a), ids, ours), by_formula(*bits)
    prepared = hf.prepare(model)
    plain = _logits(lambda *a: hf.torch_forward(prepared, *a), ids, prepared)
    noise = (theirs - plain).abs().mean()
    # a rounding of an activation that falls the other way makes a small difference; the number format itself a large one
    assert (mine - theirs).abs().mean() < 0.2 * noise
    if bits[0] == 4:  # and another number format is not taken for it
        assert (mine - by_formula(8, 8)).abs().mean() > 0.2 * noise


def test_a_reward_model_keeps_its_score_at_8_bits() -> None:
    sizes = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_labels": 1,
    }
    model = hf.prepare(LlamaForTokenClassification(LlamaConfig(**sizes)).eval())
    made = int4.swapped(model, lambda layer, head: int4.Int4Linear(layer, 8 if head else 4))
    bits = {name: module.run.bits for name, module in made.named_modules() if isinstance(module, int4.Int4Linear)}
    assert bits.pop("score") == 8 and set(bits.values()) == {4} and len(bits) == 7


def test_where_int4_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    refusal = lambda model: int4.why_not(int4.Options(), SimpleNamespace(model=model)) or ""  # noqa: E731
    assert "load it with dtype=fp32" in refusal(hf.prepare(make("llama")))
    assert "CPUs only" in refusal(make("llama", torch.float32).to("meta"))
    with pytest.raises(UserError, match="8 or 4 bits"):
        int4.Options(head=5)
    monkeypatch.setattr(int4.compiled, "isa", lambda: "portable")
    assert "no AVX2" in refusal(make("llama", torch.float32))
    monkeypatch.setattr(int4.compiled, "why_not", lambda: "no C++ compiler was found")
    assert "its own kernels: no C++ compiler" in refusal(make("llama", torch.float32))


@pytest.mark.parametrize("technique", [int8, int4])
def test_whole_numbers_are_fused_in_a_deep_model_too(technique: Any) -> None:
    """Rounding adds up over layers; that is no reason to take the model for one that was read wrongly."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 24, "num_attention_heads": 4}
    model = hf.prepare(LlamaForCausalLM(LlamaConfig(**sizes)).eval())
    assert hasattr(technique.build(technique.Options(), SimpleNamespace(model=model)), "small_step")


def test_int8_without_a_compiler_takes_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = torch.nn.Linear(96, 64), torch.randn(33, 96)
    mine = int8.Int8Linear(layer)(x)
    monkeypatch.setattr(int8.compiled, "why_not", lambda: "no compiler")
    torch.testing.assert_close(int8.Int8Linear(layer)(x), mine, rtol=1e-4, atol=1e-4)


def test_as_recipes() -> None:
    plain = hasten.load("zoo:arith-s").generate(["a = 7 ; b = a * 3 ; c = b + a ; ? b :"], Sampling(max_tokens=40))[0]
    fused = hasten.load("zoo:arith-s +native").generate(["a = 7 ; b = a * 3 ; c = b + a ; ? b :"], Sampling(max_tokens=40))[0]
    assert fused.tokens == plain.tokens
    for name in ("int8", "int4"):
        whole = hasten.load(f"zoo:arith-s +{name} +ngram").generate(["a = 7 ; b = a * 3 ; c = b + a ; ? b :"], Sampling(max_tokens=40))[0]
        assert whole.tokens


LONG = """
import sys, torch
from transformers import MistralConfig, MistralForCausalLM
from hasten import hf
from hasten.lm import fused
for heads, kv_heads, dim, window in ((6, 2, 16, 40), (4, 4, 24, None), (5, 1, 10, 7), (60, 1, 4, 90)):
    torch.manual_seed(heads)
    model = hf.prepare(MistralForCausalLM(MistralConfig(
        vocab_size=97, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=heads, num_key_value_heads=kv_heads,
        head_dim=dim, sliding_window=window, initializer_range=0.3, pad_token_id=0)).eval())
    step = fused.FusedStep(model, rows=1000)
    facts = hf.facts(model)
    logits = []
    for forward in (step, lambda *a: hf.torch_forward(model, *a)):
        shape = fused.Shape(facts.layers, facts.kv_heads, facts.head_dim, torch.float32, torch.device("cpu"))
        cache = fused.RaggedCache(shape, budget=400, max_len=200, max_rows=2)
        ids = torch.randint(0, 97, (340,), generator=torch.Generator().manual_seed(1))
        rows = [cache.allocate(part.tolist(), len(part)) for part in (ids[:170], ids[170:])]
        for a, b in ((0, 75), (75, 76), (76, 170)):  # both rows in every step: a first chunk, one token, and a chunk that looks back
            plan = fused.Plan(cache, [fused.Span(row.slot, a, b - a, i * (b - a)) for i, row in enumerate(rows)])
            tokens = torch.cat([ids[a:b], ids[170 + a : 170 + b]])
            with torch.inference_mode():
                logits.append(forward(tokens, torch.arange(a, b).repeat(2), None, plan))
            for row, part in zip(rows, (ids[:170], ids[170:])):
                row.tokens += part[a:b].tolist()
    mine, theirs = torch.cat(logits[:3]), torch.cat(logits[3:])
    assert (mine - theirs).abs().max() < 2e-4 * theirs.std(), (heads, (mine - theirs).abs().max(), theirs.std())
"""


@pytest.mark.parametrize("march", ["x86-64", "x86-64-v3", "native"])
def test_prompts_are_attended_to_as_torch_does(march: str) -> None:
    """Tiles of many rows, their edges, windows, groups of heads of every kind, a second chunk; compiled for older processors too."""
    environment = {**os.environ, "HASTEN_MARCH": march}
    done = subprocess.run([sys.executable, "-c", LONG], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
