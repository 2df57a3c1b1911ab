"""Which items a request may use (of the last week, of one tenant, in stock): any predicate over items, as one bit a row and one bit a node.

A node's bit says whether some row below it passes, so a search never enters a branch that ends nowhere, whatever the predicate. One index serves
any number of filters; each costs an eighth of a byte an item and a few passes over the edges.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from hasten.lm.constrain.trie import DEAD, Trie
from hasten.values import UserError


@dataclass(eq=False)
class Filter:
    """nodes, rows: int32 bit sets over the nodes and rows of a trie, in the version `trie`. where: the bit sets' addresses (CPU)."""

    nodes: torch.Tensor
    rows: torch.Tensor
    trie: Trie
    where: tuple[int, int]

    def fits(self, trie: Trie) -> bool:
        """Whether it was made for this set in this version."""
        return self.trie.arrays is trie.arrays and self.trie.root == trie.root and self.trie.added == trie.added

    def permits(self, states: torch.Tensor) -> torch.Tensor:
        """bool, of the shape of `states`: whether some item of the filter is there."""
        at = torch.where(states >= 0, states, ~states).long()
        rows, nodes = _bit(self.rows, at), _bit(self.nodes, at)
        return torch.where(states >= 0, nodes, rows) & (states != DEAD)


def filtered(trie: Trie, passing: np.ndarray | torch.Tensor | Sequence[bool]) -> Filter:
    """The filter of the items for which `passing` [items] is true; UserError if there are none."""
    chosen = np.asarray(passing)
    if chosen.dtype != bool or chosen.shape != (trie.size,):
        raise UserError(
            f"trie: a filter is one truth value for each of the {trie.size} items, not {chosen.dtype} of shape {list(chosen.shape)}"
        )
    if not chosen.any():
        raise UserError("trie: no item passes the filter")
    device = trie.arrays.device
    rows = torch.from_numpy(_rows(trie, chosen)).to(device)
    nodes = _nodes(trie, rows)
    bits = [_packed(x) for x in (nodes, rows)]
    return Filter(bits[0], bits[1], trie, (bits[0].data_ptr(), bits[1].data_ptr()))


def addresses(filters: Sequence[Filter | None] | None) -> torch.Tensor | None:
    """int64 [requests, 2], as native/trie.cpp takes them."""
    if filters is None or not any(filters):
        return None
    return torch.tensor([f.where if f is not None else (0, 0) for f in filters], dtype=torch.int64)


def permits(filters: Sequence[Filter | None], states: torch.Tensor) -> torch.Tensor:
    """bool [R, n] for states [R, n] under one filter or None a row."""
    out = torch.ones_like(states, dtype=torch.bool)
    for kind in {f for f in filters if f is not None}:
        rows = torch.tensor([i for i, f in enumerate(filters) if f is kind], device=states.device)
        out[rows] = kind.permits(states[rows])
    return out


def _rows(trie: Trie, chosen: np.ndarray) -> np.ndarray:
    """bool [rows]: whether any of a row's items passes."""
    out = np.zeros(trie.rows, bool)
    mine = out[trie.first_row : trie.first_row + trie.built_rows]
    order = None if trie.order is None else trie.order.cpu().numpy()
    built = len(order) if order is not None else len(mine)
    by_place = chosen[:built] if order is None else chosen[order]
    mine[:] = by_place if trie.starts is None else np.logical_or.reduceat(by_place, trie.starts[:-1].cpu().numpy())
    for row, items in trie.added.items():
        out[row] |= bool(chosen[list(items)].any())
    return out


def _nodes(trie: Trie, rows: torch.Tensor) -> torch.Tensor:
    """bool [nodes]: from the deepest level up, then what later versions added, whose nodes stand behind their children."""
    out = torch.zeros(trie.nodes, dtype=torch.bool, device=rows.device)
    for low, high in reversed(list(zip(trie.levels[:-1], trie.levels[1:], strict=True))):
        out[low:high] = _some(trie, rows, out, low, high)
    low = trie.levels[-1]
    for _ in range(trie.width if low < trie.nodes else 0):
        out[low:] = _some(trie, rows, out, low, trie.nodes)
    return out


def _some(trie: Trie, rows: torch.Tensor, nodes: torch.Tensor, low: int, high: int) -> torch.Tensor:
    a = trie.arrays
    bounds = a.first[low : high + 1].long()
    follow = a.next[int(bounds[0]) : int(bounds[-1])].long()
    passed = torch.where(follow >= 0, nodes[follow.clamp(min=0)], rows[(~follow).clamp(min=0)])
    total = torch.nn.functional.pad(passed.cumsum(0), (1, 0))[bounds - bounds[0]]
    return total[1:] > total[:-1]


def _packed(x: torch.Tensor) -> torch.Tensor:
    bits = np.packbits(x.cpu().numpy(), bitorder="little")
    return torch.from_numpy(np.pad(bits, (0, -len(bits) % 4)).view(np.int32).copy()).to(x.device)


def _bit(bits: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    return (bits[(at >> 5).clamp(max=len(bits) - 1)] >> (at & 31).int()) & 1 == 1
