"""Measuring recipes: quality at a high batch, cost as a user at the stated concurrency would see it.

Results never depend on what else is in a batch (counter-based randomness), so quality is measured with many requests at once. Cost is
measured in a closed loop, in blocks that go round robin over the recipes compared, the same requests for all, so that a slow moment of
the machine hits all of them; each block begins with a warm-up that is not counted. Nothing here knows which technique it measures.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hasten import load as loading
from hasten import rng, techniques
from hasten.measure import stats
from hasten.measure.energy import EnergyMeter
from hasten.measure.loop import Timed, closed_loop
from hasten.measure.machine import Contention, machine
from hasten.measure.outcomes import Outcome, Outcomes
from hasten.measure.progress import Silent
from hasten.measure.tasks import Item, Task, grade, load_task, stated
from hasten.recipe import Recipe, load_recipe
from hasten.usage import Usage
from hasten.values import Request, UserError

QUALITY_ROWS = 128  # requests at once where only the answers matter
COSTS = ("seconds", "ttft", "tpot", "tokens", "forwards", "flops", "bytes", "joules", "peak_bytes")
TAILS = ("p95_ttft", "p95_tpot")
KL_TOKENS = 64


@dataclass
class Bench:
    """What all measurements of one run share. outcomes: what is known already. concurrency: requests in flight where cost is measured."""

    task: Task
    outcomes: Outcomes = field(default_factory=Outcomes)
    concurrency: int = 1
    template: str = "auto"
    device: str = "auto"
    dtype: str = "auto"
    progress: Silent = field(default_factory=Silent)
    models: loading.Models = field(default_factory=loading.Models)
    machine: dict[str, Any] = field(default_factory=machine)

    def load(self, recipe: Recipe) -> loading.Loaded:
        """A fresh engine with an empty cache, so that no prompt is found there from an earlier block; the models are shared."""
        return loading.load(recipe, device=self.device, dtype=self.dtype, template=self.template, models=self.models, max_rows=QUALITY_ROWS)

    def key(self, recipe: Recipe, *more: Any) -> str:
        """Names everything an outcome depends on: recipe, models' contents, task, machine, precision."""
        parts = [recipe.fingerprint, models_of(recipe), self.task.fingerprint, self.machine, self.template, self.device, self.dtype, more]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def models_of(recipe: Recipe) -> list[str]:
    """Fingerprints of the directories a recipe reads, so that a model trained anew is measured anew."""
    from hasten import hf
    from hasten.artifact import model_fingerprint

    paths = [Path(hf.resolve(source)) for source in sources(recipe)]
    return [model_fingerprint(path) if path.is_dir() else str(path) for path in paths]


def sources(recipe: Recipe) -> list[str]:
    """The models a recipe needs: its own and its techniques'."""
    asked = [(techniques.module_of(use.name), techniques.options_for(use)) for use in recipe.uses]
    return [recipe.model, *(s for module, options in asked if hasattr(module, "roles") for s in module.roles(options).values())]


def measure(
    recipes: Sequence[str | Recipe], *, task: str | Path | Task = "arith", split: str = "test", items: int = 200, cost_items: int = 16,
    concurrency: int = 1, out: str | Path | None = None, template: str = "auto", device: str = "auto", dtype: str = "auto",
    progress: Silent | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Measure recipes on the first `items` of a split, their cost on `cost_items` of them; appends to OUT/measurements.jsonl.

    Returns one measurement (see `measurement`) a recipe, in order. UserError says what cannot be measured.
    """
    parsed = [recipe if isinstance(recipe, Recipe) else load_recipe(recipe) for recipe in recipes]
    folder = None if out is None else Path(out)
    asked = task if isinstance(task, Task) else load_task(task)
    bench = Bench(
        asked, Outcomes(folder and folder / "outcomes.jsonl"), concurrency, template, device, dtype, progress or Silent()
    )  # fmt: skip
    chosen = asked.items[split][:items]
    announce_template(bench, parsed[0])
    run_costs(bench, parsed, chosen[:cost_items])
    done = []
    for recipe in parsed:
        done.append(measurement(bench, recipe, chosen, run_quality(bench, recipe, chosen)))
        bench.progress.line(summary(done[-1]))
        if folder is not None:
            from hasten.measure.outcomes import append_line

            append_line(folder / "measurements.jsonl", done[-1])
    return done


def announce_template(bench: Bench, recipe: Recipe) -> None:
    """Say whether the task's prompts go through a chat template."""
    if bench.load(Recipe(recipe.model)).templated:
        bench.progress.line("prompts go through the tokenizer's chat template as a user's message (--template off stops it)")


# --- asking ---------------------------------------------------------------------------------------------------------------------------


def requests(bench: Bench, loaded: loading.Loaded, items: Iterable[Item], **changes: Any) -> Iterator[tuple[str, Request]]:
    """One request an item. Each item has its own random stream, so that items are independent samples."""
    base = bench.task.sampling.but(**changes)
    room = max(1, loaded.engines["target"].cache.max_len // 2)  # a short model still gets room for its prompts
    limit = min(base.max_tokens or room, room)
    for item in items:
        seed = rng.key(base.seed, bench.task.name, item.id) >> 1
        yield item.id, Request(loaded.ask(item.prompt), base.but(seed=seed, max_tokens=limit), id=item.id)


def digest(tokens: Sequence[int]) -> str:
    """A few characters that tell two token sequences apart."""
    return f"{zlib.crc32(json.dumps(list(tokens)).encode()):08x}"


# --- quality --------------------------------------------------------------------------------------------------------------------------


def run_quality(bench: Bench, recipe: Recipe, items: Sequence[Item]) -> list[float]:
    """Score of each item, in order; what is not known yet is asked, many requests at once, and kept."""
    twin = equivalent(bench, recipe, items)
    key = bench.key(twin)
    missing = [item for item in items if item.id not in bench.outcomes.of(key, "quality")]
    if missing:
        answered = _answered(bench, twin, missing)
        for done, (item, outcome) in enumerate(answered, 1):
            bench.outcomes.add(key, "quality", item.id, outcome)
            bench.progress.bar(f"quality of {twin}", done, len(missing))
    known = bench.outcomes.of(key, "quality")
    return [known[item.id]["score"] for item in items]


def _answered(bench: Bench, recipe: Recipe, items: Sequence[Item]) -> Iterator[tuple[Item, Outcome]]:
    graded = {item.id: item for item in _with_answers(bench, recipe.model, items)}
    loaded = bench.load(recipe)
    for timed in closed_loop(loaded.engine, requests(bench, loaded, items), QUALITY_ROWS):
        item = graded[str(timed.key)]
        yield item, {"score": grade(item, timed.result, bench.task), "digest": digest(timed.result.tokens)}


def equivalent(bench: Bench, recipe: Recipe, items: Sequence[Item]) -> Recipe:
    """The recipe whose answers are this one's: without the parts that promise identical tokens, unless the cost run has seen them differ.

    Greedy with and without speculation is thus graded once. Nothing is taken on trust: without a comparison, the recipe is its own.
    """
    twin = Recipe(recipe.model, tuple(use for use in recipe.uses if techniques.technique(use.name).exactness != "identical"))
    mine, its = (bench.outcomes.of(bench.key(r, bench.concurrency), "cost") for r in (recipe, twin))
    shared = [item.id for item in items if item.id in mine and item.id in its]
    return twin if shared and all(mine[i]["digest"] == its[i]["digest"] for i in shared) else recipe


def _with_answers(bench: Bench, model: str, items: Sequence[Item]) -> Sequence[Item]:
    """The items, with what the unmodified model says in the answers' place where there are none."""
    if bench.task.quality != "agreement":
        return items
    plain = Recipe(model)
    key = bench.key(plain)
    missing = [item for item in items if item.id not in bench.outcomes.of(key, "reference")]
    if missing:
        loaded = bench.load(plain)
        for timed in closed_loop(loaded.engine, requests(bench, loaded, missing), QUALITY_ROWS):
            bench.outcomes.add(key, "reference", str(timed.key), {"text": timed.result.text})
    known = bench.outcomes.of(key, "reference")
    return [dataclasses.replace(item, answer=stated(known[item.id]["text"])) for item in items]


def divergence(bench: Bench, recipe: Recipe, items: Sequence[Item]) -> stats.Estimate:
    """KL divergence of the recipe's next-token distribution from the unmodified model's, in nats a token.

    Monte Carlo: the unmodified model draws an answer at temperature 1, both score it, and the mean difference of log-probabilities is
    an unbiased estimate of KL(unmodified || recipe) along the unmodified model's own answers.
    """
    plain = bench.load(Recipe(recipe.model))
    room = min(KL_TOKENS, bench.task.sampling.max_tokens)
    drawn = [t.result for t in closed_loop(plain.engine, requests(bench, plain, items, temperature=1.0, max_tokens=room), QUALITY_ROWS)]
    texts = [((*r.prompt_tokens, *r.tokens), len(r.prompt_tokens)) for r in drawn if r.tokens]
    before, after = (_scores(engines["target"], texts) for engines in (plain.engines, bench.load(recipe).engines))
    return stats.mean([float(np.mean(np.subtract(b, a))) for b, a in zip(before, after, strict=True)])


def _scores(engine: Any, texts: Sequence[tuple[tuple[int, ...], int]]) -> list[Sequence[float]]:
    asked = ((i, Request(ids, score=True, score_from=start)) for i, (ids, start) in enumerate(texts))
    scores = {timed.key: timed.result.scores or () for timed in closed_loop(engine, asked, QUALITY_ROWS)}
    return [scores[i] for i in range(len(texts))]


# --- cost -----------------------------------------------------------------------------------------------------------------------------


def run_costs(bench: Bench, recipes: Sequence[Recipe], items: Sequence[Item]) -> None:
    """Cost of the items under each recipe, in blocks that go round the recipes; what is known already is not repeated."""
    size = max(2, 2 * bench.concurrency)
    blocks = [items[i : i + size] for i in range(0, len(items), size)]
    total, done = len(blocks) * len(recipes), 0
    for turn, block in enumerate(blocks):
        for i in range(len(recipes)):
            recipe = recipes[(i + turn) % len(recipes)]  # another one goes first in each round
            run_block(bench, recipe, block)
            done += 1
            bench.progress.bar(f"cost of {recipe}", done, total)


def run_block(bench: Bench, recipe: Recipe, block: Sequence[Item]) -> None:
    """One timed block of one recipe, after a warm-up with other prompts."""
    key = bench.key(recipe, bench.concurrency)
    if all(item.id in bench.outcomes.of(key, "cost") for item in block):
        return
    loaded = bench.load(recipe)
    asked = {item.id for item in block}
    spare = [item for items in bench.task.items.values() for item in items[-2 * len(block) :] if item.id not in asked]
    for _ in closed_loop(loaded.engine, requests(bench, loaded, spare[: bench.concurrency] or block[:1]), bench.concurrency):
        pass
    with Contention() as watch, EnergyMeter() as energy:
        timed = list(closed_loop(loaded.engine, requests(bench, loaded, block), bench.concurrency))
    joules = None if energy.joules is None else energy.joules / len(timed)
    for one in timed:
        shared = {"joules": joules, "contended": watch.contended, "others": round(watch.others, 3)}
        bench.outcomes.add(key, "cost", str(one.key), {**ledger(one), **shared})


def ledger(timed: Timed) -> Outcome:
    """What one request cost, all its samples and all roles together, and by role."""
    results = (timed.result, *timed.result.others)
    usage = timed.result.usage
    by_role = {role: dataclasses.asdict(cost) for role, cost in _costs(r.usage for r in results).items()}
    counts = {name: sum(cost[field] for cost in by_role.values()) for name, field in _COUNTS.items()}
    times = {"seconds": timed.seconds, "ttft": usage.ttft, "tpot": usage.tpot}
    peak = max(r.usage.peak_bytes for r in results)
    return {**times, **counts, "peak_bytes": peak, "by_role": by_role, "digest": digest(timed.result.tokens)}


_COUNTS = {"tokens": "generated", "forwards": "forwards", "flops": "flops", "bytes": "bytes"}


def _costs(usages: Iterable[Usage]) -> Mapping[str, Any]:
    from hasten.usage import add_costs

    return add_costs(usages)


# --- the document ---------------------------------------------------------------------------------------------------------------------


def measurement(bench: Bench, recipe: Recipe, items: Sequence[Item], scores: Sequence[float], split: str = "") -> dict[str, Any]:
    """The JSON document of one recipe on one workload and machine. Costs are means a request over the items they were measured on.

    cost.seconds is wall time from asking to the result with `concurrency` requests in flight; tokens are those generated, all samples and
    roles together; ci holds 95 % intervals. contended: something else used the machine during half of the timed requests or more.
    """
    known = bench.outcomes.of(bench.key(recipe, bench.concurrency), "cost")
    seen = [known[item.id] for item in items if item.id in known]
    if not seen:
        raise UserError(f"{recipe}: its cost was not measured on any of the items that its quality was measured on")
    estimate = stats.mean(scores)
    quality = {"name": bench.task.quality, "value": estimate.value, "ci": [estimate.low, estimate.high], "n": estimate.n}
    if bench.task.quality == "agreement":
        kl = divergence(bench, recipe, items[:16])
        quality["kl"] = {"value": kl.value, "ci": [kl.low, kl.high], "n": kl.n}
    return {
        "recipe": recipe.to_json(),
        "recipe_text": str(recipe),
        "task": bench.task.name,
        "quality": quality,
        "cost": cost_document(seen, bench.concurrency),
        "machine": bench.machine,
        "contended": sum(o["contended"] for o in seen) * 2 >= len(seen),
    }


def cost_document(seen: Sequence[Outcome], concurrency: int) -> dict[str, Any]:
    """Means of the requests' costs with intervals, tails, and the counts by role."""
    known = {name: [o[name] for o in seen] for name in COSTS if all(o.get(name) is not None for o in seen)}
    means = {name: float(np.mean(known[name])) if name in known else None for name in COSTS}
    means["peak_bytes"] = max(o["peak_bytes"] for o in seen)
    tails = {tail: float(np.quantile(known[tail.removeprefix("p95_")], 0.95)) for tail in TAILS}
    intervals = {name: list(_interval(known[name])) for name in ("seconds", "flops", "tokens", "bytes")}
    roles = sorted({role for o in seen for role in o["by_role"]})
    by_role = {role: _mean_by_role([o["by_role"].get(role, {}) for o in seen]) for role in roles}
    extra = {"ci": intervals, "concurrency": concurrency, "n": len(seen)}
    reason = {} if means["joules"] is not None else {"joules_reason": EnergyMeter().reason}
    return {**means, "by_role": by_role, **tails, **extra, **reason}


def _interval(values: Sequence[float]) -> tuple[float, float]:
    estimate = stats.mean(values)
    return estimate.low, estimate.high


def _mean_by_role(costs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    names = next((list(cost) for cost in costs if cost), [])
    return {name: sum(cost.get(name, 0) for cost in costs) / len(costs) for name in names}


def summary(m: Mapping[str, Any]) -> str:
    """One line of a measurement for people."""
    quality, cost = m["quality"], m["cost"]
    spread = (quality["ci"][1] - quality["ci"][0]) / 2
    busy = "  (machine in use)" if m["contended"] else ""
    return (
        f"{100 * quality['value']:5.1f} ± {100 * spread:4.1f} % {quality['name']} of {quality['n']}   "
        f"{cost['seconds']:8.3f} s   {cost['tokens']:7.1f} tokens   {cost['flops'] / 1e6:9.1f} MFLOP   {m['recipe_text']}{busy}"
    )
