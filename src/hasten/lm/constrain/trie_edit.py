"""Inserts and deletes: a new version of a set that shares all it can with the old one, while requests go on with the version they began with.

Only the nodes on the way to an edited item are written again, behind those that are there, children before parents (path copying: Driscoll et al.
1989); the new root is the new version. Where the arrays have no room left they are copied into larger ones first. To publish a version is to
assign it; nothing that an older one can reach ever changes, so no request waits and none sees half an edit.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby

import numpy as np
import torch

from hasten.lm.constrain.trie import DEAD, Arrays, Trie, token_type
from hasten.lm.constrain.trie_build import Items, ended, matrix
from hasten.values import UserError

SLACK = 1.25  # arrays that must grow get so many times the room that they need
Change = tuple[tuple[int, ...], int | None]  # an item's tokens, and the row it gets (None: it goes)


def edited(trie: Trie, insert: Items = (), delete: Items = ()) -> Trie:
    """The version of a set with some items more and some fewer; in place of a tuple in both, the inserted one is there.

    Inserted items are numbered on from `trie.size`. A deleted tuple goes with all items that it stands for. Cost: the nodes on the way to each
    item are written again, Python for each, so for a large part of the set build it anew. UserError names the first wrong row; nothing has changed
    then.
    """
    new, gone = _tuples(trie, insert), _tuples(trie, delete)
    with _LOCK:
        draft = _Draft(trie, new, gone)
        root = draft.merged(trie.root, 0, sorted(draft.changes.items())) if draft.changes else trie.root
        if root is None or root < 0:
            root = draft.node(0, *(([], []) if root is None else ([draft.tokens_of(~root)[0]], [root])))
        return draft.written(root)


_LOCK = threading.Lock()  # versions are made one at a time; they are read without it


def _tuples(trie: Trie, items: Items) -> list[tuple[int, ...]]:
    if not len(items):
        return []
    rows, lengths = matrix(items, trie.vocabulary)
    if trie.end is not None:
        rows, lengths = ended(rows, lengths, trie.end, trie.vocabulary)
    sizes = [rows.shape[1]] * len(rows) if lengths is None else lengths.tolist()
    return [tuple(row[:n]) for row, n in zip(rows.tolist(), sizes, strict=True)]


class _Draft:
    """The nodes and rows that a version adds."""

    def __init__(self, trie: Trie, new: Sequence[tuple[int, ...]], gone: Sequence[tuple[int, ...]]) -> None:
        self.trie = trie
        self.arrays = trie.arrays
        self.branch = list(trie.branch)
        self.counts: list[int] = []
        self.tokens: list[int] = []
        self.next: list[int] = []
        self.rows: list[tuple[int, ...]] = []
        self.added = dict(trie.added)
        self.changes: dict[tuple[int, ...], int | None] = {}
        for i, item in enumerate(gone):
            row = self._row(item)
            if row is None:
                raise UserError(f"trie: item {i} to delete, {item}, is not in the set")
            self.changes[item] = None
        self.size = trie.size + len(new)
        for place, item in enumerate(new, trie.size):
            row = self.changes[item] if item in self.changes else self._row(item)
            if row is None:  # a tuple that comes back gets a row of its own: its old items stay deleted
                row = self.changes[item] = trie.rows + len(self.rows)
                self.rows.append(item)
            self.added[row] = (*self.added.get(row, ()), place)

    def _row(self, item: tuple[int, ...]) -> int | None:
        state, depth = self.trie.root, 0
        while state >= 0 and depth < len(item):
            child = self.trie.child(state, depth, item[depth])
            state, depth = DEAD if child is None else child, depth + 1
        return ~state if state < 0 and state != DEAD and self.trie.tuple_of(~state) == item else None

    def tokens_of(self, row: int) -> tuple[int, ...]:
        return self.trie.tuple_of(row) if row < self.trie.rows else self.rows[row - self.trie.rows]

    def merged(self, state: int | None, depth: int, changes: Sequence[Change]) -> int | None:
        """The state that takes the place of one at that depth under some changes in order; None where nothing is left."""
        if state is not None and state < 0:
            changes = _with(changes, (self.tokens_of(~state), ~state))
            state = None
        if state is None:
            changes = [c for c in changes if c[1] is not None]
            if len(changes) <= 1:
                return None if not changes or changes[0][1] is None else ~changes[0][1]
        if len(changes[0][0]) == depth:
            raise UserError(f"trie: item {changes[0][0]} is the beginning of another; give end=TOKEN when the set is built")
        return self._node(state, depth, changes)

    def _node(self, state: int | None, depth: int, changes: Sequence[Change]) -> int | None:
        edges = {}
        if state is not None:
            tokens, follow = self.trie.children(state, depth)
            edges = dict(zip(tokens.tolist(), follow.tolist(), strict=True))
        for token, group in _groups(changes, depth):
            child = self.merged(edges.pop(token, None), depth + 1, group)
            if child is not None:
                edges[token] = child
        if len(edges) == 1 and next(iter(edges.values())) < 0:
            return next(iter(edges.values()))
        return self.node(depth, *zip(*sorted(edges.items()), strict=True)) if edges else None

    def node(self, depth: int, tokens: Sequence[int], follow: Sequence[int]) -> int:
        """A new node of those edges."""
        self.tokens += tokens
        self.next += follow
        self.counts.append(len(tokens))
        self.branch += [1] * (depth + 1 - len(self.branch))
        self.branch[depth] = max(self.branch[depth], len(tokens))
        return self.trie.nodes + len(self.counts) - 1

    def written(self, root: int) -> Trie:
        """The new version, its nodes and rows written behind what is there."""
        t = self.trie
        nodes, edges, rows = t.nodes + len(self.counts), t.edges + len(self.tokens), t.rows + len(self.rows)
        width = max([self.arrays.width, *map(len, self.rows)])
        every = [x for row in self.rows for x in row]
        a = _with_room(t, nodes, edges, rows, width, every, any(len(r) != self.arrays.width for r in self.rows))
        device = a.device
        ends = t.edges + np.cumsum(self.counts, dtype=np.int64)
        a.first[t.nodes + 1 : nodes + 1] = torch.from_numpy(ends).int().to(device)
        a.tokens[t.edges : edges] = (torch.tensor(self.tokens, dtype=torch.long) - a.base).to(a.tokens.dtype).to(device)
        a.next[t.edges : edges] = torch.tensor(self.next, dtype=torch.int32, device=device)
        for row, item in enumerate(self.rows, t.rows):
            a.table[row, : len(item)] = (torch.tensor(item) - a.base).to(a.table.dtype).to(device)
            if a.lengths is not None:
                a.lengths[row] = len(item)
        a.used = (nodes, edges, rows)
        branch = (*self.branch, *[1] * (width - len(self.branch)))
        return replace(t, arrays=a, branch=branch, nodes=nodes, edges=edges, rows=rows, root=root, size=self.size, added=self.added)


def _with(changes: Sequence[Change], present: Change) -> list[Change]:
    """Changes and an item that is there already, unless they are about that item."""
    return [*changes] if any(c[0] == present[0] for c in changes) else sorted([*changes, present])


def _groups(changes: Sequence[Change], depth: int) -> Iterator[tuple[int, list[Change]]]:
    for token, group in groupby(changes, key=lambda c: c[0][depth]):
        yield token, list(group)


def _with_room(trie: Trie, nodes: int, edges: int, rows: int, width: int, tokens: Sequence[int], ragged: bool) -> Arrays:
    """The same arrays if this version is the last one in them and they have room, else larger ones with what this version uses."""
    a = trie.arrays
    base = min([a.base, *tokens])
    most = max([_largest(a) if base < a.base else a.base, *tokens]) - base
    kind = max(token_type(most), a.tokens.dtype, key=lambda d: d.itemsize)
    fits = len(a.first) > nodes and len(a.tokens) >= edges and len(a.table) >= rows
    if fits and a.used == (trie.nodes, trie.edges, trie.rows) and (base, width, kind) == (a.base, a.width, a.tokens.dtype) and not ragged:
        return a
    room = [int(n * SLACK) + 64 for n in (nodes, edges, rows)]
    out = Arrays(
        _larger(a.first, room[0] + 1, trie.nodes + 1), _larger(_shifted(a.tokens, a.base - base, kind), room[1], trie.edges),
        _larger(a.next, room[1], trie.edges), _larger(_shifted(a.table, a.base - base, kind), room[2], trie.rows, width), None, base,
    )  # fmt: skip
    if ragged or a.lengths is not None:
        own = torch.full((trie.rows,), a.width, dtype=torch.int16, device=a.device) if a.lengths is None else a.lengths
        out.lengths = _larger(own, room[2], trie.rows)
    if a.native is None:
        out.native = None
    return out


def _largest(a: Arrays) -> int:
    return a.base + (1 << 8 * a.tokens.dtype.itemsize) - 1 if a.tokens.dtype.itemsize < 4 else 2**31 - 1


def _shifted(x: torch.Tensor, by: int, kind: torch.dtype) -> torch.Tensor:
    return x if by == 0 and x.dtype == kind else (x.long() + by).to(kind)


def _larger(x: torch.Tensor, room: int, used: int, width: int = 0) -> torch.Tensor:
    out = torch.zeros((room, width) if width else (room,), dtype=x.dtype, device=x.device)
    if width:
        out[:used, : x.shape[1]] = x[:used]
    else:
        out[:used] = x[:used]
    return out
