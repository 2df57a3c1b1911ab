"""The layout and the step that STATIC's authors released for PyTorch (arXiv:2602.22647), made again from their description: a rival of
`bench/trie.py`.

Every distinct prefix is a state; a row-pointer table gives each state's slice of one table of (token, next state) pairs; the first two levels are
also there as dense tables. A step reads `limit` pairs of every row, those behind the end of the slice included, and masks what is too much.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch


@dataclass
class Layout:
    """pairs int32 [edges + vocabulary, 2] (token, next state; the last ones are padding), pointers int32 [states + 2], most children by depth."""

    pairs: torch.Tensor
    pointers: torch.Tensor
    branch: list[int]
    dense_allowed: torch.Tensor
    dense_states: torch.Tensor

    @property
    def nbytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in (self.pairs, self.pointers, self.dense_allowed, self.dense_states))


def build(items: np.ndarray, vocabulary: int) -> Layout:
    """items [N, L] in any order (they are sorted here, column by column from the last, as the layout needs)."""
    rows = items[np.lexsort(items.T[::-1])]
    n, length = rows.shape
    differ = rows[1:] != rows[:-1]
    first = np.where(differ.any(1), differ.argmax(1), length).astype(np.int8)
    new = np.ones((n, length), bool)
    new[1:] = first[:, None] <= np.arange(length)
    ids = np.empty((n, length - 1), np.int32)
    ids[:, 0] = rows[:, 0] + 1
    parents, tokens, children = [], [], []
    blocks, states = [(1, vocabulary + 1)], vocabulary + 1
    for t in range(1, length - 1):
        opened = np.flatnonzero(new[:, t])
        given = np.zeros(n, np.int32)
        given[opened] = np.arange(states, states + len(opened), dtype=np.int32)
        ids[:, t] = np.maximum.accumulate(given)
        blocks.append((states, states + len(opened)))
        states += len(opened)
    for t in range(1, length):
        opened = np.flatnonzero(new[:, t])
        parents.append(ids[opened, t - 1])
        tokens.append(rows[opened, t])
        children.append(ids[opened, t] if t < length - 1 else np.zeros(len(opened), np.int32))
    counts = np.bincount(np.concatenate(parents), minlength=states)
    pointers = np.concatenate([[0], np.cumsum(counts), [counts.sum() + vocabulary]]).astype(np.int32)
    padding = np.stack([np.full(vocabulary, vocabulary), np.zeros(vocabulary)], 1)
    pairs = np.concatenate([np.stack([np.concatenate(tokens), np.concatenate(children)], 1), padding]).astype(np.int32)
    allowed, dense = np.zeros((vocabulary, vocabulary), bool), np.zeros((vocabulary, vocabulary), np.int32)
    allowed[rows[:, 0], rows[:, 1]] = True
    dense[rows[:, 0], rows[:, 1]] = ids[:, 1]
    branch = [len(np.unique(rows[:, 0])), *(int(counts[a:b].max()) for a, b in blocks)]
    return Layout(*map(torch.from_numpy, (pairs, pointers)), branch, *map(torch.from_numpy, (allowed, dense)))


def walk(layout: Layout, prefixes: np.ndarray) -> torch.Tensor:
    """States int64 [R] of prefixes [R, n >= 1] that exist."""
    out = []
    for prefix in prefixes.tolist():
        state = prefix[0] + 1
        for token in prefix[1:]:
            edges = layout.pairs[int(layout.pointers[state]) : int(layout.pointers[state + 1])]
            state = int(edges[edges[:, 0] == token][0, 1])
        out.append(state)
    return torch.tensor(out)


def candidates(
    logp: torch.Tensor, states: torch.Tensor, pairs: torch.Tensor, pointers: torch.Tensor, limit: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(log-probabilities, tokens, next states), each [R, limit]."""
    begin = pointers[states]
    count = pointers[states + 1] - begin
    slot = torch.arange(limit)
    found = pairs[(begin[:, None] + slot).clamp(max=len(pairs) - 1)]
    tokens, follow = found[..., 0], found[..., 1]
    gained = logp.gather(1, tokens.clamp(max=logp.shape[1] - 1))
    return torch.where(slot < count[:, None], gained, float("-inf")), tokens, follow


def step(
    logp: torch.Tensor, states: torch.Tensor, sums: torch.Tensor, pairs: torch.Tensor, pointers: torch.Tensor, limit: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """states [B, M], sums [B, M] -> the best M of each request: scores, parents, tokens, states."""
    requests, beams = states.shape
    gained, tokens, follow = candidates(logp, states.flatten(), pairs, pointers, limit)
    scores, place = (sums[:, :, None] + gained.view(requests, beams, limit)).view(requests, -1).topk(beams)
    return scores, place // limit, tokens.view(requests, -1).gather(1, place), follow.view(requests, -1).gather(1, place)
