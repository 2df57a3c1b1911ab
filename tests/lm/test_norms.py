"""One-call norms: the same numbers bit for bit, and only where that is so."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import make
from torch import nn

from hasten.lm import norms
from hasten.lm.norms import OneCallNorm, fuse


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_logits_are_the_same_bits(family: str, dtype: torch.dtype) -> None:
    model = make(family, dtype)
    fused = fuse(copy.deepcopy(model))
    assert any(isinstance(m, OneCallNorm) for m in fused.modules())
    assert not any(isinstance(m, OneCallNorm) for m in model.modules())
    ids = torch.arange(3, 40)[None]
    assert torch.equal(model(ids).logits, fused(ids).logits)


def test_a_norm_that_computes_something_else_is_left_alone() -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.variance_epsilon = nn.Parameter(torch.ones(16)), 1e-6

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return norms.F.rms_norm(x, (16,), self.weight + 1, self.variance_epsilon)

    model = nn.ModuleList([Other()])
    assert type(fuse(model)[0]) is Other
    assert not any(isinstance(m, OneCallNorm) for m in fuse(make("gemma", torch.float32)).modules())
