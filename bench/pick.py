"""Is what `hasten pick` picks right? The main job, then every candidate on the whole test set.

    python bench/pick.py [--items 2000] [--out DIR]

Runs `hasten pick` as a newcomer does (a process of its own: time to the first line that shows a measurement, and to the end), then answers
the test items with every recipe that was considered, and times each in blocks taken in turn. Samples are drawn once and shared between
recipes that ask for the same ones, which changes no answer. The last line of stdout is one JSON document.

bars: first result within 60 s; whole run within 5 minutes; the picked recipe's quality within 2 points of the best inside the budget as
measured here; better than greedy of the largest model at the same price, the interval excluding zero.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from hasten.engine import Engine
from hasten.measure.candidates import candidates
from hasten.measure.machine import Watch, describe
from hasten.measure.measure import Silent, make_setting, time_blocks
from hasten.measure.pick import applying
from hasten.measure.trial import Setting, Trial, difference, slowdown
from hasten.recipe import Recipe
from hasten.techniques import technique
from hasten.values import Event, Key, Request, Result

BLOCKS = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--items", type=int, default=2000, help="test items that every recipe answers")
    parser.add_argument("--out", default="", help="directory to keep, and to go on from (default: a temporary one)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch, Watch() as watch:
        out = Path(args.out or scratch)
        times = run_pick(out / "pick")
        document = json.loads((out / "pick" / "document.json").read_text())
        found = exhaustive(document, out / "all", args.items)
    found |= {"times": times, "machine": describe(), "contended": watch.contended, "settings": vars(args)}
    print(json.dumps({"bench": "pick", "bars": bars(found), **found}))


def run_pick(out: Path) -> dict[str, float]:
    """Seconds to the first measured line and to the end of `hasten pick`; its JSON goes to document.json."""
    out.mkdir(parents=True, exist_ok=True)
    began, first = time.monotonic(), 0.0
    command = [sys.executable, "-m", "hasten", "pick", "--json", "--out", str(out)]
    with (out / "document.json").open("w") as file, subprocess.Popen(command, stdout=file, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr or ():
            say(line.rstrip())
            if not first and "accuracy" in line and " s  " in line:
                first = time.monotonic() - began
    if process.returncode:
        raise SystemExit(f"hasten pick ended with {process.returncode}")
    return {"first": first, "whole": time.monotonic() - began}


def exhaustive(document: dict[str, Any], out: Path, items: int) -> dict[str, Any]:
    """Quality on test items and seconds of every recipe; the best inside the baseline's seconds; how the picked one compares."""
    setting = make_setting(None, 1, str(out), "auto", "auto", "auto")
    plain = candidates(None).baseline
    plan = candidates(None, speedups=applying(setting, plain, Silent()))
    picked = Recipe.from_json(document["picked"]["recipe"])
    recipes = list(dict.fromkeys([plan.baseline, *plan.all, picked]))
    trials = {recipe: Trial(recipe, setting, "test") for recipe in recipes}
    answer_all(setting, trials, items)
    time_blocks([*trials.values()], range(BLOCKS), Silent())
    rows = [row(trial, trials[plan.baseline]) for trial in trials.values()]
    for line in sorted(rows, key=lambda r: r["price"]):
        say(f"{line['accuracy']:6.1%}  {line['price']:6.3f} times greedy's seconds  {line['recipe']}")
    inside = [r for r in rows if r["price"] <= 1]
    best = max(inside, key=lambda r: r["accuracy"])
    mine = next(r for r in rows if r["recipe"] == str(picked))
    gain = difference(trials[picked], trials[plan.baseline], trials[plan.baseline].outcomes)
    return {"picked": mine, "best": best, "gain": {"value": gain.value, "ci": [gain.low, gain.high], "n": gain.n}, "recipes": rows}


def row(trial: Trial, baseline: Trial) -> dict[str, Any]:
    price = slowdown(trial, baseline)
    quality = trial.measurement(baseline.outcomes)["quality"]
    return {
        "recipe": str(trial.recipe),
        "accuracy": quality["value"],
        "ci": quality["ci"],
        "price": price.value,
        "price_ci": [price.low, price.high],
    }


def answer_all(setting: Setting, trials: dict[Recipe, Trial], items: int) -> None:
    """Every recipe's answers. Decode techniques change no answer, so a recipe shares those of its twin without one."""
    memory: dict[str, dict[Any, Result]] = {}
    for recipe, trial in trials.items():
        twin = Recipe(recipe.model, tuple(u for u in recipe.uses if technique(u.name).slot != "decode"))
        if twin in trials and twin != recipe:
            trial.outcomes = trials[twin].outcomes
            continue
        loaded = trial.loaded
        for role, engine in loaded.engines.items():
            model = recipe.model if role == "target" else role
            loaded.engines[role] = Memo(engine, memory.setdefault(model, {}))  # type: ignore[assignment]
        if hasattr(loaded.engine, "engines"):
            loaded.engine.engines.update(loaded.engines)
        else:
            loaded.engine = loaded.engines["target"]
        say(f"answering: {recipe}")
        trial.answer(setting.task.items["test"][:items])
        trial.close()


class Memo:
    """An engine that remembers: the same request of the same sample has the same answer, by contract."""

    def __init__(self, engine: Engine, known: dict[Any, Result]) -> None:
        self.engine, self.known = engine, known
        self.events: list[Event] = []
        self.asked: dict[Key, Any] = {}

    @property
    def idle(self) -> bool:
        return not self.events and self.engine.idle

    def add(self, key: Key, request: Request) -> None:
        prompt = request.prompt if isinstance(request.prompt, str) else tuple(request.prompt)
        name = (prompt, repr(request.sampling), request.sample, request.score, request.score_from)
        if name in self.known:
            self.events.append(Event(key, result=self.known[name]))
        else:
            self.asked[key] = name
            self.engine.add(key, request)

    def step(self) -> list[Event]:
        ready, self.events = self.events, []
        for event in [] if self.engine.idle else self.engine.step():
            if event.result is not None:
                name = self.asked.pop(event.key, None)
                if name is not None and event.result.finish_reason != "cancelled":
                    self.known[name] = event.result
            ready.append(event)
        return ready

    def cancel(self, key: Key) -> None:
        self.engine.cancel(key)


def bars(found: dict[str, Any]) -> dict[str, Any]:
    gap = found["best"]["accuracy"] - found["picked"]["accuracy"]
    return {
        "first result <= 60 s": {"measured": found["times"]["first"], "met": 0 < found["times"]["first"] <= 60},
        "whole run <= 300 s": {"measured": found["times"]["whole"], "met": found["times"]["whole"] <= 300},
        "within 0.02 of the best inside the budget": {"measured": gap, "met": gap <= 0.02},
        "gain over greedy at its price, interval above 0": {"measured": found["gain"]["ci"][0], "met": found["gain"]["ci"][0] > 0},
        "picked is inside the budget": {"measured": found["picked"]["price"], "met": found["picked"]["price_ci"][0] <= 1},
    }


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
