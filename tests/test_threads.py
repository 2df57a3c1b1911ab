"""What `load` makes of the processor: threads by model, pinning, the type of the weights by instruction set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import hasten
from hasten import cpu, hf
from hasten.cpu import Topology
from hasten.load import Models
from hasten.native import build
from hasten.values import Request, Sampling, UserError
from tiny_directory import save


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in bf16."""
    return save(tmp_path_factory.mktemp("bf16") / "model", dtype=torch.bfloat16)


@pytest.fixture
def four(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Four cores with caches of 8 KiB, and the numbers of threads that torch is given."""
    monkeypatch.setattr(cpu, "topology", lambda: Topology((tuple((i,) for i in range(4)),), cache=8 << 10))
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    given = [8]
    monkeypatch.setattr(torch, "get_num_threads", lambda: given[-1])
    monkeypatch.setattr(torch, "set_num_threads", given.append)
    return given


def sets(monkeypatch: pytest.MonkeyPatch, *, amx: bool = False, avx512_bf16: bool = False) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)


def dtypes(loaded: Any) -> list[torch.dtype]:
    return [next(engine.model.parameters()).dtype for engine in loaded.engines.values()]


# --- threads ---------------------------------------------------------------------------------------------------------------------


def test_each_step_has_the_threads_of_its_model_and_gives_them_back(stored: Path, four: list[int]) -> None:
    small = hasten.load(str(stored), dtype="fp32")  # 81 kB of weights: more than four caches
    assert small.threads == 4
    assert hasten.load(str(stored), threads=3).threads == 3
    assert hasten.load(str(stored), threads="2").threads == 2
    del four[1:]
    small.generate([[5, 6, 7]], Sampling(max_tokens=2, ignore_eos=True))
    assert four == [8, 4, 8, 4, 8]


def test_a_model_that_fits_one_cache_runs_on_one_thread(stored: Path, four: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "topology", lambda: Topology((tuple((i,) for i in range(4)),), cache=64 << 10))
    assert hasten.load(str(stored), dtype="fp32").threads == 1


@pytest.mark.parametrize("threads", [0, 5, "all"])
def test_threads_that_cannot_be(stored: Path, four: list[int], threads: Any) -> None:
    with pytest.raises(UserError, match="4 physical cores in 1 NUMA node|a whole number"):
        hasten.load(str(stored), threads=threads)


def test_same_tokens_whatever_the_threads(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "topology", lambda: Topology((((0,), (1,)),)))
    got = [hasten.load(str(stored), dtype="float64", threads=n).generate(["a b c", "1 2"], Sampling(max_tokens=9)) for n in (1, 2)]
    assert [r.tokens for r in got[0]] == [r.tokens for r in got[1]]


@pytest.mark.parametrize("pin", [False, True])
def test_pinning_is_asked_for(stored: Path, four: list[int], monkeypatch: pytest.MonkeyPatch, pin: bool) -> None:
    bound: list[Any] = []
    monkeypatch.setattr(cpu, "bind", bound.append)
    hasten.load(str(stored), pin=pin)
    assert bound == [[0, 1, 2, 3]] * pin


def test_a_measurement_says_its_threads(stored: Path, tmp_path: Path) -> None:
    task = tmp_path / "task.jsonl"
    task.write_text('{"prompt": "a b", "answer": "c"}\n' * 4)
    from hasten.measure.measure import measure

    [found] = measure([hasten.Recipe(str(stored))], task=str(task), n=2, blocks=1, out=str(tmp_path / "out"), threads=1)
    assert found["machine"]["threads"] == 1
    assert found["machine"]["cores"] >= 1


# --- types -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("amx", "avx512_bf16", "expected"),
    [(False, False, torch.float32), (True, False, torch.bfloat16), (False, True, torch.bfloat16), (True, True, torch.bfloat16)],
)
def test_bf16_only_where_the_processor_computes_in_it(
    stored: Path, monkeypatch: pytest.MonkeyPatch, amx: bool, avx512_bf16: bool, expected: torch.dtype
) -> None:
    sets(monkeypatch, amx=amx, avx512_bf16=avx512_bf16)
    lm = hasten.load(str(stored), device="cpu")
    assert dtypes(lm) == [expected]
    assert len(lm.generate(["a b"], Sampling(max_tokens=3, ignore_eos=True))[0].tokens) == 3


def test_an_fp32_checkpoint_stays_fp32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sets(monkeypatch, amx=True, avx512_bf16=True)
    path = save(tmp_path / "model")
    assert hf.dtype_name(str(path), "cpu") == "float32"
    assert hf.dtype_name(str(path), "cpu", "bf16") == "bfloat16"


@pytest.mark.skipif(build.why_not() is not None, reason="no native step here")
@pytest.mark.parametrize("transform", ["native", "int8", "int4"])
def test_our_own_kernels_get_fp32(stored: Path, monkeypatch: pytest.MonkeyPatch, transform: str) -> None:
    sets(monkeypatch, amx=True, avx512_bf16=True)
    models = Models()
    lm = hasten.load(f"{stored} +{transform}", device="cpu", models=models)
    assert dtypes(lm) == [torch.float32]
    lm.engine.add("a", Request("a b c", Sampling(max_tokens=2)))
    assert lm.engine.step()
    assert dtypes(hasten.load(str(stored), device="cpu", models=models)) == [torch.bfloat16]  # the plain recipe still gets its own
    with pytest.raises(UserError, match="fp32"):
        hasten.load(f"{stored} +{transform}", device="cpu", dtype="bf16")


def test_one_copy_of_weights_that_two_recipes_take_in_the_same_type(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sets(monkeypatch)
    models = Models()
    a, b = (models.get(str(stored), "cpu", dtype)[0] for dtype in ("auto", "float32"))
    assert a is b
