"""Beam search as it is defined: over masked log-probabilities of the whole vocabulary, with sets of prefixes. The yardstick of the trie's."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

Item = tuple[int, ...]


def prefixes(items: Sequence[Item]) -> dict[Item, set[int]]:
    """What may follow each prefix."""
    out: dict[Item, set[int]] = {}
    for item in items:
        for n, token in enumerate(item):
            out.setdefault(item[:n], set()).add(token)
    return out


def beams(items: Sequence[Item], logp: Callable[[list[Item]], torch.Tensor], most: int) -> list[tuple[Item, float]]:
    """The best `most` items: at each step the largest of score + log-probability over [beams, vocabulary], the first of equal ones.

    logp: prefixes -> [prefixes, vocabulary]. An item that has ended stays as it is.
    """
    follow, wholes = prefixes(items), set(items)
    live: list[tuple[Item, float]] = [((), 0.0)]
    while any(p not in wholes for p, _ in live):
        rows = logp([p for p, _ in live])
        found = []
        for (prefix, score), row in zip(live, rows, strict=True):
            if prefix in wholes:
                found.append((prefix, score))
                continue
            sums = (torch.tensor(score, dtype=row.dtype) + row).tolist()  # in the model's own arithmetic
            found += [((*prefix, t), sums[t]) for t in sorted(follow[prefix]) if not math.isnan(sums[t]) and sums[t] > -math.inf]
        live = sorted(found, key=lambda f: -f[1])[:most]  # a stable sort
    return live
