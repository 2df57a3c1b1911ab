"""The one seam: an engine takes requests and, step by step, gives events. Server, benchmarks, tests and the Python API drive exactly this."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Protocol, TypeVar

from hasten.values import Event, Key, Request, Result


class Engine(Protocol):
    """Anything that answers requests: a model's token engine, a strategy over other engines, a remote endpoint."""

    @property
    def idle(self) -> bool:
        """True when nothing is waiting or running."""

    def add(self, key: Key, request: Request) -> None:
        """Queue a request under a key of the caller's choosing; UserError if it cannot be served, ValueError if the key is in use."""

    def step(self) -> list[Event]:
        """Do one unit of work (one forward pass); returns what it brought. Never blocks on anything but the work itself."""

    def cancel(self, key: Key) -> None:
        """Forget a request and free what it holds; unknown keys are ignored."""


K = TypeVar("K", bound=Hashable)


def run(engine: Engine, requests: Mapping[K, Request]) -> dict[K, Result]:
    """Answer all requests and return their results by key, in the order asked."""
    for key, request in requests.items():
        engine.add(key, request)
    done: dict[Hashable, Result] = {}
    while len(done) < len(requests):
        for event in engine.step():
            if event.result is not None:
                done[event.key] = event.result
    return {key: done[key] for key in requests}
