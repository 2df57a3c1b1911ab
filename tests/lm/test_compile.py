"""`compile`: the tokens of the modules it compiles, in every setting of the engine; what it does where it cannot compile."""

from __future__ import annotations

import copy
import os
import random
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import CONFIGS, make, reference

import hasten
from hasten import hf
from hasten.engine import run
from hasten.lm import inductor, static
from hasten.lm.attention import Plan, Span
from hasten.lm.cache import RaggedCache, Shape
from hasten.lm.compiled import CompiledStep
from hasten.lm.decode.ngram import Ngram
from hasten.lm.decode.ngram import Options as NgramOptions
from hasten.lm.engine import TokenEngine
from hasten.lm.graphs import Graphs
from hasten.lm.transform import compile as transform
from hasten.lm.transform import int8, native
from hasten.native import build
from hasten.values import Request, Sampling, UserError

MAX = 12
SETTINGS: dict[str, Any] = {
    "batch": {},
    "chunks": {"step_tokens": 7},
    "few rows": {"max_rows": 2},
    "ngram": {"decode": lambda: Ngram(NgramOptions(k=3, shortest=1))},
    "preempted": {"memory": 180_000},
    "nothing shared": {"share": False, "retained": 0},
}


def chosen(setting: str) -> dict[str, Any]:
    return {k: v() if callable(v) else v for k, v in SETTINGS[setting].items()}


def prompts(seed: int, count: int = 6) -> list[list[int]]:
    rand = random.Random(seed)
    shared = [rand.randrange(3, 97) for _ in range(18)]
    return [[*shared[: 9 * (i % 3)], *(rand.randrange(3, 97) for _ in range(rand.choice([1, 2, 5, 17, 40])))] for i in range(count)]


def answers(engine: TokenEngine, asked: list[list[int]], **sampling: Any) -> list[list[int]]:
    s = Sampling(**{"max_tokens": MAX, **sampling})
    return [list(r.tokens) for r in run(engine, {i: Request(p, s) for i, p in enumerate(asked)}).values()]


def stepped(model: Any, **options: Any) -> Any:
    """A copy of a prepared model with a compiled step."""
    twin = hf.shared_copy(model)
    return hf.stepped(twin, CompiledStep(twin, **options))


