"""A decode step of fixed shape: what a CUDA graph replays. Rows padded to one of few sizes, keys cut to one of few lengths.

Row i of the step is slot i of the cache, so keys and values are a view and never gathered. Slots that do not decode in this step, and those
beyond the rows in use, are padding: they compute something finite from what lies there and write to a slot that nobody owns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import scaled_dot_product_attention

from hasten.lm.attention import Span, capped
from hasten.lm.cache import RaggedCache

SHORTEST = 128  # positions that keys are cut to at least
ROWS = (1, 2, 4, 8)  # sizes that rows are padded to; beyond, multiples of 8


def bucket(spans: Sequence[Span], most: int) -> int | None:
    """Rows of the step that serves these spans; None where it would be larger than `most`, or they are more than one new token each."""
    rows = max(s.slot for s in spans) + 1
    if rows > most or any(s.n != 1 for s in spans):
        return None
    return min(next((size for size in ROWS if size >= rows), -(-rows // 8) * 8), most)


def length(longest: int, capacity: int) -> int:
    """Keys that a step looks at: the next power of two."""
    size = SHORTEST
    while size < longest:
        size *= 2
    return min(size, capacity)


class Inputs:
    """ids, positions, where [rows]: a row's new token, its position, and where in all slots' positions its keys and values go."""

    def __init__(self, rows: int, device: torch.device) -> None:
        self.ids = torch.zeros(rows, dtype=torch.long, device=device)
        self.places = torch.zeros(2, rows, dtype=torch.long, device=device)
        self.positions, self.where = self.places[0], self.places[1]

    def fill(self, ids: torch.Tensor, spans: Sequence[Span], capacity: int, free: int) -> slice | torch.Tensor:
        """Put a step in; which of its rows are those of the spans, in their order. Padding looks at its first key and writes to slot `free`."""
        rows = len(self.ids)
        positions, where = [0] * rows, [free * capacity] * rows
        for s in spans:
            positions[s.slot], where[s.slot] = s.start, s.slot * capacity + s.start
        self.places.copy_(torch.tensor([positions, where]))
        slots = [s.slot for s in spans]
        which = slice(len(slots)) if slots == list(range(len(slots))) else torch.tensor(slots, device=self.ids.device)
        self.ids[which] = ids
        return which


class StaticPlan:
    """Stands in for `attention.Plan` with shapes that do not change: `inputs.ids` rows, `length` keys."""

    def __init__(self, cache: RaggedCache, inputs: Inputs, length: int) -> None:
        self.cache, self.inputs, self.length = cache, inputs, length
        self.keys = torch.arange(length, device=inputs.ids.device)
        self._masks: dict[int | None, torch.Tensor] = {}

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None, window: int | None, cap: float | None
    ) -> torch.Tensor:
        """q [1, heads, rows, dim], k and v [1, kv_heads, rows, dim] -> [1, rows, heads, dim]."""
        _, heads, rows, dim = q.shape
        kv = k.shape[1]
        stores = self.cache.layer(layer)
        for new, store in zip((k, v), stores, strict=True):
            store.flatten(0, 1).index_copy_(0, self.inputs.where, new[0].transpose(0, 1))
        keys, values = (store[:rows, : self.length].transpose(1, 2) for store in stores)
        q = q[0].transpose(0, 1).reshape(rows, kv, heads // kv, dim)
        mask = self._mask(window, q.dtype)
        out = capped(q, keys, values, mask, scale, cap) if cap else scaled_dot_product_attention(q, keys, values, mask, scale=scale)
        return out.reshape(1, rows, heads, dim)

    def _mask(self, window: int | None, dtype: torch.dtype) -> torch.Tensor:
        """[rows, 1, 1, length], once a step for all layers of the same window."""
        if window not in self._masks:
            last = self.inputs.positions[:, None]
            seen = self.keys <= last
            if window is not None:
                seen &= self.keys > last - window
            mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf"))
            self._masks[window] = mask[:, None, None]
        return self._masks[window]
