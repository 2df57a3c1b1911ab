"""A newcomer starts at once while there is memory, however near their ends the running rows are: buffers grow instead."""

from __future__ import annotations

from typing import Any

import pytest

from hasten.lm.engine import TokenEngine
from hasten.values import Request, Sampling


@pytest.mark.parametrize("prompt", [[5, 6, 7], [5, 6, 7, 8, 9, 10, 11]])
def test_short_rows_run_together(pairs: Any, prompt: list[int]) -> None:
    engine = TokenEngine(pairs("llama")[1])
    engine.add("a", Request(prompt, Sampling(max_tokens=12, temperature=1.0, ignore_eos=True, n=3)))
    while not engine.idle:
        engine.step()
    assert engine.steps <= 13  # the first may go ahead by its prompt, which the others then reuse


def test_a_newcomer_joins_rows_that_are_near_their_ends(pairs: Any) -> None:
    engine = TokenEngine(pairs("llama")[1])
    for i in range(3):
        engine.add(i, Request([5 + i, 6, 7], Sampling(max_tokens=20, ignore_eos=True)))
    for _ in range(15):
        engine.step()
    engine.add("late", Request([9, 6, 7], Sampling(max_tokens=20, ignore_eos=True)))
    engine.step()
    assert len(engine.scheduler.running) == 4


def test_where_memory_is_full_a_newcomer_still_waits(pairs: Any) -> None:
    model = pairs("llama")[1]
    one = TokenEngine(model).cache.shape.bytes_per_position
    engine = TokenEngine(model, memory=40 * one)
    for i in range(2):
        engine.add(i, Request([5 + i, 6, 7], Sampling(max_tokens=20, ignore_eos=True)))
    done: list[Any] = []
    while not engine.idle:
        done += [event.key for event in engine.step() if event.result]
        assert engine.cache.nbytes <= 40 * one
    assert done == [0, 1]
