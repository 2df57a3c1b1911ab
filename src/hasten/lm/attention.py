"""Attention over a ragged cache for packed tokens: the one place where rows of different lengths meet.

A forward pass sees all new tokens of all rows as one sequence of N positions, so every matrix product works on useful positions only (as
vLLM and others do). Only attention needs rows: they are taken in clusters of similar length, each one `scaled_dot_product_attention`
over a view of the cache. Query heads that share a key head are stacked along the query axis, so grouped-query models copy no keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from hasten.lm.cache import RaggedCache
from hasten.lm.tree import Tree

SHORT = 16  # rows with at most so many new tokens (decoding, speculation) share one cluster


@dataclass(frozen=True)
class Span:
    """Work of one row: `n` new tokens at packed offset `offset`, written at positions start.. of `slot`; the last of them may be a tree's nodes."""

    slot: int
    start: int
    n: int
    offset: int
    tree: Tree | None = None


class Cluster:
    """Rows whose attention runs as one call: queries [rows, width], keys up to `length`, masks by window (made once a step)."""

    def __init__(self, spans: Sequence[Span], total: int, device: torch.device, dtype: torch.dtype) -> None:
        self.spans = sorted(spans, key=lambda s: s.slot)
        self.width = max(s.n for s in spans)
        self.length = max(s.start + s.n for s in spans)
        self.device, self.dtype = device, dtype
        slots = [s.slot for s in self.spans]
        first, last = slots[0], slots[-1] + 1
        # Holes in the range cost a little attention; gathering keys would copy them all. Rows that share a slot (`stairs`) must gather.
        self.ranged = last - first <= 2 * len(slots) and len({*slots}) == len(slots)
        self.first, self.last = first, last
        by_slot = {s.slot: s for s in self.spans}
        self.rows = [by_slot.get(i) for i in range(first, last)] if self.ranged else list(self.spans)
        self.slots = None if self.ranged else torch.tensor(slots, device=device)
        self.whole = len(self.spans) == len(self.rows) and [s.offset for s in self.spans] == list(range(0, total, self.width))
        self.whole = self.whole and all(s.n == self.width for s in self.spans) and len(self.spans) * self.width == total
        self.indices = None if self.whole else self._indices()
        self.masks: dict[tuple[int | None, int], torch.Tensor | None] = {}

    def _indices(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """gather: packed index of each padded query; source/target: padded index of each packed token, and that token."""
        w = self.width
        gather: list[int] = []
        source: list[int] = []
        target: list[int] = []
        for i, s in enumerate(self.rows):
            gather += [0] * w if s is None else [s.offset + min(t, s.n - 1) for t in range(w)]
            if s is not None:
                source += range(i * w, i * w + s.n)
                target += range(s.offset, s.offset + s.n)
        return torch.tensor(gather, device=self.device), torch.tensor(source, device=self.device), torch.tensor(target, device=self.device)

    def mask(self, window: int | None, groups: int) -> torch.Tensor | None:
        """Additive mask [rows, 1, groups * width, length]; None where every query sees every key."""
        key = (window, groups)
        if key not in self.masks:
            self.masks[key] = self._mask(window, groups)
        return self.masks[key]

    def _mask(self, window: int | None, groups: int) -> torch.Tensor | None:
        ends = [(s.start + s.n if s else 1) for s in self.rows]
        if self.width == 1 and min(ends) == self.length and (window is None or self.length <= window):
            return None
        starts = torch.tensor([s.start if s else 0 for s in self.rows], device=self.device)
        last = torch.tensor(ends, device=self.device)[:, None] - 1
        query = torch.minimum(starts[:, None] + torch.arange(self.width, device=self.device), last)[:, :, None]
        key = torch.arange(self.length, device=self.device)
        seen = key <= query
        if window is not None:
            seen &= key > query - window
        for i, s in enumerate(self.rows):
            if s is not None and s.tree is not None:
                seen[i, s.n - len(s.tree) : s.n] = branched(s, s.tree, self.length, window).to(self.device)
        mask = torch.zeros(seen.shape, dtype=self.dtype, device=self.device).masked_fill_(~seen, float("-inf"))
        return mask.repeat(1, groups, 1)[:, None]

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None, window: int | None, cap: float | None
    ) -> torch.Tensor:
        """q [N, heads, dim], k and v [slots, capacity, kv_heads, dim] -> [rows * width, heads, dim]."""
        kv, dim = k.shape[2], k.shape[3]
        groups, rows, w = q.shape[1] // kv, len(self.rows), self.width
        q = q if self.indices is None else q.index_select(0, self.indices[0])
        q = q.reshape(rows, w, kv, groups, dim).permute(0, 2, 3, 1, 4).reshape(rows, kv, groups * w, dim)
        k, v = (self._rows(x)[:, : self.length].transpose(1, 2) for x in (k, v))
        mask = self.mask(window, groups)
        out = capped(q, k, v, mask, scale, cap) if cap else scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        return out.reshape(rows, kv, groups, w, dim).permute(0, 3, 1, 2, 4).reshape(rows * w, kv * groups, dim)

    def _rows(self, x: torch.Tensor) -> torch.Tensor:
        return x[self.first : self.last] if self.slots is None else x[:, : self.length].index_select(0, self.slots)


