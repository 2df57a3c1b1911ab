"""The closed loop: N requests in flight, a new one as soon as one finishes. The load that `--concurrency N` means (Schroeder et al. 2006)."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from hasten.engine import Engine
from hasten.values import Key, Request, Result


@dataclass(frozen=True, slots=True)
class Timed:
    """A finished request and the wall seconds from asking to its result."""

    key: Key
    result: Result
    seconds: float


def closed_loop(engine: Engine, requests: Iterable[tuple[Key, Request]], concurrency: int) -> Iterator[Timed]:
    """Answer the requests with `concurrency` of them in flight; each comes out as it finishes. Left early, the rest is cancelled."""
    waiting, began = iter(requests), dict[Key, float]()
    try:
        while True:
            while len(began) < concurrency and (following := next(waiting, None)):
                key, request = following
                began[key] = time.perf_counter()
                try:
                    engine.add(key, request)
                except BaseException:
                    del began[key]
                    raise
            if not began:
                return
            for event in engine.step():
                if event.result is not None and event.key in began:
                    yield Timed(event.key, event.result, time.perf_counter() - began.pop(event.key))
    finally:
        for key in began:
            engine.cancel(key)
