"""Replicas of a recipe in processes of their own, one a NUMA node, behind one engine.

Memory belongs to a node, and reading another node's is slow; two engines that each read their own beat one that spans both (llama.cpp and vLLM
found the same). Each process binds itself to the cores of its place before it reads the weights, so they lie there (first touch). A request
goes to the replica with the fewest samples to answer, a child of a kept request to where its parent's cache is. Values cross as JSON lines.

Tokens do not depend on the replica, nor do a request's counts, but for what it shares with the others in its batch: a smaller batch shares
the reading of the weights among fewer, and a prompt's prefix is reused only where it was computed.
"""

from __future__ import annotations

import itertools
import os
import selectors
import sys
import time
import weakref
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hasten import cpu, hf, wire
from hasten.child import Child, stop
from hasten.cpu import Topology
from hasten.lm import text
from hasten.lm.limits import Limits
from hasten.load import Loaded
from hasten.recipe import Recipe
from hasten.strategies.drive import refuse
from hasten.values import Event, Key, Request, Result, UserError

POLL = 0.01  # seconds that a step waits for news at most
COMMAND = (sys.executable, "-P", "-c", "from hasten.worker import main; main()")


class Replica(Child):
    """One process, and how many samples it has to answer."""

    def __init__(self, index: int, command: Sequence[str]) -> None:
        super().__init__(f"worker {index}", command)
        self.index, self.load = index, 0


@dataclass(eq=False, slots=True)
class _Asked:
    """A request on its way. since: when it was asked. unwanted: cancelled, so that it is not kept even if it had finished."""

    key: Key
    role: str
    replica: Replica
    request: Request
    since: float
    unwanted: bool = False


@dataclass(frozen=True, slots=True)
class _Kept:
    """A finished request whose cache a replica holds."""

    replica: Replica
    serial: int
    tokens: list[int]


