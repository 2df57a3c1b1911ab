"""From N token tuples to the arrays of a trie, without a loop over items.

Items are packed into 64-bit keys and sorted; `change[i]`, the first column in which row i differs from the row before it, then says everything:
a prefix of length t begins at the rows with change < t, it has several items where the next row's change is at least t, and the edges that
leave such prefixes are the rows with change = t and the first row of each. So every level is a comparison of bytes and a running sum.

A prefix with one item left needs no node: the edge into it names the item's row, whose other tokens stand in the table of items. Of a uniform
catalogue nearly all prefixes are of that kind (one million of 8 tokens out of 2048: 6.2 million prefixes, 0.1 million nodes). Children of a node
are in the order of their tokens. The vectorised build follows STATIC (arXiv:2602.22647); the layout does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch

from hasten.values import UserError

Items = Any  # an integer array or tensor [N, L], or a sequence of token tuples
Rows = np.ndarray


@dataclass(frozen=True)
class Built:
    """first int32 [nodes + 1], tokens unsigned [edges], next int32 [edges] (a node, or ~row), table unsigned [rows, longest]: see `Trie`.

    lengths int16 [rows], or None where all are the same. order int32 [N]: items by row, None if that is 0 .. N - 1; starts int32 [rows + 1]: where
    each row's items begin in `order`, None if each row is one item. branch: most children of a node, by depth. levels: first node of each depth.
    """

    first: torch.Tensor
    tokens: torch.Tensor
    next: torch.Tensor
    table: torch.Tensor
    lengths: torch.Tensor | None
    order: torch.Tensor | None
    starts: torch.Tensor | None
    base: int
    branch: tuple[int, ...]
    levels: tuple[int, ...]


def built(items: Items, vocabulary: int, end: int | None = None, device: str | torch.device = "cpu") -> Built:
    """The trie of some items; sorting and levels are computed on `device`. UserError names the first row that is wrong.

    items: token tuples in any order, of any lengths from 1, repeated or not. end: a token put after every item; needed where one item begins
    another.
    """
    rows, lengths = matrix(items, vocabulary)
    if end is not None:
        rows, lengths = ended(rows, lengths, end, vocabulary)
    base = _least(rows, lengths)
    table = _narrow(rows, lengths, base)
    del rows
    order = ordered(table, lengths, torch.device(device))
    if order is not None:
        table, lengths = table[order], None if lengths is None else lengths[order]
    there = torch.from_numpy(table).to(device)
    change = _change(there, lengths)
    starts, keep = None, change < table.shape[1]
    if not bool(keep.all()):
        rows_of = keep.nonzero()[:, 0]
        starts = torch.cat([rows_of, torch.tensor([len(table)], device=device)]).int()
        there, change = there[rows_of], change[rows_of]
        lengths = None if lengths is None else lengths[rows_of.cpu().numpy()]
        order = np.arange(len(table)) if order is None else order
    _refuse_prefixes(change, lengths, order, starts)
    first, tokens, follow, branch, levels = _levels(there, change)
    return Built(
        first, tokens, follow, there, None if lengths is None else torch.from_numpy(lengths.astype(np.int16)).to(device),
        None if order is None else torch.from_numpy(order.astype(np.int32)).to(device), starts, base, branch, levels,
    )  # fmt: skip


# --- reading items ------------------------------------------------------------------------------------------------------------------


def matrix(items: Items, vocabulary: int) -> tuple[Rows, Rows | None]:
    """(integers [N, longest], lengths [N] or None if all are the same); UserError names the first wrong row."""
    if isinstance(items, torch.Tensor):
        items = items.detach().cpu().numpy()
    if isinstance(items, np.ndarray) and items.dtype != object:
        rows, lengths = _array(items), None
    else:
        rows, lengths = _ragged(list(items))
    if not rows.shape[0]:
        raise UserError("trie: the item set is empty")
    if not rows.shape[1]:
        raise UserError("trie: item 0 has no tokens")
    if rows.shape[1] > 250 or len(rows) >= 2**31:
        raise UserError(f"trie: {len(rows)} items of up to {rows.shape[1]} tokens; at most 2^31 - 1 of 250 fit the index")
    if int(rows.min()) < 0 or int(rows.max()) >= vocabulary:
        at, column = (int(i) for i in np.argwhere((rows < 0) | (rows >= vocabulary))[0])
        raise UserError(
            f"trie: item {at} has the token {rows[at, column]} at place {column}, outside the vocabulary of {vocabulary} tokens"
        )
    return rows, lengths


def _array(items: np.ndarray) -> Rows:
    if items.ndim != 2:
        raise UserError(f"trie: items are an array [N, length], not of shape {list(items.shape)}")
    if items.dtype.kind not in "iu":
        raise UserError(f"trie: items are whole numbers, and item 0 is of {items.dtype}")
    return items


def _ragged(items: list[Any]) -> tuple[Rows, Rows | None]:
    for i, item in enumerate(items):
        if isinstance(item, str | bytes) or not isinstance(item, Sequence | np.ndarray | torch.Tensor):
            raise UserError(f"trie: item {i} is {item!r:.40}, not a tuple of tokens")
        if not len(item):
            raise UserError(f"trie: item {i} has no tokens")
    items = [item.tolist() if isinstance(item, np.ndarray | torch.Tensor) else item for item in items]
    kinds = set(map(type, chain.from_iterable(items)))
    if kinds - {int} and not all(issubclass(k, int | np.integer) and k is not bool for k in kinds):
        at = next(i for i, item in enumerate(items) if any(isinstance(t, bool) or not isinstance(t, int | np.integer) for t in item))
        raise UserError(f"trie: item {at} is {tuple(items[at])!r:.60}, and tokens are whole numbers")
    lengths = np.fromiter(map(len, items), np.int64, len(items))
    rows = np.zeros((len(items), int(lengths.max(initial=0))), np.int64)
    try:
        rows[np.arange(rows.shape[1]) < lengths[:, None]] = np.fromiter(chain.from_iterable(items), np.int64, int(lengths.sum()))
    except OverflowError:
        at = next(i for i, item in enumerate(items) if max(map(abs, item)) >= 2**63)
        raise UserError(f"trie: item {at} has a token that is no id of any vocabulary") from None
    return rows, None if not len(items) or (lengths == lengths[0]).all() else lengths


def ended(rows: Rows, lengths: Rows | None, end: int, vocabulary: int) -> tuple[Rows, Rows | None]:
    """The same items with a token after each."""
    if not 0 <= end < vocabulary:
        raise UserError(f"trie: end={end} is outside the vocabulary of {vocabulary} tokens")
    longer = np.concatenate([rows, np.full((len(rows), 1), 0 if lengths is not None else end, rows.dtype)], 1)
    if lengths is None:
        return longer, None
    longer[np.arange(len(rows)), lengths] = end
    return longer, lengths + 1


def _inside(rows: Rows, lengths: Rows) -> np.ndarray:
    return np.arange(rows.shape[1]) < lengths[:, None]


def _least(rows: Rows, lengths: Rows | None) -> int:
    return int(rows.min() if lengths is None else rows[_inside(rows, lengths)].min())


def _narrow(rows: Rows, lengths: Rows | None, base: int) -> Rows:
    """Tokens less their least, in the smallest unsigned type that holds them; 0 behind the end of a shorter item."""
    most = int(rows.max()) - base
    kind = np.uint8 if most < 1 << 8 else np.uint16 if most < 1 << 16 else np.uint32
    out = np.empty(rows.shape, kind)
    for column in range(rows.shape[1]):  # a column at a time, for a wide difference of all would be larger than the input
        out[:, column] = (rows[:, column] - rows.dtype.type(base)).astype(kind)
    if lengths is not None:
        out[~_inside(rows, lengths)] = 0
    return out


# --- sorting ------------------------------------------------------------------------------------------------------------------------


def ordered(table: Rows, lengths: Rows | None, device: torch.device) -> np.ndarray | None:
    """The order that sorts the rows (equal ones stay in theirs), None if they are sorted already."""
    groups = _packing(table, lengths)
    if device.type != "cpu":
        return _ordered_there(table, lengths, groups, device)
    key = _key(table, lengths, groups[0])
    step = key[1:] > key[:-1]
    if step.all():
        return None
    del step
    order = np.argsort(key)  # vectorised, and not stable: ties are put right below, by the rest of the key and then by place
    key = key[order]
    same = key[1:] == key[:-1]
    del key
    if same.any():
        tied = np.flatnonzero(np.append(same, False) | np.insert(same, 0, False))
        group = np.cumsum(np.insert(~same, 0, True))[tied]
        some = order[tied]
        rest = [_key(table[some], None if lengths is None else lengths[some], g) for g in groups[:0:-1]]
        order[tied] = some[np.lexsort([some, *rest, group])]
    return None if (order[1:] > order[:-1]).all() else order


def _ordered_there(table: Rows, lengths: Rows | None, groups: list[range], device: torch.device) -> np.ndarray:
    """Stable sorts from the last part of the key to the first, on the device."""
    order = torch.arange(len(table), device=device)
    for group in reversed(groups):
        key = torch.from_numpy(_key(table, lengths, group).view(np.int64)).to(device)
        order = order[key[order].sort(stable=True).indices]
    return order.cpu().numpy()


def _packing(table: Rows, lengths: Rows | None) -> list[range]:
    """Columns that go into one key of 63 bits together."""
    bits = _bits(table, lengths)
    each = max(1, 63 // bits)
    return [range(i, min(i + each, table.shape[1])) for i in range(0, table.shape[1], each)]


def _bits(table: Rows, lengths: Rows | None) -> int:
    return max(1, (int(table.max()) + (lengths is not None)).bit_length())


def _key(table: Rows, lengths: Rows | None, columns: range) -> np.ndarray:
    """uint64 [N]: the columns side by side; of ragged rows, nothing sorts before any token."""
    bits, key = np.uint64(_bits(table, lengths)), np.zeros(len(table), np.uint64)
    for column in columns:
        key <<= bits
        key |= (
            table[:, column].astype(np.uint64)
            if lengths is None
            else np.where(column < lengths, table[:, column] + np.uint64(1), np.uint64(0))
        )
    return key


# --- levels -------------------------------------------------------------------------------------------------------------------------


def _change(table: torch.Tensor, lengths: Rows | None) -> torch.Tensor:
    """uint8 [rows]: the first column in which a row differs from the one before it (its width if in none; 0 for the first row)."""
    rows, width = table.shape
    change = torch.full((rows,), width, dtype=torch.uint8, device=table.device)
    size = None if lengths is None else torch.from_numpy(lengths).to(table.device)
    for column in range(width - 1, -1, -1):
        differ = table[1:, column] != table[:-1, column]
        if size is not None:
            differ |= (size[1:] > column) != (size[:-1] > column)
        change[1:].masked_fill_(differ, column)
    change[0] = 0
    return change


def _refuse_prefixes(change: torch.Tensor, lengths: Rows | None, order: np.ndarray | None, starts: torch.Tensor | None) -> None:
    if lengths is None:
        return
    at = np.flatnonzero(change[1:].cpu().numpy() >= lengths[:-1])
    if len(at):
        first = int(at[0])
        places = [first, first + 1] if starts is None else starts[first : first + 2].tolist()
        a, b = places if order is None else (int(order[p]) for p in places)
        raise UserError(f"trie: item {a} is the beginning of item {b}; give end=TOKEN, which the model says after an item")


def _levels(table: torch.Tensor, change: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, tuple[int, ...], tuple[int, ...]]:
    """(first, tokens, next, branch, levels) of sorted distinct rows."""
    device, width = table.device, table.shape[1]
    after = torch.cat([change[1:], torch.zeros(1, dtype=torch.uint8, device=device)])  # the next row's
    firsts, tokens, follows, branch, levels = [], [], [], [], [0]
    edges = 0
    for depth in range(width):
        opens = (change < depth) & (after >= depth) if depth else _root(change)
        rows = (opens | ((change == depth) if depth else (change == 0))).nonzero()[:, 0]
        if not len(rows):
            break
        begin = opens[rows].nonzero()[:, 0]
        inner = after[rows] > depth
        nodes = levels[-1] + len(begin)
        firsts.append((begin + edges).int())
        tokens.append(table[rows, depth])
        follows.append(torch.where(inner, nodes - 1 + inner.cumsum(0), -1 - rows).int())
        ends = torch.cat([begin[1:], torch.tensor([len(rows)], device=device)])
        branch.append(int((ends - begin).max()))
        levels.append(nodes)
        edges += len(rows)
    firsts.append(torch.tensor([edges], dtype=torch.int32, device=device))
    return torch.cat(firsts), torch.cat(tokens), torch.cat(follows), tuple(branch), tuple(levels)


def _root(change: torch.Tensor) -> torch.Tensor:
    opens = torch.zeros(len(change), dtype=torch.bool, device=change.device)
    opens[0] = True
    return opens