class Captures:
    """Stands in for a GPU's capture: remembers nothing but what to run, and counts."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, run: Any) -> Any:
        self.count += 1
        return run


def on_static_shapes(model: Any, rows: int = 64) -> tuple[Any, Captures]:
    """The model with the steps that a GPU would replay, not compiled."""
    captures = Captures()
    return stepped(model, rows=rows, backend="none", graphs=partial(Graphs, capture=captures)), captures


@pytest.fixture(scope="module")
def traced(pairs: Any) -> Any:
    """family -> (reference, a model whose steps are traced and run as traced), in fp64."""
    made: dict[str, Any] = {}

    def get(family: str) -> Any:
        if family not in made:
            model, ours = pairs(family)
            made[family] = model, stepped(ours, backend="eager")
        return made[family]

    return get


# --- the same tokens --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", CONFIGS)
def test_traced_steps_give_the_reference(traced: Any, family: str) -> None:
    model, ours = traced(family)
    asked = prompts(1, 4)
    want = reference(model, asked, MAX)
    for setting in ("batch", "chunks", "ngram"):
        assert answers(TokenEngine(ours, **chosen(setting)), asked) == want
    assert not ours.small_step.failed
    assert set(ours.small_step.seconds) == {"1", "any"}, "two graphs, whatever the cache and the rows were"


@pytest.mark.parametrize("family", CONFIGS)
def test_static_steps_give_the_reference(pairs: Any, family: str) -> None:
    model, plain = pairs(family)
    asked = prompts(2, 4)
    want = reference(model, asked, MAX)
    for setting in ("batch", "chunks", "few rows", "preempted"):
        ours, captures = on_static_shapes(plain)
        assert answers(TokenEngine(ours, **chosen(setting)), asked) == want, setting
        assert (captures.count or setting == "preempted") and not ours.small_step.failed  # a short budget has no room for padding


@pytest.mark.slow
@pytest.mark.parametrize("family", CONFIGS)
def test_inductor_gives_the_reference(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    near = same_but_near_ties(family, prompts(3))
    assert near <= 1


def test_inductor_on_one_family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    if inductor.lacks("cpu"):
        pytest.skip(str(inductor.lacks("cpu")))
    assert same_but_near_ties("llama", prompts(3), layers=1) <= 1


def same_but_near_ties(family: str, asked: list[list[int]], layers: int | None = None) -> int:
    """How many answers of the really compiled model first differ where the two best logits are nearly equal; none may differ elsewhere."""
    model = make(family, torch.float32)
    if layers:
        model.config.num_hidden_layers, model.model.layers = layers, model.model.layers[:layers]
    ours = stepped(hf.prepare(copy.deepcopy(model)))
    near = 0
    for prompt, got, want in zip(asked, answers(TokenEngine(ours), asked), reference(model, asked, MAX), strict=True):
        if got != want:
            at = next(i for i, (a, b) in enumerate(zip(got, want, strict=False)) if a != b)
            top = model(torch.tensor([prompt + want[:at]])).logits[0, -1].topk(2).values
            assert top[0] - top[1] < 1e-4
            near += 1
    assert not ours.small_step.failed and set(ours.small_step.seconds) == {"1", "any"}
    assert bool(ours.small_step.linears) == (build.why_not() is None)
    return near


def test_a_cache_that_grows_is_captured_anew_and_not_compiled_again(pairs: Any, traced: Any) -> None:
    model, plain = pairs("llama")
    for ours, captures in ((traced("llama")[1], None), on_static_shapes(plain)):
        engine, seconds = TokenEngine(ours), dict(ours.small_step.seconds)
        sizes = []
        for prompt, tokens in (([5, 6], 4), ([7] * 60, 6), ([8] * 130, 8)):
            assert answers(engine, [prompt], max_tokens=tokens)[0] == reference(model, [prompt], tokens)[0]
            sizes.append(engine.cache.data.shape)
        assert len(set(sizes)) == 3, "the cache must have been remade"
        if captures is None:
            assert set(ours.small_step.seconds) - set(seconds) <= {"1"}
        else:
            assert 3 <= captures.count <= 5


def test_a_second_engine_with_another_cache(pairs: Any) -> None:
    model, plain = pairs("mistral")
    ours, _ = on_static_shapes(plain)
    first, second = TokenEngine(ours), TokenEngine(ours)
    asked = prompts(5, 4)
    for i, p in enumerate(asked):
        first.add(i, Request(p, Sampling(max_tokens=MAX)))
        second.add(i, Request(p[::-1], Sampling(max_tokens=MAX)))
    done: dict[Any, Any] = {}
    while not (first.idle and second.idle):  # by turns
        for name, engine in (("a", first), ("b", second)):
            done |= {(name, e.key): list(e.result.tokens) for e in engine.step() if e.result}
    assert [done["a", i] for i in range(4)] == reference(model, asked, MAX)
    assert [done["b", i] for i in range(4)] == reference(model, [p[::-1] for p in asked], MAX)


# --- padding ----------------------------------------------------------------------------------------------------------------------------


def test_buckets() -> None:
    spans = lambda *slots: [Span(s, 3, 1, i) for i, s in enumerate(slots)]  # noqa: E731
    assert [static.bucket(spans(*range(n)), 64) for n in (1, 2, 3, 8, 9, 17, 64, 65)] == [1, 2, 4, 8, 16, 24, 64, None]
    assert static.bucket(spans(4), 64) == 8, "a row is where its slot is"
    assert static.bucket(spans(0, 1, 2, 3, 4), 6) == 6
    assert static.bucket([Span(0, 3, 2, 0)], 64) is None
    assert [static.length(n, 1000) for n in (1, 128, 129, 600)] == [128, 128, 256, 1000]
    assert static.length(5, 77) == 77


@pytest.mark.parametrize("setting", ["batch", "chunks", "few rows", "preempted"])
def test_padding_leaves_every_row_as_it_was(pairs: Any, setting: str) -> None:
    """What is stored of rows in use and of retained ones equals what an engine without padding stores."""
    _, plain = pairs("qwen2")
    ours, captures = on_static_shapes(plain)
    stored = []
    for model in (plain, ours):
        engine = TokenEngine(model, **chosen(setting))
        for seed in (6, 7):
            asked = prompts(seed, 5)
            for i, p in enumerate(asked):
                engine.add(i, Request(p, Sampling(max_tokens=2 + i, ignore_eos=True)))
            while not engine.idle:
                engine.step()
                check_finite(engine.cache)
        stored.append({tuple(e.tokens): engine.cache.data[:, :, e.slot, : e.length] for e in engine.cache.entries if e is not None})
    theirs, mine = stored
    assert captures.count or setting == "preempted"
    common = theirs.keys() & mine.keys()
    assert len(common) >= 2
    for tokens in common:
        torch.testing.assert_close(mine[tokens], theirs[tokens], rtol=1e-9, atol=1e-9)


def check_finite(cache: RaggedCache) -> None:
    assert torch.isfinite(cache.data).all()


def test_padding_slots_belong_to_nobody() -> None:
    cache = RaggedCache(Shape(1, 1, 2, torch.float32, torch.device("cpu")), budget=100, max_len=10, max_rows=8)
    rows = [cache.allocate([i] * 5, 5) for i in range(3)]
    assert all(rows)
    for row in rows:
        row.tokens = list(row.planned)  # type: ignore[union-attr]
    cache.release(rows[1])  # type: ignore[arg-type]
    free = cache.padding(8)
    assert free is not None and cache.entries[free] is None and len(cache.entries) >= 8
    assert [e.slot for e in cache.entries if e is not None and e.active] == [0, 1]
    assert cache.padding(1000) is None, "more than the budget"
    full = RaggedCache(cache.shape, budget=20, max_len=10, max_rows=2, retained=0)
    one, two = (full.allocate([i] * 10, 10) for i in range(2))
    assert one and two and full.padding(2) is None
    full.release(two, retain=True)
    two.tokens = [1] * 10
    slot = full.padding(2)
    assert slot is not None and full.entries[slot] is None, "what is only retained gives way"


# --- where it cannot be done ------------------------------------------------------------------------------------------------------------


def refuse(graph: Any, inputs: Any) -> Any:
    raise RuntimeError("this compiler is out of order")


def wrong(graph: Any, inputs: Any) -> Any:
    return lambda *args: [x + torch.arange(x.shape[-1]) % 2 for x in graph.forward(*args)]


def warned(do: Any) -> tuple[Any, list[str]]:
    """What a function returns, and what it warned of."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        return do(), [str(w.message) for w in told]


