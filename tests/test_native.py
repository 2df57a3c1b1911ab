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


@needed
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("threads", [1, 3])
def test_int8_sums_are_exact_on_every_instruction_set(shape: tuple[int, int], threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    torch.manual_seed(0)
    weight, bias = torch.randn(shape), torch.randn(shape[0])
    layer = native.Linear(weight, bias, bits=8)
    wq, ws = native.quantised(weight)
    for rows in ROWS:
        x = torch.randn(rows, shape[1]) * 3
        xq, xs = native.quantised(x)
        want = (xq.double() @ wq.double().T) * xs[:, None] * ws + bias
        for isa in range(build.ISAS.index(build.isa()) + 1):
            torch.testing.assert_close(layer(x, isa).double(), want.double(), rtol=1e-5, atol=1e-4)


@needed
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", ROWS)
def test_fp32_to_rounding(shape: tuple[int, int], rows: int) -> None:
    torch.manual_seed(0)
    weight, bias, x = torch.randn(shape), torch.randn(shape[0]), torch.randn(rows, shape[1])
    want = x.double() @ weight.double().T + bias
    torch.testing.assert_close(native.Linear(weight, bias)(x).double(), want, rtol=1e-4, atol=3e-4)


@needed
def test_rows_of_zeros_and_no_rows() -> None:
    layer = native.Linear(torch.zeros(5, 7), bits=8)
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
print(native.Linear(w, bits=8)(x).double().sum().item(), native.Linear(w)(x).double().sum().item())
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
