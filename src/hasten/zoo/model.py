"""A lean Llama for training and sampling; its parameters carry transformers' names, so a state dict goes either way unchanged.

Only what a tiny model needs: rotary attention without grouped queries, SwiGLU, tied embeddings. On one core half the time of a step of a
model this small goes to calls, not to arithmetic, which is why this file exists beside transformers' own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

THETA = 10000.0


@dataclass(frozen=True, slots=True)
class Size:
    """width: hidden size; inner: SwiGLU's; heads: attention heads of width / heads each; vocabulary, positions: most tokens of either."""

    width: int
    inner: int
    layers: int
    heads: int
    vocabulary: int = 46
    positions: int = 256


class Attention(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.heads = size.heads
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, nn.Linear(size.width, size.width, bias=False))

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None, cache: tuple[Tensor, Tensor, int] | None) -> Tensor:
        b, t, w = x.shape
        q, k, v = (p(x).view(b, t, self.heads, -1).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = _rotate(q, rope), _rotate(k, rope)
        if cache is not None:
            keys, values, start = cache
            keys[:, :, start : start + t], values[:, :, start : start + t] = k, v
            k, v = keys[:, :, : start + t], values[:, :, : start + t]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and t > 1)
        return self.o_proj(y.transpose(1, 2).reshape(b, t, w))


class MLP(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(size.width, size.inner, bias=False)
        self.up_proj = nn.Linear(size.width, size.inner, bias=False)
        self.down_proj = nn.Linear(size.inner, size.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(size), MLP(size)
        self.input_layernorm, self.post_attention_layernorm = nn.RMSNorm(size.width, eps=1e-6), nn.RMSNorm(size.width, eps=1e-6)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None, cache: tuple[Tensor, Tensor, int] | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """ids [B, T] -> hidden states [B, T, width], normed; `logits` makes them [B, T, vocabulary]. A reward model has a linear `score` as well."""

    def __init__(self, size: Size, seed: int = 0) -> None:
        super().__init__()
        self.size = size
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(size.vocabulary, size.width)
        self.model.layers = nn.ModuleList(Layer(size) for _ in range(size.layers))
        self.model.norm = nn.RMSNorm(size.width, eps=1e-6)
        d = size.width // size.heads
        angles = torch.arange(size.positions)[:, None] * THETA ** (-torch.arange(0, d, 2) / d)
        self.register_buffer("cos", torch.cat([angles.cos()] * 2, -1), persistent=False)
        self.register_buffer("sin", torch.cat([angles.sin()] * 2, -1), persistent=False)
        g = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            if p.ndim == 2:
                std = 0.2 if "embed" in name else p.shape[1] ** -0.5 * (0.1 if "o_proj" in name or "down_proj" in name else 1.0)
                nn.init.normal_(p, std=std, generator=g)

    def forward(
        self, ids: Tensor, positions: Tensor, mask: Tensor | None, caches: list[tuple[Tensor, Tensor, int]] | None = None
    ) -> Tensor:
        """positions [T] or [B, T]; mask [B, 1, T, T] bool or None (causal); caches: one (keys, values, start) a layer, written in place."""
        x = self.model.embed_tokens(ids)
        rope = (self.cos[positions], self.sin[positions])
        if positions.ndim == 2:
            rope = (rope[0][:, None], rope[1][:, None])
        for i, layer in enumerate(self.model.layers):
            x = layer(x, rope, mask, caches[i] if caches else None)
        return self.model.norm(x)

    def logits(self, x: Tensor) -> Tensor:
        return F.linear(x, self.model.embed_tokens.weight)


def _rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary positions in the half-split layout of transformers."""
    cos, sin = rope
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin
