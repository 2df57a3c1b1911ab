"""Pick the recipe that is worth most inside a budget, and show the evidence.

The winner is chosen on calibration items, then measured once more, beside the baseline, on test items that nothing was chosen on: the number
reported for it has no winner's curse. The rule of choice is in `pareto`, the saving of work in `rounds`.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hasten.measure import pareto, stats
from hasten.measure.candidates import SPEEDUPS, Candidates, candidates, describe, faster
from hasten.measure.measure import Progress, Silent, add_divergence, answer, block_items, make_setting
from hasten.measure.rounds import Run, halve, line
from hasten.measure.tasks import Task, load_task
from hasten.measure.trial import Setting, Trial, difference, slowdown
from hasten.recipe import Recipe, Use, save_recipe
from hasten.values import UserError, did_you_mean

CONFIRM, CONFIRM_BLOCKS = 500, 10  # test items, and blocks of timed requests, for the winner and the baseline
MINUTES = 3.0  # after which the run on the zoo measures no more candidates


def pick(
    source: str | None = None, *, task: str | Task | None = None, techniques: Sequence[str] = (), budgets: Mapping[str, float] | None = None,
    targets: Mapping[str, float] | None = None, lossless: bool = False, concurrency: int = 1, dry_run: bool = False, out: str = "hasten-out",
    template: str = "auto", device: str = "auto", dtype: str = "auto", threads: str | int = "auto", minutes: float | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Measure combinations on a source (None: the zoo) and pick the best inside the budgets, or the cheapest that reaches the targets.

    budgets: most that a request may cost, by an axis of `pareto.AXES`; none: what the baseline (greedy decoding of the largest model) costs in
    seconds. targets: least quality, by its name. threads: see `hasten.load`. minutes: measure no more candidates after this time (default: 3
    on the zoo, else none). Writes recipe.json, measurements.jsonl and report.html to `out`; returns {"picked", "baseline", "frontier",
    "measurements", "budget", "why", "out", "confirmation"}. A dry run returns {"candidates", "baseline_text", "why"}. UserError if nothing
    fits: it says what was nearest.
    """
    loaded = task if isinstance(task, Task) else load_task(task or "arith")
    check_names(budgets or {}, targets or {}, loaded)
    if dry_run:
        return planned(candidates(source, techniques, lossless, loaded.answered, [use for use in SPEEDUPS if not unfit(use)]))
    limit = minutes if minutes is not None else MINUTES if source is None else float("inf")
    setting = make_setting(loaded, concurrency, out, template, device, dtype, threads)
    baseline = candidates(source, techniques, lossless, loaded.answered).baseline
    plan = candidates(source, techniques, lossless, loaded.answered, applying(setting, baseline, progress or Silent()))
    run = Run(setting, plan, progress or Silent(), dict(budgets or {}), dict(targets or {}), bool(budgets or targets), 60 * limit)
    halve(run)
    document = evidence(run, chosen(run))
    document |= {"out": out, "command": command(source, task, techniques, budgets, targets, lossless, concurrency, threads)}
    write(document, Path(out))
    return document


def check_names(budgets: Mapping[str, float], targets: Mapping[str, float], task: Task) -> None:
    """UserError for a budget or target of an unknown name or an impossible amount."""
    for axis, most in budgets.items():
        if axis not in pareto.AXES:
            raise UserError(f"unknown budget {axis!r}{did_you_mean(axis, pareto.AXES)}")
        if not most > 0:
            raise UserError(f"budget {axis}={most:g}: must be more than 0")
    for name, least in targets.items():
        if name not in (task.quality, "quality"):
            raise UserError(f"unknown target {name!r}: the quality of task {task.name!r} is {task.quality!r}")
        if not 0 <= least <= 1:
            raise UserError(f"target {name}={least:g}: must lie between 0 and 1")


