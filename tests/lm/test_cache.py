"""The ragged cache against a plain dictionary of lists, under random verbs and little memory."""

from __future__ import annotations

import random

import pytest
import torch

from hasten.lm.cache import Entry, RaggedCache, Shape, common_prefix

SHAPE = Shape(layers=2, kv_heads=1, head_dim=2, dtype=torch.float64, device=torch.device("cpu"))


def write(cache: RaggedCache, entry: Entry, tokens: list[int]) -> None:
    """Store each position's token id (and position) where its keys would be."""
    for token in tokens:
        cache.data[:, :, entry.slot, entry.length] = float(token + 1000 * entry.length)
        entry.tokens.append(token)


def check(cache: RaggedCache) -> None:
    for slot, entry in enumerate(cache.entries):
        assert (entry is not None and entry.active) == (slot < cache.active)
        if entry is not None:
            assert entry.slot == slot
            want = torch.tensor([t + 1000.0 * i for i, t in enumerate(entry.tokens)], dtype=torch.float64)
            assert torch.equal(cache.data[1, 1, slot, : entry.length, 0], want)
    assert cache.used == sum(entry is not None for entry in cache.entries)
    assert len(cache.entries) * cache.capacity <= max(cache.budget, 1)


@pytest.mark.parametrize("seed", range(12))
def test_random_verbs_keep_every_row(seed: int) -> None:
    rand = random.Random(seed)
    cache = RaggedCache(SHAPE, budget=rand.choice([300, 700, 4000]), max_len=200, max_rows=6, retained=4)
    live: list[tuple[Entry, list[int]]] = []
    for _ in range(400):
        act = rand.random()
        if act < 0.35 and len(live) < 6:
            tokens = [rand.randrange(3) for _ in range(rand.randrange(1, 30))]
            source = max(cache.sources(tokens), key=lambda e: common_prefix(e.tokens, tokens), default=None)
            n = min(common_prefix(source.tokens, tokens), len(tokens) - 1) if source else 0
            entry = cache.fork(source, n, tokens, len(tokens)) if source else cache.allocate(tokens, len(tokens))
            if entry is not None:
                assert entry.tokens == tokens[:n]
                write(cache, entry, tokens[n:])
                live.append((entry, list(tokens)))
        elif live and act < 0.6:
            entry, tokens = rand.choice(live)
            more = [rand.randrange(3) for _ in range(rand.randrange(1, 20))]
            if cache.reserve(entry.length + len(more)):
                write(cache, entry, more)
                tokens += more
        elif live and act < 0.75:
            entry, tokens = rand.choice(live)
            n = rand.randrange(len(tokens) + 1)
            cache.truncate(entry, n)
            del tokens[n:]
        elif live:
            entry, _ = live.pop(rand.randrange(len(live)))
            cache.release(entry, retain=rand.random() < 0.8)
        check(cache)
        assert all(e.tokens == t for e, t in live)


def test_common_prefix() -> None:
    rand = random.Random(0)
    for _ in range(300):
        a = [rand.randrange(2) for _ in range(rand.randrange(12))]
        b = [rand.randrange(2) for _ in range(rand.randrange(12))]
        want = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
        assert common_prefix(a, b) == want


def test_no_room_is_said_and_nothing_breaks() -> None:
    cache = RaggedCache(SHAPE, budget=100, max_len=100, max_rows=4)
    a = cache.allocate([1] * 60, 60)
    assert a is not None
    write(cache, a, [1] * 60)
    assert cache.allocate([2] * 60, 60) is None
    assert cache.allocate([2] * 20, 20) is None  # 76 positions for the first, with its margin, and as many for the second

    assert not cache.reserve(101)
    check(cache)


def test_rows_that_are_kept_one_by_one_do_not_remake_the_buffers_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Searches keep many rows beyond those that may run; buffers must double, or everything stored is copied for each of them."""
    cache, made = RaggedCache(SHAPE, budget=64 * 4096, max_len=64, max_rows=4), 0
    resize = RaggedCache._resize

    def counted(self: RaggedCache, slots: int, capacity: int) -> None:
        nonlocal made
        made += 1
        resize(self, slots, capacity)

    monkeypatch.setattr(RaggedCache, "_resize", counted)
    for i in range(500):
        entry = cache.allocate([i], 10)
        assert entry is not None
        entry.pinned += 1
        cache.release(entry)
    assert made <= 9
