"""The kernels give the numbers of their formula, on every instruction set that the machine has and on those it could lack."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hasten import native
from hasten.native import build

needed = pytest.mark.skipif(build.why_not() is not None, reason=f"native code: {build.why_not()}")
SHAPES = [(96, 96), (49, 100), (577, 576), (64, 1536), (1, 1)]
ROWS = [1, 2, 3, 7, 8, 9, 16, 17, 32, 33, 70]


def whole(weight: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The formula: whole numbers [n, k] and the scale [n] of each output."""
    if bits == 8:
        return native.quantised(weight)
    q, step, scale = native.quantised4(weight)
    return q * step.repeat_interleave(native.GROUP, 1)[:, : q.shape[1]], scale


@needed
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("threads", [1, 3])
def test_whole_sums_are_exact_on_every_instruction_set(
    bits: int, shape: tuple[int, int], threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)  # of which packing int4 makes use
    torch.manual_seed(0)
    weight, bias = torch.randn(shape), torch.randn(shape[0])
    layer = native.Linear(weight, bias, bits=bits)
    wq, ws = whole(weight, bits)
    for rows in ROWS:
        x = torch.randn(rows, shape[1]) * 3
        xq, xs = native.quantised(x)
        want = (xq.double() @ wq.double().T) * xs[:, None] * ws + bias
        for isa in range(build.ISAS.index(build.isa()) + 1):
            torch.testing.assert_close(layer(x, isa).double(), want.double(), rtol=1e-5, atol=1e-4)


@needed
@pytest.mark.parametrize("bits", [8, 4])
def test_sums_at_the_limits_of_their_numbers(bits: int) -> None:
    """All weights and activations as large as they get, with signs that make the sums of a whole group, or of its parts, the largest."""
    k = 256
    patterns = torch.stack([torch.ones(k), *(((torch.arange(k) & bit) > 0) * 2.0 - 1 for bit in (1, 2, 4, 8, 16, 32))])
    patterns = torch.cat([patterns, -patterns, 0.1 * (patterns > 0)])
    layer = native.Linear(patterns, bits=bits)
    wq, ws = whole(patterns, bits)
    xq, xs = native.quantised(patterns)
    want = (xq.double() @ wq.double().T) * xs[:, None] * ws
    for isa in range(build.ISAS.index(build.isa()) + 1):
        for x, y in ((patterns, want), (patterns[:2], want[:2])):
            torch.testing.assert_close(layer(x, isa).double(), y, rtol=1e-6, atol=1e-6)


def test_int4_steps_are_the_best_of_those_tried() -> None:
    torch.manual_seed(0)
    weight = torch.randn(5, 70) * torch.tensor([1.0, 0.1, 3.0, 1.0, 0.0])[:, None]
    weight[3, 40] = 50.0  # a row with an outlier: its other groups get small steps, the least of which is 1
    q, step, scale = native.quantised4(weight)
    assert q.dtype == step.dtype == torch.int8 and step.shape == (5, 3)
    assert q.min() == -8 and q.max() == 7 and step.abs().max() == 15 and step.abs().min() >= 1
    for row in range(4):
        for group in range(3):
            w = weight[row, group * 32 : group * 32 + 32].double()
            unit, chosen = scale[row].double(), int(step[row, group])
            errors = {s: (w - (w / (s * unit)).round().clamp(-8, 7) * s * unit).square().sum() for s in range(-15, 16) if s}
            assert (w - q[row, group * 32 : group * 32 + 32] * chosen * unit).square().sum() <= errors[chosen] * 1.0001 + 1e-9
            furthest = max(w.tolist(), key=abs)
            reach = round(abs(furthest) / (8 * float(unit)))
            tried = [min(max(reach + more, 1), 15) * (-1 if furthest > 0 else 1) for more in (-3, -2, -1, 0, 1)]
            assert chosen in tried and errors[chosen] <= min(errors[s] for s in tried) * 1.0001 + 1e-9
    assert not q[4].any() and q[3, 40] == -8 and step[3, 1] == -15