def planned(plan: Candidates) -> dict[str, Any]:
    """The document of a dry run: what would be measured, and why not where that is known before a model is loaded."""
    rows = describe(plan.all)
    lines = [f"  {row['recipe_text']}" + (f"   not here: {row['why_not']}" if row["why_not"] else "") for row in rows]
    why = f"{len(rows)} recipes would be considered; the baseline is {plan.baseline}\n" + "\n".join(lines)
    return {"candidates": rows, "baseline_text": str(plan.baseline), "why": why}


def unfit(use: Use) -> str | None:
    """Why a technique cannot apply on this machine, whatever the model."""
    from hasten import techniques

    return techniques.why_not(Recipe("", (use,)))


def applying(setting: Setting, baseline: Recipe, progress: Progress) -> list[Use]:
    """The speedups that this machine and model take, each tried on the model; what cannot apply is said."""
    found = []
    for use in SPEEDUPS:
        try:
            setting.load(faster(Recipe(baseline.model), [use]))
            found.append(use)
        except UserError as error:
            progress.log(f"not here: {error}")
    return found


# --- choosing --------------------------------------------------------------------------------------------------------------------------


def chosen(run: Run) -> Trial:
    """The winner on calibration items."""
    found = cheapest(run) if run.targets else best(run)
    return run.trial(found)


def cheapest(run: Run) -> pareto.Measurement:
    """The cheapest recipe that reaches the target. UserError with the best there is, if none does."""
    measured, least = run.measured(), max(run.targets.values())
    found = pareto.cheapest_reaching(measured, least, run.budget, run.axis)
    if found is None:
        inside = [m for m in measured if pareto.inside(m, run.budget)]
        nearest = max(inside or measured, key=pareto.quality)
        where = f" inside {amounts(run.budget)}" if run.budget else ""
        said = f"{pareto.quality(nearest):.3f} of {nearest['recipe_text']} at {run.axis}={pareto.cost(nearest, run.axis):.4g}"
        raise UserError(f"no recipe reaches {least:g}{where}: the best measured is {said}")
    return found


def best(run: Run) -> pareto.Measurement:
    """The best recipe inside the budget, among those that answered the most items. UserError with the least costs there are, if none fits."""
    inside = [m for m in run.measured() if pareto.inside(m, run.budget)]
    others = [m["quality"]["n"] for m in inside if run.trial(m) is not run.baseline]
    finalists = [m for m in inside if m["quality"]["n"] >= max(others, default=0)]
    found = pareto.best_inside(finalists, run.budget, run.difference, run.axis)
    if found is None:
        nearest = "; ".join(least(run.measured(), axis) for axis in run.budget)
        raise UserError(f"nothing fits {amounts(run.budget)}: {nearest}")
    return found


def least(measured: Sequence[pareto.Measurement], axis: str) -> str:
    """What the cheapest measured recipe costs, in words."""
    cheap = min(measured, key=lambda m: pareto.cost(m, axis))
    if pareto.cost(cheap, axis) == float("inf"):
        return f"{axis} cannot be measured on this machine"
    return f"the least {axis} measured is {pareto.cost(cheap, axis):.4g}, of {cheap['recipe_text']}"


def amounts(budget: Mapping[str, float]) -> str:
    return ", ".join(f"{axis}={most:.4g}" for axis, most in budget.items())


# --- confirming ------------------------------------------------------------------------------------------------------------------------


