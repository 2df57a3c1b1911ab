"""One recipe under test: it answers items for quality at full batch, and again, at the stated concurrency, for cost.

The two are apart because answers do not depend on what else is in a batch (randomness is counter-based) while seconds do. Costs come
from a closed loop: as soon as a request is answered the next is sent, so `concurrency` are always in flight (Schroeder et al., NSDI 2006).
A timed request is never one whose prompt the engine has seen, so nothing is found in its cache that a first visitor would not find.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from hasten import hf
from hasten.artifact import model_fingerprint
from hasten.engine import Engine
from hasten.load import Loaded
from hasten.measure import quality, stats
from hasten.measure.energy import EnergyMeter
from hasten.measure.machine import Watch
from hasten.measure.quality import Outcome
from hasten.measure.store import Store
from hasten.measure.tasks import Item, Task
from hasten.recipe import Recipe
from hasten.usage import Usage
from hasten.values import Key, Request, Result

IN_FLIGHT = 64  # requests in flight when quality is measured
Load = Callable[[Recipe], Loaded]


@dataclass
class Setting:
    """What all trials of a run share. machine: as `machine.describe` says; `stamp` names all that a measurement depends on but the recipe."""

    task: Task
    load: Load
    store: Store
    machine: Mapping[str, Any]
    concurrency: int = 1
    stamp: str = ""


@dataclass
class Trial:
    """One recipe and what is known of it. `refused` says why it cannot run here. reference: outcomes that unanswered items are compared with.
    startup: seconds spent before it could answer, in this process (see `Loaded.startup`).
    """

    recipe: Recipe
    setting: Setting
    split: str = "calibration"
    refused: str = ""
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    times: list[dict[str, Any]] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    startup: dict[str, float] = field(default_factory=dict)
    _loaded: Loaded | None = None

    def __post_init__(self) -> None:
        for line in self.setting.store.answered(self.key):
            self.outcomes[line["item"]] = Outcome(line["item"], line["value"], tuple(line.get("tokens", ())))
        self.times = list(self.setting.store.timed(self.key))

    @cached_property
    def key(self) -> str:
        """Names the recipe, the task and the machine: what a measurement may be reused for."""
        text = "|".join((self.recipe.fingerprint, *weights(self.recipe), self.setting.task.digest, self.split, self.setting.stamp))
        return hashlib.sha256(text.encode()).hexdigest()[:20]

    @property
    def loaded(self) -> Loaded:
        if self._loaded is None:
            self._loaded = self.setting.load(self.recipe)
        return self._loaded

    def close(self) -> None:
        """Let go of the engines, with their caches (the weights are shared between trials)."""
        self._started()
        self._loaded = None

    def _started(self) -> dict[str, float]:
        for what, seconds in self._loaded.startup.items() if self._loaded else ():
            self.startup[what] = max(seconds, self.startup.get(what, 0.0))
        return self.startup

    def answer(self, items: Sequence[Item], done: Callable[[int], None] = lambda n: None) -> None:
        """Answer the items that are not answered yet; each is kept as soon as it is there."""
        missing = {item.id: item for item in items if item.id not in self.outcomes}
        done(len(items) - len(missing))
        if not missing:
            return
        requests = (self._request(item) for item in missing.values())
        for key, result in closed_loop(self.loaded.engine, requests, IN_FLIGHT):
            outcome = quality.outcome(missing[str(key)], result, self.setting.task)
            self.outcomes[outcome.item] = outcome
            self.setting.store.keep("answer", self.key, outcome.to_json())
            done(sum(item.id in self.outcomes for item in items))

    def time(self, block: int, items: Sequence[Item]) -> None:
        """Time one block of requests, unless it was timed before. The first block of a fresh engine is preceded by an untimed request."""
        if any(line["block"] == block for line in self.times):
            return
        if self._loaded is None:
            warm = [self._request(item) for item in items[: self.setting.concurrency]]
            list(closed_loop(self.loaded.engine, warm, self.setting.concurrency))
            self.close()  # a fresh cache: the next requests are first visitors
        with EnergyMeter() as energy, Watch(children=self.loaded.processor_seconds) as watch:
            requests = [self._request(item) for item in items]
            results = dict(closed_loop(self.loaded.engine, requests, self.setting.concurrency))
        joules = None if energy.joules is None else energy.joules / len(items)
        for key, result in results.items():
            line = {
                "block": block,
                "item": key,
                "joules": joules,
                "contended": watch.contended,
                "threads": self.loaded.threads,
                **plain_usage(result),
            }
            self.times.append(line)
            self.setting.store.keep("time", self.key, line)

    def _request(self, item: Item) -> tuple[Key, Request]:
        return item.id, self.setting.task.request(item, self.loaded.ask(item.prompt))

    def measurement(self, reference: Mapping[str, Outcome]) -> dict[str, Any]:
        """What is known of this recipe, as the measurement that `measure` prints and `pick` reads."""
        task, machine = self.setting.task, dict(self.setting.machine)
        machine |= {"threads": self.times[-1]["threads"]} if self.times and "threads" in self.times[-1] else {}
        return {
            "recipe": self.recipe.to_json(),
            "recipe_text": str(self.recipe),
            "task": task.name,
            "split": self.split,
            "quality": quality.summary(task.quality, self.outcomes, reference, self.kl),
            "cost": costs(settled(self.times)),
            "startup": dict(self._started()),
            "concurrency": self.setting.concurrency,
            "machine": machine,
            "contended": any(line["contended"] for line in self.times),
        }


def weights(recipe: Recipe) -> list[str]:
    """Fingerprints of the models a recipe names: what was measured of a model says nothing of one trained anew under the same name."""
    sources = [recipe.model, *(str(value) for use in recipe.uses for name, value in use.options.items() if name in ("reward", "model"))]
    paths = [Path(hf.resolve(source)) for source in sources]
    return [model_fingerprint(path) if path.is_dir() else str(path) for path in paths]


def closed_loop(engine: Engine, requests: Iterable[tuple[Key, Request]], in_flight: int) -> Iterator[tuple[Key, Result]]:
    """Results as they come, with `in_flight` requests in the engine while there are any left; whatever still runs at the end is cancelled."""
    waiting, running = iter(requests), set[Key]()
    try:
        while True:
            while len(running) < in_flight and (following := next(waiting, None)) is not None:
                engine.add(*following)
                running.add(following[0])
            if not running:
                return
            for event in engine.step():
                if event.result is not None:
                    running.discard(event.key)
                    yield event.key, event.result
    finally:
        for key in running:
            engine.cancel(key)


def settled(times: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The timed requests that count: the first block is a first look, taken when the others were not, and gives way to later ones."""
    return [line for line in times if line["block"] > 0] or list(times)