@pytest.mark.parametrize(("backend", "words"), [(refuse, "out of order"), (wrong, "computes something else")])
def test_a_compiler_that_fails_costs_one_warning(pairs: Any, backend: Any, words: str) -> None:
    model, plain = pairs("llama")
    ours = stepped(plain, backend=backend)
    asked = prompts(8, 3)
    got, told = warned(lambda: answers(TokenEngine(ours), asked) + answers(TokenEngine(ours), asked[:1]))
    assert got == reference(model, asked + asked[:1], MAX)
    assert len(told) == 1 and words in told[0]


def test_no_compiler_costs_one_warning(pairs: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model, plain = pairs("phi3")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    options, asked = transform.Options(), prompts(9, 3)
    target = SimpleNamespace(model=hf.shared_copy(plain))
    assert transform.why_not(options, target) is None
    ours, told = warned(lambda: {id(m): m for m in (transform.build(options, target) for _ in range(2))})
    assert [answers(TokenEngine(m), asked) for m in ours.values()] == [reference(model, asked, MAX)]
    assert len(told) == 1 and "no C++ compiler was found" in told[0]


def test_a_step_that_fails_later_is_done_again(pairs: Any) -> None:
    model, plain = pairs("llama")
    captures = Captures()

    def capture(run: Any) -> Any:
        if captures.count:
            raise RuntimeError("out of memory while capturing")
        return captures(run)

    ours = stepped(plain, backend="none", graphs=partial(Graphs, capture=capture))
    asked = prompts(10)
    got, told = warned(lambda: answers(TokenEngine(ours), asked))
    assert got == reference(model, asked, MAX)
    assert len(told) == 1 and "out of memory" in told[0]


def test_the_cache_is_ours_unless_the_user_has_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
    monkeypatch.setenv("HASTEN_CACHE", str(tmp_path))
    assert inductor.folder() == tmp_path / "inductor" == Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "mine"))
    assert inductor.folder() == tmp_path / "mine"


