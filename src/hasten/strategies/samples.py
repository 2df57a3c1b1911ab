"""What strategies that draw several whole samples share: their options' limits, the sibling requests, and waiting for them all."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import replace
from typing import Protocol

from hasten.values import Ask, Key, Request, Result, Sampling, UserError


class Drawing(Protocol):
    """The options that say how siblings are drawn."""

    @property
    def n(self) -> int: ...
    @property
    def temperature(self) -> float: ...
    @property
    def top_p(self) -> float: ...


def check(options: Drawing) -> None:
    """UserError if n < 1 or the sampling options are out of range."""
    if not isinstance(options.n, int) or options.n < 1:
        raise UserError(f"n={options.n}: must be a whole number of samples, at least 1")
    Sampling(temperature=options.temperature, top_p=options.top_p)


def siblings(request: Request, options: Drawing) -> dict[Key, Request]:
    """Sample index i in [0, n) -> its request. Random streams never collide between outer samples: outer index * n + i."""
    sampling = request.sampling.but(n=1, temperature=options.temperature, top_p=options.top_p)
    first = request.sample * options.n
    return {i: replace(request, role="target", sampling=sampling, sample=first + i) for i in range(options.n)}


def gather(requests: Mapping[Key, Request]) -> Generator[Ask, dict[Key, Result], dict[Key, Result]]:
    """Ask all, wait for all: `results = yield from gather(requests)`, in the order asked."""
    done = yield Ask(requests)
    while len(done) < len(requests):
        done = {**done, **(yield Ask())}
    return {key: done[key] for key in requests}
