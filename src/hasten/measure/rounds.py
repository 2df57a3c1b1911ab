"""Successive halving (Jamieson and Talwalkar 2016): all candidates answer a few items, the better ones more, the best the most.

A candidate is dropped only when it is hopeless: the interval of its paired difference to the leader lies below zero, or it costs far more
than the budget. Whatever was measured stays on the books: in the report, and for a run that goes on later.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hasten.measure import pareto, stats
from hasten.measure.candidates import Candidates
from hasten.measure.measure import Progress, answer, block_items
from hasten.measure.tasks import Item
from hasten.measure.trial import Setting, Trial, difference
from hasten.recipe import Recipe
from hasten.values import UserError

ITEMS = (24, 80, 300)  # items that a candidate of each round has answered
BLOCKS = (1, 4, 10)  # blocks of timed requests after each round
KEPT = (8, 5, 5)  # candidates that leave each round, the baseline apart
SHARES = (0.45, 0.7, 1.0)  # of the time there is, at the end of each round
REACH = 1.5  # times the budget: what is dearer is not followed, as no decode technique is expected to make up for more


@dataclass
class Run:
    """One run of `pick`: its trials by recipe, and its aim. fixed: whether the user named the budget; else it is the baseline's seconds."""

    setting: Setting
    plan: Candidates
    progress: Progress
    budget: dict[str, float]
    targets: Mapping[str, float]
    fixed: bool
    seconds: float = float("inf")  # for all rounds
    began: float = field(default_factory=time.monotonic)
    deadline: float = float("inf")  # of the round, on the monotonic clock; after it only the baseline is measured
    trials: dict[Recipe, Trial] = field(default_factory=dict)
    _shown: dict[Recipe, tuple[int, int]] = field(default_factory=dict)

    @property
    def baseline(self) -> Trial:
        return self.trials[self.plan.baseline]

    @property
    def axis(self) -> str:
        """The cost that decides between equals: the first budget's."""
        return next(iter(self.budget), "seconds")

    @property
    def late(self) -> bool:
        return time.monotonic() > self.deadline

    def measurement(self, trial: Trial) -> dict[str, Any]:
        return trial.measurement(self.baseline.outcomes)

    def measured(self, trials: Sequence[Trial] | None = None) -> list[dict[str, Any]]:
        """Measurements of the trials (all) that have both a quality and a cost."""
        among = list(self.trials.values()) if trials is None else trials
        return [self.measurement(t) for t in among if t.outcomes and t.times and not t.refused]

    def trial(self, measurement: pareto.Measurement) -> Trial:
        return next(t for t in self.trials.values() if str(t.recipe) == measurement["recipe_text"])

    def difference(self, a: pareto.Measurement, b: pareto.Measurement) -> stats.Estimate:
        """Quality of a minus quality of b, paired over items."""
        return difference(self.trial(a), self.trial(b), self.baseline.outcomes)


def halve(run: Run) -> None:
    """All rounds. After the first, survivors are joined by their twins with other decode techniques."""
    alive = start(run, run.plan.first)
    for number in range(len(ITEMS)):
        run.deadline = run.began + SHARES[number] * run.seconds
        alive = sweep(run, alive, number)
        alive = survivors(run, alive, KEPT[number])
        if number == 0:
            alive += start(run, [twin for trial in alive for twin in run.plan.twins(trial.recipe) if twin not in run.trials])


def start(run: Run, recipes: Sequence[Recipe]) -> list[Trial]:
    """Trials of recipes; each knows what an earlier run measured."""
    for recipe in recipes:
        run.trials[recipe] = Trial(recipe, run.setting)
    return [run.trials[recipe] for recipe in recipes]


def sweep(run: Run, alive: Sequence[Trial], number: int) -> list[Trial]:
    """One round of measuring. What cannot run here is refused, with the reason; what is left when the time is up is not measured."""
    items = run.setting.task.items["calibration"][: ITEMS[number]]
    (opening if number == 0 else interleaved)(run, alive, items, number)
    if run.late:
        run.progress.log(f"time is up in round {number + 1}: what is left of it is not measured")
    return [trial for trial in alive if not trial.refused]