@pytest.mark.parametrize("mine", [True, False])
def test_a_cache_cut_off_in_mid_write_is_mended_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, mine: bool) -> None:
    monkeypatch.setenv("HASTEN_CACHE", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "" if mine else str(tmp_path / "other"))
    bad, good = inductor.folder() / "ab" / "bad.so", inductor.folder() / "ab" / "good.so"
    bad.parent.mkdir(parents=True)
    bad.touch(), good.touch()
    calls: list[int] = []

    def make() -> str:
        calls.append(1)
        if bad.exists():
            try:
                raise OSError(f"{bad}: file too short")
            except OSError as e:
                raise RuntimeError("backend failed") from e
        return "made"

    assert inductor.repaired(make) == "made" and len(calls) == 2
    assert good.exists() != mine

    def always() -> str:
        calls.append(1)
        raise OSError(f"{bad}: file too short")

    with pytest.raises(OSError):
        inductor.repaired(always)
    assert len(calls) == 4
    with pytest.raises(RuntimeError, match="another"):
        inductor.repaired(lambda: (_ for _ in ()).throw(RuntimeError("another")))


def test_objects_that_were_cut_off_are_swept(tmp_path: Path) -> None:
    if build.why_not():
        pytest.skip("no shared object at hand")
    whole = next(build.folder().glob("*.so")).read_bytes()
    parts = {"whole": whole, "empty": b"", "head": whole[:50], "most": whole[:-1], "other": b"x" * 100, "fresh": b""}
    for name, content in parts.items():
        (tmp_path / f"{name}.so").write_bytes(content)
        if name != "fresh":
            os.utime(tmp_path / f"{name}.so", (0, 0))
    inductor.sweep(tmp_path)
    assert {file.stem for file in tmp_path.iterdir()} == {"whole", "fresh"}


PROGRAM = """
import sys, torch, warnings
sys.path.insert(0, {here!r})
from conftest import make
from hasten import hf
from hasten.engine import run
from hasten.lm.compiled import CompiledStep
from hasten.lm.engine import TokenEngine
from hasten.values import Request, Sampling
warnings.simplefilter("error")
model = hf.prepare(make("llama", torch.float32))
twin = hf.shared_copy(model)
object.__setattr__(twin, "small_step", CompiledStep(twin))
answers = [run(TokenEngine(m), {{0: Request([5, 6, 7], Sampling(max_tokens=4))}})[0].tokens for m in (model, twin)]
assert answers[0] == answers[1] and twin.small_step.seconds and not twin.small_step.failed
"""