class Workers:
    """An engine over replicas. setups: what each is to open (`worker.open_recipe`). tokenizer: the recipe's, for prompts of text.

    `add` refuses what an engine refuses. `step` raises UserError for a request that a worker refused after all (once its strategy ran, say), and
    for a worker that ended, once, with the requests that are lost; the others go on with the next step. role: a model under the strategy that is
    asked past it, "": the recipe as a whole.
    """

    def __init__(self, setups: Sequence[Mapping[str, Any]], tokenizer: Any = None, command: Sequence[str] = COMMAND) -> None:
        self.tokenizer = tokenizer
        self.roles: dict[str, Limits] = {}
        self.strategy, self.threads = False, 0
        self._replicas: list[Replica] = []
        self.close = weakref.finalize(self, stop, self._replicas)  # at the latest when this is forgotten, or Python ends
        self._ears = selectors.DefaultSelector()
        self._serial = itertools.count()
        self._asked: dict[int, _Asked] = {}
        self._running: dict[tuple[str, Key], int] = {}
        self._kept: dict[tuple[str, Key], _Kept] = {}
        self._news: dict[str, list[Event]] = {}
        self._errors: deque[str] = deque()
        self._ended: list[str] = []
        for index, setup in enumerate(setups):
            replica = Replica(index, command)
            self._replicas.append(replica)
            self._ears.register(replica.process.stdout, selectors.EVENT_READ, replica)
            replica.send(setup)

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def wait(self) -> None:
        """Until all are ready. UserError says why one cannot be; then none is left."""
        missing = set(self._replicas)
        try:
            while missing:
                for replica, message in self._heard(1.0):
                    if message is None:
                        raise UserError(replica.said or replica.end())
                    replica.said = message.get("error", "")
                    if "ready" in message:
                        self._meet(**message["ready"])
                        missing.discard(replica)
        except BaseException:
            self.close()
            raise

    def _meet(self, roles: Mapping[str, Any], strategy: bool, threads: int) -> None:
        found = {role: Limits(**limits) for role, limits in roles.items()}
        least = {role: min(limits.positions, self.roles.get(role, limits).positions) for role, limits in found.items()}
        self.roles = {role: replace(limits, positions=least[role]) for role, limits in found.items()}
        self.strategy, self.threads = strategy, max(threads, self.threads)

    # --- the engine ---------------------------------------------------------------------------------------------------------------

    @property
    def idle(self) -> bool:
        return self.quiet("")

    def quiet(self, role: str) -> bool:
        """Whether nothing that was asked of this role is on its way."""
        return not (self._errors or self._news.get(role) or any(r == role for r, _ in self._running))

    def add(self, key: Key, request: Request, role: str = "") -> None:
        """Send a request to a replica; UserError names what cannot be served."""
        if (role, key) in self._running:
            raise ValueError(f"key {key!r} is in use")
        if not self._replicas:
            raise UserError(f"no worker is left: {'; '.join(self._ended) or 'they were closed'}")
        kept = self._check(request, role)
        replica = kept.replica if kept else min(self._replicas, key=lambda r: (r.load, r.index))
        serial = next(self._serial)
        released = [old for name in request.release if (old := self._kept.get((role, name)))]
        for old in released:
            if old.replica is not replica:
                old.replica.send({"cancel": old.serial, "role": role})
        here = tuple(old.serial for old in released if old.replica is replica)
        sent = _sendable(replace(request, parent=kept and kept.serial, release=here))
        for name in request.release:
            self._kept.pop((role, name), None)
        replica.load += request.sampling.n
        self._asked[serial] = _Asked(key, role, replica, request, time.perf_counter())
        self._running[role, key] = serial
        replica.send({"add": serial, "role": role, "request": sent})

    def step(self, role: str = "") -> list[Event]:
        """What the replicas have sent; waits a moment where nothing has come. They work on meanwhile."""
        if self._replicas:
            self._listen(POLL if self._running and not self._errors and not self._news.get(role) else 0)
        elif self._asked:
            self._give_up("the workers were closed", list(self._asked))
        if self._errors:
            raise UserError(self._errors.popleft())
        return self._news.pop(role, [])

    def cancel(self, key: Key, role: str = "") -> None:
        """Stop a request, or let a kept one go; unknown keys are ignored."""
        if (serial := self._running.get((role, key))) is not None:
            self._asked[serial].unwanted = True
            self._asked[serial].replica.send({"cancel": serial, "role": role})
        if kept := self._kept.pop((role, key), None):
            kept.replica.send({"cancel": kept.serial, "role": role})

    def forget(self) -> None:
        """Drop what finished requests left in the caches."""
        for replica in self._replicas:
            replica.send({"forget": True})

    def processor_seconds(self) -> float:
        """Processor time that the processes have used so far; 0.0 where the system does not tell."""
        return sum(replica.processor_seconds() for replica in self._replicas)

    # --- inside -------------------------------------------------------------------------------------------------------------------

    def _check(self, request: Request, role: str) -> _Kept | None:
        """The kept parent, if there is one. UserError for what the engine there would refuse, as far as it can be known here."""
        if self.strategy and not role:
            refuse(request)
            return None
        kept = None if request.parent is None else self._kept.get((role, request.parent))
        if request.parent is not None and kept is None:
            raise UserError(f"parent {request.parent!r} is not a finished request that was kept")
        tokens = text.encode(self.tokenizer, request.prompt, special=kept is None)
        self.roles[role or "target"].check(request, kept.tokens + tokens if kept else tokens)
        return kept

    def _heard(self, timeout: float) -> Iterator[tuple[Replica, dict[str, Any] | None]]:
        """Messages of whoever has some; None once, when a replica has ended."""
        for ready, _ in self._ears.select(timeout):
            replica: Replica = ready.data
            messages = replica.read()
            if messages is None:
                self._ears.unregister(replica.process.stdout)
                yield replica, None
            yield from ((replica, message) for message in messages or ())

    def _listen(self, timeout: float) -> None:
        for replica, message in self._heard(timeout):
            if message is None:
                self._lose(replica)
            elif "refused" in message:
                asked = self._done(message["refused"])
                self._errors.append(f"request {asked.request.id or asked.key}: {message['error']}")
            elif "error" in message:
                replica.said = message["error"]
            for document in (message or {}).get("events", ()):
                self._receive(wire.read(document))

    def _receive(self, event: Event) -> None:
        asked, result = self._asked.get(event.key), event.result  # type: ignore[call-overload]
        if asked is None:  # it was lost
            return
        if result is not None:
            serial = int(event.key)  # type: ignore[call-overload]
            self._done(serial)
            if asked.request.keep and not asked.unwanted and result.finish_reason != "cancelled":
                tokens = [*result.prompt_tokens, *result.tokens]
                self._kept[asked.role, asked.key] = _Kept(asked.replica, serial, tokens)
            result = _late(result, time.perf_counter() - asked.since - result.usage.seconds)
        self._news.setdefault(asked.role, []).append(replace(event, key=asked.key, result=result))

    def _done(self, serial: int) -> _Asked:
        asked = self._asked.pop(serial)
        del self._running[asked.role, asked.key]
        asked.replica.load -= asked.request.sampling.n
        return asked

    def _lose(self, replica: Replica) -> None:
        """A replica has ended: one error for all it was to answer."""
        self._replicas.remove(replica)
        how = replica.end()
        self._ended.append(how)
        self._kept = {name: kept for name, kept in self._kept.items() if kept.replica is not replica}
        self._give_up(how, [serial for serial, asked in self._asked.items() if asked.replica is replica])

    def _give_up(self, why: str, serials: Sequence[int]) -> None:
        if lost := [self._done(serial) for serial in serials]:
            names = ", ".join(str(asked.request.id or asked.key) for asked in lost[:5]) + (", …" if len(lost) > 5 else "")
            self._errors.append(f"{why}: request{'s' if len(lost) > 1 else ''} {names} {'are' if len(lost) > 1 else 'is'} lost")