def capped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float | None, cap: float) -> torch.Tensor:
    """Attention with soft-capped scores, cap * tanh(scores / cap) (Gemma 2)."""
    scores = cap * torch.tanh(q @ k.transpose(-1, -2) * (scale or q.shape[-1] ** -0.5) / cap)
    return torch.softmax(scores if mask is None else scores + mask, -1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype) @ v


class Plan:
    """All rows of one forward pass. Handed through the model to `attention`, it stores new keys and values and attends."""

    def __init__(self, cache: RaggedCache, spans: Sequence[Span]) -> None:
        self.cache, self.spans = cache, spans

    @property
    def branches(self) -> bool:
        """Whether some row's new tokens are a tree, so that what a token sees is not all that lies before it."""
        return any(s.tree is not None for s in self.spans)

    @cached_property
    def where(self) -> torch.Tensor:
        """Where in the cache each new token's keys and values go."""
        capacity = self.cache.capacity
        where = [s.slot * capacity + s.start + t for s in self.spans for t in range(s.n)]
        return torch.tensor(where, device=self.cache.shape.device)

    @cached_property
    def clusters(self) -> list[Cluster]:
        total, shape = sum(s.n for s in self.spans), self.cache.shape
        return [Cluster(g, total, shape.device, shape.dtype) for g in grouped(self.spans)]

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None, window: int | None, cap: float | None
    ) -> torch.Tensor:
        """q [1, heads, N, dim], k and v [1, kv_heads, N, dim] -> [1, N, heads, dim]."""
        keys, values = self.cache.layer(layer)
        for new, store in ((k, keys), (v, values)):
            flat = store.view(-1, store.shape[2] * store.shape[3])
            flat.index_copy_(0, self.where, new[0].transpose(0, 1).reshape(new.shape[2], -1))
        q = q[0].transpose(0, 1)
        if len(self.clusters) == 1 and self.clusters[0].whole:
            return self.clusters[0].attend(q, keys, values, scale, window, cap)[None]
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        for c in self.clusters:
            part = c.attend(q, keys, values, scale, window, cap)
            if c.indices is None:
                out.copy_(part)
            else:
                _, source, target = c.indices
                out.index_copy_(0, target, part.index_select(0, source))
        return out[None]


def branched(span: Span, tree: Tree, length: int, window: int | None) -> torch.Tensor:
    """bool [nodes, length]: the keys that each node of a row's tree sees, everything before the tree and its ancestors in it.

    A window counts positions, and a node's is its depth after the tree's start, wherever its key is stored.
    """
    first = span.start + span.n - len(tree)
    seen = np.zeros((len(tree), length), dtype=bool)
    seen[:, :first] = True
    seen[:, first : first + len(tree)] = tree.sees
    if window is not None:
        depths = np.array(tree.depths)
        position = np.arange(length)
        position[first : first + len(tree)] = first + depths
        seen &= position[None] > first + depths[:, None] - window
    return torch.from_numpy(seen)


def grouped(spans: Sequence[Span]) -> list[list[Span]]:
    """Clusters of rows: all short ones together; long ones with others whose new tokens and lengths are within a quarter."""
    short = [s for s in spans if s.n <= SHORT]
    groups = [short] if short else []
    for s in sorted((s for s in spans if s.n > SHORT), key=lambda s: (s.n, s.start)):
        head = groups[-1][0] if groups and groups[-1] is not short else None
        if head and s.n <= 1.25 * head.n and s.start + s.n <= 1.25 * (head.start + head.n) + SHORT:
            groups[-1].append(s)
        else:
            groups.append([s])
    return groups


def attention(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None,
    scaling: float | None = None, sliding_window: int | None = None, softcap: float | None = None, hasten: Plan | None = None, **_: object,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """The function that transformers calls in place of its own attention (its attention interface)."""
    if hasten is None:
        raise RuntimeError("this model's attention belongs to a hasten engine; load a second copy for other uses")
    return hasten.attend(module.layer_idx, query, key, value, scaling, sliding_window, softcap), None
