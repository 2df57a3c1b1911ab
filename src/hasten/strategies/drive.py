"""Drive: an engine that answers each request by running a strategy, a generator of plain Python, over other engines.

A strategy yields `Ask(new requests, keys to cancel)` and is sent the results that finished since; what it returns is the answer. It never
touches a tensor, so it is tested with a fake engine, and any number of strategies run at once over the same engines with no barrier: the
batching comes from the engines. The idea is httpx's `Auth.auth_flow` (sans-IO generators), with many outstanding requests instead of one.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from hasten.engine import Engine
from hasten.usage import Cost, Usage, add_costs
from hasten.values import Ask, Event, Key, Request, Result, UserError, did_you_mean

Flow: TypeAlias = Generator[Ask, dict[Key, Result], Result]
Strategy: TypeAlias = Callable[[Request], Flow]


@dataclass(eq=False, slots=True)
class _Job:
    """One request of the outside: a run for each of its `n` samples."""

    key: Key
    started: float
    runs: list[_Run] = field(default_factory=list)


@dataclass(eq=False, slots=True)
class _Run:
    """One running generator: what it waits for, what finished since, and what everything it asked for has cost."""

    job: _Job
    flow: Flow
    running: dict[Key, Key] = field(default_factory=dict)  # strategy's key -> private key, of requests not cancelled
    kept: dict[Key, tuple[Engine, Key]] = field(default_factory=dict)  # requests whose cache the strategy keeps
    owed: set[Key] = field(default_factory=set)  # private keys whose final event has not come, cancelled ones included
    inbox: dict[Key, Result] = field(default_factory=dict)
    costs: dict[str, Cost] = field(default_factory=dict)
    peak_bytes: int = 0
    closed: bool = False
    settled: bool = False
    answer: Result = field(default_factory=lambda: Result(finish_reason="cancelled"))

    def charge(self, result: Result) -> None:
        usages = [r.usage for r in (result, *result.others)]
        self.costs = add_costs([Usage(self.costs), *usages])
        self.peak_bytes = max(self.peak_bytes, *(usage.peak_bytes for usage in usages))


@dataclass(frozen=True, slots=True)
class _Asked:
    run: _Run
    name: Key
    engine: Engine


class Drive:
    """Runs `strategy` over `engines` (by role) and is itself an engine, so drives nest: an engine may be another drive.

    `Request.sampling.n` = n runs the strategy n times, with `sample` counting up and n = 1; the results come back as any engine's do. A
    result's costs are those of everything its run asked for, cancelled requests included; `seconds` is wall time since `add`, `ttft` is the
    same (a strategy's first token is known with its last) and `tpot` is therefore 0. An engine that has an event still to give must not be
    idle, and gives one last event after `cancel`.

    Errors: `add` raises UserError for what no strategy can serve and for a role without an engine, ValueError for a key in use. An exception
    from a strategy comes out of `add` or `step` with a note that names the request; that request is dropped and all it asked for cancelled,
    while the others go on with the next `step`.
    """

    def __init__(self, engines: Mapping[str, Engine], strategy: Strategy) -> None:
        self.engines = dict(engines)
        self.strategy = strategy
        self._jobs: dict[Key, _Job] = {}
        self._asked: dict[Key, _Asked] = {}
        self._ready: dict[_Run, None] = {}  # in order: runs with results to hand on, or an end to report
        self._events: list[Event] = []  # with `_ready`, survives an exception in `step`
        self._serial = itertools.count()

    @property
    def idle(self) -> bool:
        return not (self._jobs or self._asked or self._events)

    def add(self, key: Key, request: Request) -> None:
        """Start the strategy on a request, up to its first wait."""
        if key in self._jobs:
            raise ValueError(f"key {key!r} is in use")
        refuse(request)
        job = _Job(key, time.perf_counter())
        job.runs += [_Run(job, self.strategy(single)) for single in _samples(request)]
        self._jobs[key] = job
        for run in job.runs:
            self._resume(run, None)

    def step(self) -> list[Event]:
        """Step every engine that has work once, then resume every strategy that got a result."""
        for engine in {id(e): e for e in self.engines.values()}.values():  # an engine may serve several roles
            for event in [] if engine.idle else engine.step():
                self._receive(event)
        if self._asked and all(engine.idle for engine in self.engines.values()):
            self._write_off()
        while self._ready:
            run = next(iter(self._ready))
            del self._ready[run]
            if run.inbox:
                results, run.inbox = run.inbox, {}
                self._resume(run, results)
            self._settle(run)
        events, self._events = self._events, []
        return events

    def cancel(self, key: Key) -> None:
        """Close the request's generators and cancel all they asked for; its last event, "cancelled", brings what they cost."""
        if key in self._jobs:
            self._close(self._jobs[key].runs)

    # --- one run ---

    def _resume(self, run: _Run, results: dict[Key, Result] | None) -> None:
        """Run a strategy up to its next wait; if that fails, drop its whole request and say which it was."""
        try:
            self._advance(run, results)
        except BaseException as error:
            del self._jobs[run.job.key]
            self._events = [event for event in self._events if event.key != run.job.key]
            error.add_note(f"in the strategy that answers request {run.job.key!r}")
            error.request = run.job.key  # type: ignore[attr-defined]  # for programs: whose it was
            self._close(run.job.runs)
            raise

    def _advance(self, run: _Run, results: dict[Key, Result] | None) -> None:
        try:
            ask = next(run.flow) if results is None else run.flow.send(results)
        except StopIteration as stop:
            if not isinstance(stop.value, Result):
                raise TypeError(f"a strategy must return a Result, not {type(stop.value).__name__}") from None
            run.answer = stop.value
            self._close([run])
            return
        if not isinstance(ask, Ask):
            raise TypeError(f"a strategy must yield an Ask, not {type(ask).__name__}")
        for name in ask.cancel:
            self._drop(run, name)
        for name, request in ask.new.items():
            self._start(run, name, request)
        if not run.running:
            raise RuntimeError("the strategy waits but nothing it asked for is running: it would wait for ever")

    def _start(self, run: _Run, name: Key, request: Request) -> None:
        engine = self.engines.get(request.role)
        if engine is None:
            raise UserError(f"the strategy asks the role {request.role!r}, which has no model{did_you_mean(request.role, self.engines)}")
        if name in run.running or name in run.kept:
            raise ValueError(f"the strategy asks {name!r} again while the first is still running or kept")
        private = (name, next(self._serial))
        engine.add(private, _translated(request, run.kept))
        run.running[name] = private
        run.owed.add(private)
        self._asked[private] = _Asked(run, name, engine)
        for released in request.release:
            run.kept.pop(released, None)
        if request.keep:
            run.kept[name] = (engine, private)

    def _drop(self, run: _Run, name: Key) -> None:
        """Cancel one request, whether it runs or is only kept; names of neither are ignored."""
        private = run.running.pop(name, None)
        kept = run.kept.pop(name, None)
        if private is not None:
            self._asked[private].engine.cancel(private)
        elif kept is not None:
            kept[0].cancel(kept[1])

    def _close(self, runs: Iterable[_Run]) -> None:
        """End runs for good: nothing of them stays on any engine. Engines first: a generator's own clean-up may raise."""
        for run in runs:
            run.closed = True
            run.inbox.clear()
            for name in [*run.running, *run.kept]:
                self._drop(run, name)
            self._ready[run] = None
        for run in runs:
            run.flow.close()

    # --- events ---

    def _receive(self, event: Event) -> None:
        if event.result is None or event.key not in self._asked:
            return
        asked = self._asked.pop(event.key)
        run = asked.run
        run.owed.discard(event.key)
        run.charge(event.result)
        if run.running.get(asked.name) == event.key:  # else it was cancelled: paid for, but no longer awaited
            del run.running[asked.name]
            run.inbox[asked.name] = event.result
        self._ready[run] = None

    def _write_off(self) -> None:
        """No engine has anything left to do: forget what was cancelled without a last event; a live request that was lost is a bug."""
        for private, asked in list(self._asked.items()):
            if asked.run.running.get(asked.name) == private:
                raise RuntimeError(f"the engines went idle without answering the strategy's request {asked.name!r}")
            del self._asked[private]
            asked.run.owed.discard(private)
            self._ready[asked.run] = None

    def _settle(self, run: _Run) -> None:
        """Price a run that ended, once all it asked for has ended; with the last of a request's runs, emit the result."""
        job = run.job
        if not run.closed or run.owed or run.settled or self._jobs.get(job.key) is not job:
            return
        seconds = time.perf_counter() - job.started
        run.answer = replace(run.answer, usage=Usage(run.costs, seconds=seconds, ttft=seconds, peak_bytes=run.peak_bytes))
        run.settled = True
        if run.answer.tokens:
            self._events.append(Event(job.key, run.answer.tokens, sample=job.runs.index(run)))
        if all(each.settled for each in job.runs):
            del self._jobs[job.key]
            first, *others = (each.answer for each in job.runs)
            self._events.append(Event(job.key, result=replace(first, others=tuple(others))))


def refuse(request: Request) -> None:
    """A strategy answers whole requests: what addresses one model's cache or scores is refused by name."""
    for name in ("score", "parent", "keep", "release"):
        if getattr(request, name) not in (False, None, ()):
            raise UserError(f"a request with `{name}` asks one model, not a strategy; ask the recipe without its strategy")


def _samples(request: Request) -> list[Request]:
    single = request.sampling.but(n=1)
    return [replace(request, sampling=single, sample=request.sample + i) for i in range(request.sampling.n)]


def _translated(request: Request, kept: Mapping[Key, tuple[Engine, Key]]) -> Request:
    """The request with the strategy's own keys of kept requests replaced by the private ones."""
    names = [*request.release] if request.parent is None else [request.parent, *request.release]
    for name in names:
        if name not in kept:
            raise ValueError(f"the strategy names {name!r} as parent or in release, but keeps no such request")
    parent = None if request.parent is None else kept[request.parent][1]
    return replace(request, parent=parent, release=tuple(kept[name][1] for name in request.release))