class Role:
    """One model under the strategy of all replicas, as an engine."""

    def __init__(self, workers: Workers, role: str) -> None:
        self.workers, self.role, self.threads, self.limits = workers, role, workers.threads, workers.roles[role]

    @property
    def idle(self) -> bool:
        return self.workers.quiet(self.role)

    def add(self, key: Key, request: Request) -> None:
        self.workers.add(key, request, self.role)

    def step(self) -> list[Event]:
        return self.workers.step(self.role)

    def cancel(self, key: Key) -> None:
        self.workers.cancel(key, self.role)


def _sendable(request: Request) -> Any:
    for name in ("prompt", "sampling", "id"):
        try:
            wire.dump(getattr(request, name))
        except TypeError as error:
            raise UserError(f"{name}: it holds {error}, which cannot be sent to a worker process") from None
    return wire.dump(request)


def _late(result: Result, seconds: float) -> Result:
    """The result of a request that was on its way for so long besides."""
    usage = replace(result.usage, seconds=result.usage.seconds + seconds, ttft=result.usage.ttft + seconds)
    return replace(result, usage=usage, others=tuple(_late(other, seconds) for other in result.others))


# --- loading ----------------------------------------------------------------------------------------------------------------------


class Spread(Loaded):
    """A recipe that answers in several processes; as a context manager, or with `close`, it ends them."""

    engine: Workers

    def forget(self) -> None:
        self.engine.forget()

    def close(self) -> None:
        self.engine.close()

    def processor_seconds(self) -> float:
        return self.engine.processor_seconds()


def spread(recipe: Recipe, workers: str | int, *, threads: str | int, template: str, device: str, **options: Any) -> Spread:
    """`hasten.load` with workers: so many replicas, or one a NUMA node for "auto", and their tokenizer here."""
    began, there = time.perf_counter(), cpu.topology()
    count = _count(workers, there)
    _check_options(options, device)
    places = there.places(count)
    most = [there.threads(count, place) for place in places]
    if threads != "auto" and cpu.choose(threads) > min(most):
        raise UserError(f"threads={threads} in each of {count} workers: {min(most)} at most, for this process may use {there}")
    path, bound = hf.resolve(recipe.model), hasattr(os, "sched_setaffinity")
    options = {"memory": hf.spare_memory("cpu") // (4 * count), **options, "device": "cpu", "template": template}
    shared = {"recipe": recipe.to_json(), "threads": threads, "options": options}
    running = Workers([{**shared, "processors": place if bound else [], "most": n} for place, n in zip(places, most, strict=True)])
    running.tokenizer = hf.load_tokenizer(path)  # while they load
    running.wait()
    engines: dict[str, Any] = {role: Role(running, role) for role in running.roles} if running.strategy else {"target": running}
    return Spread(recipe, running, engines, running.tokenizer, template, time.perf_counter() - began)


def _count(workers: str | int, there: Topology) -> int:
    try:
        count = len(there.nodes) if workers == "auto" else int(workers)
    except ValueError:
        raise UserError(f"workers={workers!r}: must be 'auto' or a whole number") from None
    if not 1 <= count <= there.cores:
        raise UserError(f"workers={count}: must lie between 1 and {there.cores}, for this process may use {there}")
    return count


def _check_options(options: Mapping[str, Any], device: str) -> None:
    for name, value in options.items():
        if not isinstance(value, str | int | float | None):
            what = f"{name}=<{type(value).__name__}>: a Python object cannot be sent to worker processes"
            raise UserError(f"{what}; name what it does in the recipe, or load without workers")
    if (hf.best_device() if device == "auto" else device) != "cpu":
        raise UserError("workers are replicas on processors, and this device is none: load with device='cpu', or without workers")
