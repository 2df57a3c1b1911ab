"""Muon for matrices, AdamW for the rest: the optimizer that learns these tasks in minutes.

Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) makes each matrix's momentum orthogonal by five Newton-Schulz steps. Matrices
of one shape are done in one batched product, which on a CPU takes the optimizer from a third of a step to a tenth.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def orthogonalise(g: Tensor) -> Tensor:
    """[N, r, c] with r <= c -> about U V^T of each: five quintic Newton-Schulz steps in fp32, singular values between 0.7 and 1.2."""
    x = g / (g.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x


class Muon:
    """`step(scale)` updates all parameters; learning rates are multiplied by `scale`. State is a flat list of tensors for checkpoints.

    matrices=False leaves everything to AdamW.
    """

    def __init__(
        self, model: nn.Module, lr: float = 0.004, adam_lr: float = 3e-3, momentum: float = 0.95, decay: float = 0.0,
        matrices: bool = True,
    ) -> None:  # fmt: skip
        self.lr, self.adam_lr, self.momentum, self.decay = lr, adam_lr, momentum, decay
        groups: dict[tuple[int, int], list[nn.Parameter]] = {}
        rest = []
        for name, p in model.named_parameters():
            if not p.requires_grad:
                continue
            if matrices and p.ndim == 2 and not any(part in name for part in ("embed", "score", "spot", "lm_head")):
                groups.setdefault((min(p.shape), max(p.shape)), []).append(p)
            else:
                rest.append(p)
        self.groups = list(groups.values())
        self.buffers = [torch.zeros(len(g), min(g[0].shape), max(g[0].shape)) for g in self.groups]
        self.adam = torch.optim.AdamW(rest, lr=adam_lr, betas=(0.9, 0.98), eps=1e-10, weight_decay=0.0, fused=True)

    @torch.no_grad()
    def step(self, scale: float) -> None:
        for params, buffer in zip(self.groups, self.buffers, strict=True):
            g = torch.stack([_wide(p.grad) for p in params])
            buffer.lerp_(g, 1 - self.momentum)
            update = orthogonalise(g.lerp(buffer, self.momentum))
            factor = self.lr * scale * (buffer.shape[2] / buffer.shape[1]) ** 0.5
            for p, u in zip(params, update, strict=True):
                if self.decay:
                    p.mul_(1 - self.lr * scale * self.decay)
                p.add_(u if p.shape[0] <= p.shape[1] else u.T, alpha=-factor)
        self.adam.param_groups[0]["lr"] = self.adam_lr * scale
        self.adam.step()

    def state(self) -> dict:
        return {"buffers": self.buffers, "adam": self.adam.state_dict()}

    def load(self, state: dict) -> None:
        for mine, saved in zip(self.buffers, state["buffers"], strict=True):
            mine.copy_(saved)
        self.adam.load_state_dict(state["adam"])


def _wide(g: Tensor) -> Tensor:
    return g if g.shape[0] <= g.shape[1] else g.T
