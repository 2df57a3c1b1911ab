"""Drive: an engine that answers each request by running a strategy, a generator of plain Python, over other engines.

A strategy yields `Ask(new requests, keys to cancel)` and is sent the results that finished since; what it returns is the answer. It never
touches a tensor, so it is tested with a fake engine, and any number of strategies run at once over the same engines with no barrier: the
batching comes from the engines. The idea is httpx's `Auth.auth_flow` (sans-IO generators), with many outstanding requests instead of one.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from hasten.engine import Engine
from hasten.usage import Cost, Usage, add_costs
from hasten.values import Ask, Event, Key, Request, Result, UserError, did_you_mean

Flow: TypeAlias = Generator[Ask, dict[Key, Result], Result]
Strategy: TypeAlias = Callable[[Request], Flow]


@dataclass(eq=False, slots=True)
class _Run:
    """One running generator: what it waits for, what finished since, and what everything it asked for has cost."""

    flow: Flow
    running: dict[Key, Key] = field(default_factory=dict)  # strategy's key -> private key, of requests not cancelled
    kept: dict[Key, tuple[Engine, Key]] = field(default_factory=dict)  # requests whose cache the strategy keeps
    owed: set[Key] = field(default_factory=set)  # private keys whose final event has not come, cancelled ones included
    inbox: dict[Key, Result] = field(default_factory=dict)
    costs: dict[str, Cost] = field(default_factory=dict)
    peak_bytes: int = 0
    closed: bool = False
    answer: Result = field(default_factory=lambda: Result(finish_reason="cancelled"))
    settled: bool = False

    def charge(self, result: Result) -> None:
        results = (result, *result.others)
        self.costs = add_costs([Usage(self.costs), *(r.usage for r in results)])
        self.peak_bytes = max(self.peak_bytes, *(r.usage.peak_bytes for r in results))


@dataclass(eq=False, slots=True)
class _Job:
    """One request of the outside: a run for each of its `n` samples."""

    key: Key
    started: float
    runs: list[_Run]
    cancelled: bool = False


@dataclass(frozen=True, slots=True)
class _Asked:
    run: _Run
    name: Key
    engine: Engine


class Drive:
    """Runs `strategy` over `engines` (by role) and is itself an engine, so drives nest: an engine may be another drive.

    `Request.sampling.n` = n runs the strategy n times, with `sample` counting up and n = 1; the results come back as any engine's do. A
    result's costs are those of everything its run asked for, cancelled requests included; `seconds` is wall time since `add`, `ttft` is the
    same (a strategy's first token is known with its last) and `tpot` is therefore 0.

    Errors: `add` raises UserError for what no strategy can serve and for a role without an engine, ValueError for a key in use. An exception
    from a strategy comes out of `add` or `step` with a note that names the request; that request is dropped and all it asked for cancelled,
    while the others go on with the next `step`.
    """

    def __init__(self, engines: Mapping[str, Engine], strategy: Strategy) -> None:
        self.engines = dict(engines)
        self.strategy = strategy
        self._jobs: dict[Key, _Job] = {}
        self._asked: dict[Key, _Asked] = {}
        self._events: list[Event] = []  # survive an exception in `step`
        self._serial = itertools.count()

    @property
    def idle(self) -> bool:
        return not self._jobs and not self._events

    def add(self, key: Key, request: Request) -> None:
        if key in self._jobs:
            raise ValueError(f"key {key!r} is in use")
        _refuse(request)
        job = _Job(key, time.perf_counter(), [_Run(self.strategy(single)) for single in _samples(request)])
        self._jobs[key] = job
        for run in job.runs:
            self._resume(job, run, None)

    def step(self) -> list[Event]:
        for engine in self._busy():
            for event in engine.step():
                self._receive(event)
            self._write_off(engine)
        for job, run in self._runs():
            if run.inbox:
                results, run.inbox = run.inbox, {}
                self._resume(job, run, results)
        for job in list(self._jobs.values()):
            self._settle(job)
        events, self._events = self._events, []
        return events

    def cancel(self, key: Key) -> None:
        """Closes the request's generators and cancels all they asked for; one last event, "cancelled", brings what they cost."""
        job = self._jobs.get(key)
        if job is None:
            return
        job.cancelled = True
        for run in job.runs:
            self._close(run)

    # --- one run ---

    def _resume(self, job: _Job, run: _Run, results: dict[Key, Result] | None) -> None:
        """Run a strategy up to its next wait; if that fails, drop its whole request and say which it was."""
        try:
            self._advance(run, results)
        except BaseException as error:
            del self._jobs[job.key]
            error.add_note(f"in the strategy that answers request {job.key!r}")
            for each in job.runs:
                self._close(each)
            raise

    def _advance(self, run: _Run, results: dict[Key, Result] | None) -> None:
        try:
            ask = next(run.flow) if results is None else run.flow.send(results)
        except StopIteration as stop:
            if not isinstance(stop.value, Result):
                raise TypeError(f"a strategy must return a Result, not {type(stop.value).__name__}") from None
            run.answer = stop.value
            self._close(run)
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

    def _close(self, run: _Run) -> None:
        """End a run for good: nothing of it stays on any engine. Engines first: the generator's own clean-up may raise."""
        run.closed = True
        run.inbox.clear()
        for name in [*run.running, *run.kept]:
            self._drop(run, name)
        run.flow.close()

    # --- events ---

    def _runs(self) -> list[tuple[_Job, _Run]]:
        return [(job, run) for job in self._jobs.values() for run in job.runs]

    def _busy(self) -> Iterator[Engine]:
        """Each engine once, though it may serve several roles, if it has work or still owes us the end of a request."""
        owing = {id(asked.engine) for asked in self._asked.values()}
        for engine in {id(e): e for e in self.engines.values()}.values():
            if id(engine) in owing or not engine.idle:
                yield engine

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

    def _write_off(self, engine: Engine) -> None:
        """An engine with nothing left to do owes nothing: forget what was cancelled without a last event; a lost live request is a bug."""
        if not engine.idle:
            return
        for private, asked in [(k, a) for k, a in self._asked.items() if a.engine is engine]:
            if private in asked.run.running.values():
                raise RuntimeError(f"the engine went idle without answering request {asked.name!r}")
            del self._asked[private]
            asked.run.owed.discard(private)

    def _settle(self, job: _Job) -> None:
        """Price the runs that ended, once all they asked for has ended; when all runs have, emit the request's result."""
        for sample, run in enumerate(job.runs):
            if run.closed and not run.owed and not run.settled:
                seconds = time.perf_counter() - job.started
                usage = Usage(run.costs, seconds=seconds, ttft=seconds, peak_bytes=run.peak_bytes)
                run.answer, run.settled = replace(run.answer, usage=usage), True
                if not job.cancelled:
                    self._events.append(Event(job.key, run.answer.tokens, sample=sample))
        if all(run.settled for run in job.runs):
            del self._jobs[job.key]
            first, *others = (run.answer for run in job.runs)
            result = _cancelled([first, *others]) if job.cancelled else replace(first, others=tuple(others))
            self._events.append(Event(job.key, result=result))


def _refuse(request: Request) -> None:
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


def _cancelled(answers: list[Result]) -> Result:
    costs = add_costs(answer.usage for answer in answers)
    seconds, peak = (max(getattr(answer.usage, name) for answer in answers) for name in ("seconds", "peak_bytes"))
    return Result(finish_reason="cancelled", usage=Usage(costs, seconds=seconds, ttft=seconds, peak_bytes=peak))