def opening(run: Run, alive: Sequence[Trial], items: Sequence[Item], number: int) -> None:
    """The first round goes recipe by recipe, so that each line comes as soon as it can; what is far over the budget is answered last."""
    for done, trial in enumerate([run.baseline, *(t for t in alive if t is not run.baseline)], 1):
        attempt(run, trial, lambda t=trial: t.time(0, block_items(t, 0)))  # type: ignore[misc]
        set_budget(run)
        if near(run, trial):
            attempt(run, trial, lambda t=trial: answer(t, items, run.progress))  # type: ignore[misc]
            show(run, trial)
        run.progress.update("round 1", done, len(alive))
    for trial in alive:
        attempt(run, trial, lambda t=trial: answer(t, items, run.progress))  # type: ignore[misc]
        show(run, trial)


def interleaved(run: Run, alive: Sequence[Trial], items: Sequence[Item], number: int) -> None:
    """Later rounds time one block of every recipe before the next block of any: what is compared was measured side by side."""
    steps = [(trial, block) for block in range(BLOCKS[number]) for trial in alive]
    for done, (trial, block) in enumerate(steps, 1):
        attempt(run, trial, lambda t=trial, b=block: t.time(b, block_items(t, b)))  # type: ignore[misc]
        run.progress.update(f"cost, round {number + 1}", done, len(steps))
    set_budget(run)
    for trial in sorted(alive, key=lambda t: not near(run, t)):
        attempt(run, trial, lambda t=trial: answer(t, items, run.progress))  # type: ignore[misc]
        show(run, trial)


def attempt(run: Run, trial: Trial, work: Callable[[], None]) -> None:
    """Do a piece of work unless the trial was refused or the time is up; a UserError refuses the trial (the baseline: ends the run)."""
    if trial.refused or (run.late and trial is not run.baseline):
        return
    try:
        work()
    except UserError as error:
        if trial is run.baseline:
            raise
        trial.refused = str(error)
        run.progress.log(f"not here: {error}")


def show(run: Run, trial: Trial) -> None:
    """One line, and one entry in measurements.jsonl, for what was measured anew."""
    size = (len(trial.outcomes), len(trial.times))
    if trial.refused or not all(size) or run._shown.get(trial.recipe) == size:
        return
    run._shown[trial.recipe] = size
    found = run.measurement(trial)
    run.setting.store.publish(found)
    run.progress.log(line(found))


def line(found: pareto.Measurement) -> str:
    """A measurement in one line: quality with its interval, seconds, recipe."""
    quality, (low, high) = found["quality"], found["quality"]["ci"]
    interval = f"[{low:6.1%}, {high:6.1%}]  n={quality['n']:<4d}"
    return f"{quality['name']} {quality['value']:6.1%}  {interval} {found['cost']['seconds']:8.3f} s  {found['recipe_text']}"


def set_budget(run: Run) -> None:
    """Where the user named neither budget nor target: what the baseline is measured to cost, the better known the later the round."""
    if not run.fixed and run.baseline.times:
        run.budget = {"seconds": float(run.measurement(run.baseline)["cost"]["seconds"])}


def survivors(run: Run, alive: Sequence[Trial], most: int) -> list[Trial]:
    """The baseline, and at most `most` others: not far over the budget and not hopeless, the most promising first."""
    affordable = [t for t in alive if t.outcomes and t is not run.baseline and near(run, t)]
    promising = towards_target(run, affordable) if run.targets else towards_best(run, affordable)
    return [run.baseline, *promising[:most]]


def towards_best(run: Run, trials: Sequence[Trial]) -> list[Trial]:
    """Those not shown to be worse than the leader, highest upper bound of quality first."""
    fitting = [m for m in run.measured([run.baseline, *trials]) if pareto.inside(m, run.budget)]
    leader = run.trial(max(fitting, key=pareto.quality)) if fitting else None
    hopeful = [t for t in trials if leader is None or difference(t, leader, run.baseline.outcomes).high >= 0]
    return sorted(hopeful, key=lambda t: -run.measurement(t)["quality"]["ci"][1])


def towards_target(run: Run, trials: Sequence[Trial]) -> list[Trial]:
    """Those that may still reach the target, cheapest first."""
    measured = [m for m in run.measured(trials) if m["quality"]["ci"][1] >= max(run.targets.values())]
    return [run.trial(m) for m in sorted(measured, key=lambda m: pareto.cost(m, run.axis))]


def near(run: Run, trial: Trial) -> bool:
    """Whether a trial costs at most `REACH` times the budget, as far as is known."""
    measured = run.measurement(trial)
    return not trial.times or all(pareto.cost(measured, axis) <= REACH * most for axis, most in run.budget.items())