@pytest.mark.slow
def test_cut_off_objects_are_compiled_again(tmp_path: Path) -> None:
    program = PROGRAM.format(here=str(Path(__file__).parent))
    env = {k: v for k, v in os.environ.items() if k != "TORCHINDUCTOR_CACHE_DIR"}
    env |= {"HASTEN_CACHE": str(tmp_path), "PYTHONPATH": str(Path(hasten.__file__).parents[1])}
    go = partial(subprocess.run, [sys.executable, "-c", program], env=env, check=True)
    go()
    objects = list((tmp_path / "inductor").rglob("*.so"))
    assert objects
    assert all(map(inductor.whole, objects))
    for file in objects:
        file.write_bytes(file.read_bytes()[:-100])
        os.utime(file, (0, 0))
    go()
    assert all(map(inductor.whole, (tmp_path / "inductor").rglob("*.so")))


# --- beside other transforms ------------------------------------------------------------------------------------------------------------


def test_int8_layers_are_compiled_where_no_fused_step_is() -> None:
    model = hf.prepare(make("gpt_neox", torch.float32))
    eight = int8.build(int8.Options(), SimpleNamespace(model=model))
    ours = transform.build(transform.Options(backend="eager"), SimpleNamespace(model=eight))
    asked = prompts(11, 3)
    assert answers(TokenEngine(ours), asked) == answers(TokenEngine(eight), asked)
    assert not ours.small_step.failed and ours.small_step.seconds
    assert build.why_not() or len(ours.small_step.linears) == 13


def test_what_does_not_go_together_is_refused(pairs: Any) -> None:
    model = hf.prepare(make("llama", torch.float32))
    ours = transform.build(transform.Options(backend="eager"), SimpleNamespace(model=model))
    for other in (int8, native):
        with pytest.raises(UserError, match="before compile|leave out one"):
            other.build(other.Options(), SimpleNamespace(model=ours))
        if build.why_not() is None:
            with pytest.raises(UserError, match="one call into C"):
                transform.build(transform.Options(), SimpleNamespace(model=other.build(other.Options(), SimpleNamespace(model=model))))
    assert "no backend 'inductr' here; did you mean 'inductor'?" in (transform.why_not(transform.Options(backend="inductr"), None) or "")
    assert "rows=0" in (transform.why_not(transform.Options(rows=0), None) or "")


def test_the_original_model_is_left_alone() -> None:
    model = hf.prepare(make("llama", torch.float32))
    kinds = [type(m) for m in model.modules()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours = transform.build(transform.Options(), SimpleNamespace(model=model))
    assert ours is transform.build(transform.Options(), SimpleNamespace(model=model))
    assert not hasattr(model, "small_step") and [type(m) for m in model.modules()] == kinds
    weight = lambda m: m.model.layers[0].mlp.up_proj.weight.data_ptr()  # noqa: E731
    assert weight(ours) == weight(model)
    assert not hasattr(hf.shared_copy(ours), "small_step")


def test_as_a_recipe() -> None:
    prompt, s = "a = 7 ; b = a * 3 ; c = b + a ; ? b :", Sampling(max_tokens=30)
    plain = hasten.load("zoo:arith-s").generate([prompt], s)[0]
    loaded = hasten.load("zoo:arith-s +compile(backend=eager)")
    assert loaded.generate([prompt], s)[0].tokens == plain.tokens
    assert loaded.startup["compile"] > 0


def test_a_plan_of_something_else_is_not_taken(pairs: Any) -> None:
    _, plain = pairs("llama")
    step = CompiledStep(plain, backend="none")
    assert not step.takes(torch.zeros(1, dtype=torch.long), object())
    plan = Plan(RaggedCache(Shape(1, 1, 2, torch.float32, torch.device("cpu")), budget=10, max_len=5, max_rows=1), [])
    assert step.takes(torch.zeros(64, dtype=torch.long), plan) and not step.takes(torch.zeros(65, dtype=torch.long), plan)
