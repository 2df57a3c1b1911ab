"""A set of items, each a tuple of tokens, as a trie that a step of beam search asks for the tokens that may follow.

Its layout is compact: edges of a node stand side by side as (token, child); a child is a node, or, where one item is left, that item's row in the
sorted table of items, from which its other tokens are read. So a state is one number, and the state at the end is the item. The idea of a trie
as flat arrays that a step gathers from is STATIC's (arXiv:2602.22647); theirs stores every prefix, this one only those that several items share.

Everything is shared and nothing changes in place: another version of a set (`edited`) or another set (`join`) is another root over the same arrays,
and a request goes on with the root that it began with.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hasten import artifact
from hasten.lm.constrain.trie_build import Items, built
from hasten.values import UserError

DEAD = -(2**31)  # the state of a beam that leads nowhere
KIND = "trie"


@dataclass(eq=False)
class Arrays:
    """What tries share. first int32 [nodes + 1]: a node's edges are first[node] .. first[node + 1] - 1, in the order of their tokens.
    tokens unsigned [edges], less `base`. next int32 [edges]: a node, or ~row. table unsigned [rows, longest], less `base`. lengths int16 [rows],
    or None where every item has as many tokens as the table has columns. Room behind the parts in use is for later versions.
    """

    first: torch.Tensor
    tokens: torch.Tensor
    next: torch.Tensor
    table: torch.Tensor
    lengths: torch.Tensor | None
    base: int
    used: tuple[int, int, int] = (0, 0, 0)  # nodes, edges and rows of the latest version; what is behind them is free

    def __post_init__(self) -> None:
        if self.used == (0, 0, 0):
            self.used = (len(self.first) - 1, len(self.tokens), len(self.table))

    @property
    def device(self) -> torch.device:
        return self.first.device

    @property
    def width(self) -> int:
        return int(self.table.shape[1])

    @property
    def nbytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in (self.first, self.tokens, self.next, self.table, self.lengths) if x is not None)

    @functools.cached_property
    def native(self) -> int | None:
        """Handle of these arrays in C++; None on a GPU, or where there is no compiler."""
        from hasten.native import build

        try:
            lib = build.library("trie") if self.device.type == "cpu" else None
        except (OSError, RuntimeError):
            lib = None
        if lib is None:
            return None
        where = [x.data_ptr() if x is not None else None for x in (self.first, self.tokens, self.next, self.table, self.lengths)]
        handle = int(lib.hasten_trie(*where, self.base, self.width, self.table.element_size()))
        weakref.finalize(self, lib.hasten_trie_free, handle)
        return handle


@dataclass(eq=False)
class Trie:
    """One set in one version. root: its state before the first token. nodes, edges, rows: of the arrays, at this version. vocabulary: of the model.

    branch: most children of a node, by depth. levels: first node of each depth of what was built at once. order, starts: which items a row is (see
    `items`). added: items of rows that came later.
    """

    arrays: Arrays
    vocabulary: int
    branch: tuple[int, ...]
    levels: tuple[int, ...]
    nodes: int
    edges: int
    rows: int
    root: int = 0
    order: torch.Tensor | None = None
    starts: torch.Tensor | None = None
    first_row: int = 0
    built_rows: int = 0
    size: int = 0  # items
    end: int | None = None
    added: Mapping[int, tuple[int, ...]] = field(default_factory=dict)

    @property
    def width(self) -> int:
        """Tokens of the longest item."""
        return len(self.branch)

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays and of what says which items a row is."""
        return self.arrays.nbytes + sum(x.numel() * x.element_size() for x in (self.order, self.starts) if x is not None)

    def items(self, row: int) -> tuple[int, ...]:
        """Places of a row's items in what the trie was built from: one, or several that were the same tuple."""
        at, later = row - self.first_row, self.added.get(row, ())
        if not 0 <= at < self.built_rows:
            return later
        if self.starts is None:
            return (at if self.order is None else int(self.order[at]), *later)
        places = range(int(self.starts[at]), int(self.starts[at + 1]))
        return (*(int(self.order[p]) if self.order is not None else p for p in places), *later)

    def tuple_of(self, row: int) -> tuple[int, ...]:
        """The tokens of a row, the end token included."""
        a = self.arrays
        n = a.width if a.lengths is None else int(a.lengths[row])
        return tuple(t + a.base for t in a.table[row, :n].tolist())

    def length_of(self, row: int) -> int:
        return self.arrays.width if self.arrays.lengths is None else int(self.arrays.lengths[row])

    def children(self, state: int, depth: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(tokens int64 [k] in their order, states int32 [k]) that may follow a state at that depth."""
        a = self.arrays
        if state >= 0:
            edges = slice(int(a.first[state]), int(a.first[state + 1]))
            return a.tokens[edges].long() + a.base, a.next[edges]
        if state == DEAD or depth >= self.length_of(~state):
            return torch.empty(0, dtype=torch.long), torch.empty(0, dtype=torch.int32)
        return a.table[~state, depth].long()[None] + a.base, torch.tensor([state], dtype=torch.int32)

    def child(self, state: int, depth: int, token: int) -> int | None:
        """The state after a token, None where it leads nowhere."""
        tokens, follow = self.children(state, depth)
        at = int(torch.searchsorted(tokens, token))
        return int(follow[at]) if at < len(tokens) and int(tokens[at]) == token else None

    def leaves(self, state: int, most: int, permits: Any = None) -> list[int]:
        """States of the rows below a state in their order, `most` at most; permits: states int32 [n] -> bool, those that count."""
        if state < 0 or most < 1:
            return [state][: max(most, 0)]
        out: list[int] = []
        follow = self.arrays.next[int(self.arrays.first[state]) : int(self.arrays.first[state + 1])]
        for child in follow[permits(follow)].tolist() if permits is not None else follow.tolist():
            out += self.leaves(child, most - len(out), permits)
            if len(out) >= most:
                break
        return out

    @functools.cached_property
    def shortest(self) -> int:
        """Tokens of the shortest item that was ever in these arrays."""
        a = self.arrays
        return a.width if a.lengths is None else int(a.lengths[: self.rows].min())

    # --- on disk ------------------------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> artifact.Artifact:
        """Write the set as an artifact; a version that has been edited is refused (build it anew)."""
        if self.root or self.first_row or self.added or self.nodes != self.levels[-1]:
            raise UserError("trie: only a set as it was built can be saved; build one of the items it has now")
        a = self.arrays
        arrays = {"first": a.first, "tokens": a.tokens, "next": a.next, "table": a.table}
        arrays |= {k: v for k, v in {"lengths": a.lengths, "order": self.order, "starts": self.starts}.items() if v is not None}
        info = {"base": a.base, "branch": self.branch, "levels": self.levels, "size": self.size, "end": self.end}
        return artifact.save(path, KIND, {"vocabulary": self.vocabulary}, arrays, info, created_by="hasten.lm.constrain.trie")


def build(items: Items, vocabulary: int, *, end: int | None = None, device: str | torch.device = "cpu") -> Trie:
    """The trie of token tuples. UserError names the first row that is wrong.

    items: an integer array or tensor [N, L], or a sequence of tuples, in any order, of any lengths; repeated ones are several items of one row.
    end: a token that the model says after an item; needed where one item begins another. vocabulary: ids of the model's output layer.
    """
    b = built(items, vocabulary, end, device)
    arrays = Arrays(b.first, b.tokens, b.next, b.table, b.lengths, b.base)
    size = len(b.table) if b.order is None else len(b.order)
    return _whole(arrays, vocabulary, b.branch, b.levels, b.order, b.starts, size, end)


def load(path: str | Path, vocabulary: int, device: str | torch.device = "cpu") -> Trie:
    """A saved set, its file mapped into memory; UserError where it is damaged or was made for another vocabulary."""
    found = artifact.load(path, KIND, {"vocabulary": vocabulary})
    x, info = {name: array.to(device) for name, array in found.arrays.items()}, found.info
    arrays = Arrays(x["first"], x["tokens"], x["next"], x["table"], x.get("lengths"), int(info["base"]))
    order, starts = x.get("order"), x.get("starts")
    return _whole(arrays, vocabulary, tuple(info["branch"]), tuple(info["levels"]), order, starts, int(info["size"]), info["end"])


def _whole(
    arrays: Arrays, vocabulary: int, branch: tuple[int, ...], levels: tuple[int, ...], order: Any, starts: Any, size: int, end: int | None
) -> Trie:
    nodes, edges, rows = len(arrays.first) - 1, len(arrays.tokens), len(arrays.table)
    return Trie(
        arrays, vocabulary, branch + (1,) * (arrays.width - len(branch)), levels, nodes, edges, rows, order=order, starts=starts, built_rows=rows,
        size=size, end=end,
    )  # fmt: skip


def token_type(most: int) -> torch.dtype:
    """The smallest type that holds tokens up to `most`."""
    return torch.uint8 if most < 1 << 8 else torch.uint16 if most < 1 << 16 else torch.uint32


def join(tries: Sequence[Trie]) -> list[Trie]:
    """The same sets over one pair of arrays, so that requests of several sets are served in one batch. Sets as they were built, on one device."""
    if len({t.vocabulary for t in tries}) != 1:
        raise UserError("trie: sets of different vocabularies cannot be joined")
    base, width = min(t.arrays.base for t in tries), max(t.arrays.width for t in tries)
    most = max(int(t.arrays.table.long().max()) + t.arrays.base - base for t in tries)
    kind = token_type(most)
    ragged = any(t.arrays.lengths is not None or t.arrays.width != width for t in tries)
    parts: dict[str, list[torch.Tensor]] = {name: [] for name in ("first", "tokens", "next", "table", "lengths")}
    out, at = [], np.zeros(3, np.int64)  # nodes, edges, rows so far
    for t in tries:
        a, shift = t.arrays, t.arrays.base - base
        parts["first"].append(a.first[: t.nodes] + int(at[1]))
        parts["tokens"].append((a.tokens[: t.edges].long() + shift).to(kind))
        follow = a.next[: t.edges]
        parts["next"].append(torch.where(follow >= 0, follow + int(at[0]), follow - int(at[2])))
        table = torch.zeros(t.rows, width, dtype=torch.long, device=a.device)
        table[:, : a.width] = a.table[: t.rows].long() + shift
        parts["table"].append(table.to(kind))
        parts["lengths"].append(
            torch.full((t.rows,), a.width, dtype=torch.int16, device=a.device) if a.lengths is None else a.lengths[: t.rows]
        )
        out.append(replace(t, root=int(at[0]) + t.root, first_row=int(at[2]), levels=tuple(int(at[0]) + n for n in t.levels)))
        at += [t.nodes, t.edges, t.rows]
    parts["first"].append(torch.tensor([at[1]], dtype=torch.int32, device=tries[0].arrays.device))
    x = {name: torch.cat(p) for name, p in parts.items()}
    arrays = Arrays(x["first"], x["tokens"], x["next"], x["table"], x["lengths"] if ragged else None, base)
    return [replace(t, arrays=arrays, nodes=int(at[0]), edges=int(at[1]), rows=int(at[2])) for t in out]


__all__ = ["DEAD", "Arrays", "Trie", "build", "join", "load", "token_type"]