def evidence(run: Run, winner: Trial) -> dict[str, Any]:
    """The pick and the baseline on test items, all that was measured, and the sentence that says why."""
    picked, baseline = (Trial(trial.recipe, run.setting, "test") for trial in (winner, run.baseline))
    same = winner is run.baseline
    pair = [baseline] if same else [picked, baseline]
    confirm(run, pair)
    add_divergence(pair, baseline, run.setting.task.items["test"])
    gain = difference(pair[0], baseline, baseline.outcomes)
    ratio = slowdown(pair[0], baseline)
    measured = run.measured()
    document = {
        "picked": pair[0].measurement(baseline.outcomes),
        "baseline": baseline.measurement(baseline.outcomes),
        "frontier": pareto.frontier(measured, run.axis),
        "measurements": measured,
        "budget": dict(run.budget),
        "targets": dict(run.targets),
        "confirmation": {
            "difference": gain.value, "ci": [gain.low, gain.high], "n": gain.n, "slowdown": ratio.value, "slowdown_ci": [ratio.low, ratio.high],
        },
        "refused": [{"recipe_text": str(t.recipe), "why_not": t.refused} for t in run.trials.values() if t.refused],
    }  # fmt: skip
    return document | {"why": same_why(run, document) if same else why(run, document, gain, ratio)}


def confirm(run: Run, pair: Sequence[Trial]) -> None:
    """Measure the pair on test items, their blocks of timed requests taken in turn."""
    items = run.setting.task.items["test"][:CONFIRM]
    for block in range(CONFIRM_BLOCKS):
        for trial in pair:
            trial.time(block, block_items(trial, block))
    for trial in pair:
        answer(trial, items, run.progress)
        run.setting.store.publish(found := trial.measurement(pair[-1].outcomes))
        run.progress.log(f"test items: {line(found)}")


def why(run: Run, document: Mapping[str, Any], gain: stats.Estimate, ratio: stats.Estimate) -> str:
    picked, baseline = document["picked"], document["baseline"]
    proof = "" if gain.excludes_zero else ", a difference inside the noise"
    points = f"{100 * gain.value:+.1f} points, 95% interval {100 * gain.low:+.1f} to {100 * gain.high:+.1f} on {gain.n} test items{proof}"
    aim = f"the cheapest that reaches {max(run.targets.values()):g}" if run.targets else f"the best inside {amounts(run.budget)}"
    name = picked["quality"]["name"]
    return (
        f"{picked['recipe_text']} is {aim} of {len(document['measurements'])} recipes measured: {name} {pareto.quality(picked):.1%} "
        f"against {pareto.quality(baseline):.1%} of {baseline['recipe_text']} ({points}) at {ratio.value:.2f} times its seconds."
    )


def same_why(run: Run, document: Mapping[str, Any]) -> str:
    aim = f"reaches {max(run.targets.values()):g} for less" if run.targets else f"is shown to be better inside {amounts(run.budget)}"
    return f"{document['baseline']['recipe_text']} stays as it is: of {len(document['measurements'])} recipes measured, none {aim}."


# --- writing ---------------------------------------------------------------------------------------------------------------------------


def command(
    source: str | None, task: str | Task | None, techniques: Sequence[str], budgets: Mapping[str, float] | None,
    targets: Mapping[str, float] | None, lossless: bool, concurrency: int, threads: str | int = "auto",
) -> str:  # fmt: skip
    """The command line that repeats this run."""
    words = ["hasten", "pick", *([source] if source else [])]
    words += ["--task", task.name if isinstance(task, Task) else str(task)] if task else []
    words += [word for text in techniques for word in ("--with", text)]
    words += [word for axis, most in (budgets or {}).items() for word in ("--budget", f"{axis}={most:g}")]
    words += [word for name, low in (targets or {}).items() for word in ("--target", f"{name}={low:g}")]
    words += ["--lossless"] if lossless else []
    words += ["--concurrency", str(concurrency)] if concurrency != 1 else []
    words += ["--threads", str(threads)] if threads != "auto" else []
    return shlex.join(words)


def write(document: Mapping[str, Any], out: Path) -> None:
    """recipe.json and report.html, each whole or not at all; measurements.jsonl was written as it came."""
    from hasten.artifact import write_text
    from hasten.measure.report import render
    from hasten.measure.store import saying_why

    with saying_why(out):
        save_recipe(Recipe.from_json(document["picked"]["recipe"]), out / "recipe.json")
        write_text(out / "report.html", render(document))
