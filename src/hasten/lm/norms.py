"""RMSNorm in one call: transformers writes it as six, which for small steps on a CPU cost more than their arithmetic.

RMSNorms differ (Gemma's weight is stored minus one, some round before they multiply), so a module is taken only if the one call gives its
very numbers on a random input.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class OneCallNorm(nn.Module):
    """What a norm's class becomes; its weight and its epsilon stay where they were."""

    weight: torch.Tensor
    one_call_eps: float

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.one_call_eps)


def fuse(model: nn.Module) -> nn.Module:
    """Change in place the norms of a CPU model that are RMSNorm as torch has it, bit for bit."""
    for module in model.modules():
        eps = getattr(module, "variance_epsilon", None)
        if isinstance(eps, float) and isinstance(getattr(module, "weight", None), nn.Parameter) and same(module, eps):
            module.__class__ = OneCallNorm
            object.__setattr__(module, "one_call_eps", eps)
    return model


@torch.no_grad()
def same(module: nn.Module, eps: float) -> bool:
    weight: torch.Tensor = module.weight
    if weight.device.type != "cpu":
        return False
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 5, *weight.shape, generator=generator).to(weight.dtype)
    return torch.equal(module(x), F.rms_norm(x, weight.shape, weight, eps))