@needed
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", ROWS)
def test_fp32_to_rounding(shape: tuple[int, int], rows: int) -> None:
    torch.manual_seed(0)
    weight, bias, x = torch.randn(shape), torch.randn(shape[0]), torch.randn(rows, shape[1])
    want = x.double() @ weight.double().T + bias
    torch.testing.assert_close(native.Linear(weight, bias)(x).double(), want, rtol=1e-4, atol=3e-4)


@needed
@pytest.mark.skipif(build.why_not() is not None or not build.library().hasten_bf16(), reason="no products of bf16 here")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("isa", build.ISAS[2:])
def test_bf16_to_rounding(shape: tuple[int, int], isa: str) -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(shape), torch.randn(shape[0])
    layer = native.Linear(weight, bias, bits=16)
    for rows in ROWS:
        x = torch.randn(rows, shape[1])
        want = x.bfloat16().double() @ weight.bfloat16().double().T + bias
        torch.testing.assert_close(layer(x, build.ISAS.index(isa)).double(), want, rtol=1e-4, atol=3e-4)


@needed
def test_layers_outlive_those_that_were_made_with_them() -> None:
    """Weights of many layers share stretches of memory; large ones have their own."""
    torch.manual_seed(0)
    shapes = [(40, 70)] * 9 + [(700, 4000)] + [(40, 70)] * 9
    weights = [torch.randn(shape) for shape in shapes]
    layers = [native.Linear(w, bits=b) for w, b in zip(weights, [32, 8, 4] * 9, strict=False)]
    before = [layer(torch.ones(1, layer.k)) for layer in layers]
    kept = {i: layers[i] for i in (0, 4, 9, 11)}
    layers.clear()
    again = [native.Linear(-w) for w in weights]
    for i, layer in kept.items():
        assert torch.equal(layer(torch.ones(1, layer.k)), before[i])
    assert len(again) == len(weights)


@needed
@pytest.mark.parametrize("bits", [32, 8, 4])
def test_rows_of_zeros_and_no_rows(bits: int) -> None:
    layer = native.Linear(torch.zeros(5, 7), bits=bits)
    assert layer(torch.zeros(2, 7)).tolist() == [[0.0] * 5] * 2
    assert layer(torch.zeros(0, 7)).shape == (0, 5)
    assert layer(torch.zeros(2, 3, 7)).shape == (2, 3, 5)


@needed
@pytest.mark.parametrize("march", ["x86-64", "x86-64-v3"])
def test_older_processors_get_the_same_integers(march: str, tmp_path: Path) -> None:
    """The file compiles for processors without AVX-512 and without AVX2, and gives the numbers of this one's."""
    code = """
import torch
from hasten import native
torch.manual_seed(0)
x, w = torch.randn(9, 130), torch.randn(50, 130)
print(*(native.Linear(w, bits=b)(x).double().square().sum().item() for b in (32, 8, 4)))
"""
    lines = []
    for wanted in (march, "native"):
        env = {**os.environ, "HASTEN_MARCH": wanted, "HASTEN_CACHE": str(tmp_path)}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
        lines.append([float(x) for x in done.stdout.split()])
    assert lines[0] == pytest.approx(lines[1], rel=1e-5)


def test_no_compiler_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HASTEN_CXX", "no-such-compiler")
    monkeypatch.setenv("HASTEN_CACHE", str(tmp_path))
    build.library.cache_clear()
    try:
        assert "C++ compiler" in (build.why_not() or "")
    finally:
        build.library.cache_clear()


@needed
def test_a_broken_object_is_made_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HASTEN_CACHE", str(tmp_path))
    monkeypatch.setenv("HASTEN_MARCH", "x86-64")
    build.library.cache_clear()
    try:
        build.library()
        file = next((tmp_path / "native").glob("*.so"))
        broken = file.with_name("broken.so")
        broken.write_bytes(file.read_bytes()[:100])
        broken.rename(file)
        build.library.cache_clear()
        assert isinstance(build.library(), ctypes.CDLL)
    finally:
        build.library.cache_clear()


def test_the_process_keeps_its_subnormal_numbers() -> None:
    """Objects linked with -ffast-math flush them to zero, for everybody in the process."""
    build.library()
    smallest = float.fromhex("0x1p-1022")
    assert smallest / 2 > 0