def plain_usage(result: Result) -> dict[str, Any]:
    """A request's ledger as plain JSON."""
    usage: Usage = result.usage
    total = usage.total
    return {
        "seconds": usage.seconds, "ttft": usage.ttft, "tpot": usage.tpot, "tokens": total.generated, "forwards": total.forwards,
        "flops": total.flops, "bytes": total.bytes, "peak_bytes": usage.peak_bytes, "by_role": {r: asdict(c) for r, c in usage.by_role.items()},
    }  # fmt: skip


_MEANS = ("seconds", "ttft", "tpot", "tokens", "forwards", "flops", "bytes")


def costs(times: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The `cost` of a measurement: means per request, 95th percentiles of the times, the peak of the memory, and the roles' own means."""
    if not times:
        return dict.fromkeys((*_MEANS, "joules", "peak_bytes")) | {"by_role": {}, "n": 0}
    out: dict[str, Any] = {name: float(np.mean([line[name] for line in times])) for name in _MEANS}
    out |= {f"p95_{name}": float(np.quantile([line[name] for line in times], 0.95)) for name in ("seconds", "ttft", "tpot")}
    joules = [line["joules"] for line in times]
    out["joules"] = None if None in joules else float(np.mean(joules))
    out["peak_bytes"] = max(line["peak_bytes"] for line in times)
    spread = stats.mean([line["seconds"] for line in times])
    return out | {"by_role": _by_role(times), "seconds_ci": [spread.low, spread.high], "n": len(times)}


def _by_role(times: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    roles = sorted({role for line in times for role in line["by_role"]})
    return {role: _mean_fields([line["by_role"].get(role, {}) for line in times]) for role in roles}


def _mean_fields(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    names = next(part.keys() for part in parts if part)
    return {name: float(np.mean([part.get(name, 0) for part in parts])) for name in names}


def slowdown(trial: Trial, baseline: Trial) -> stats.Estimate:
    """Median over paired blocks of this trial's mean seconds over the baseline's (1: as slow as the baseline)."""
    mine, theirs = (_block_seconds(t.times) for t in (trial, baseline))
    both = sorted(mine.keys() & theirs.keys())
    return stats.median_ratio([mine[b] for b in both], [theirs[b] for b in both])


def _block_seconds(times: Sequence[Mapping[str, Any]]) -> dict[int, float]:
    blocks: dict[int, list[float]] = {}
    for line in times:
        blocks.setdefault(line["block"], []).append(line["seconds"])
    return {block: float(np.mean(seconds)) for block, seconds in blocks.items()}


def difference(a: Trial, b: Trial, reference: Mapping[str, Outcome], level: float = stats.LEVEL) -> stats.Estimate:
    """Quality of a minus quality of b, paired over the items that both have answered."""
    ids = [i for i in a.outcomes if i in b.outcomes]
    return stats.paired_difference(quality.values(a.outcomes, reference, ids), quality.values(b.outcomes, reference, ids), level)
