"""Measure recipes on a task, side by side: quality with its interval, and what a request costs. Nothing is picked here.

Costs are taken in blocks, one block of every recipe before the next block of any, so that a slow moment of the machine hits all alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Protocol

from hasten.measure.store import Store
from hasten.measure.tasks import Item, Task, load_task
from hasten.measure.trial import Load, Setting, Trial
from hasten.recipe import Recipe
from hasten.values import UserError

ITEMS, BLOCKS, BLOCK = 300, 10, 2  # items for quality; blocks of requests for cost, and requests in a block for each one in flight


class Progress(Protocol):
    """Where a run says how far it is: `terminal.Progress` on the command line."""

    def log(self, text: str) -> None:
        """A line that stays."""

    def update(self, name: str, done: float, total: float) -> None:
        """The work `name` has done `done` of `total`."""


class Silent:
    """The progress of a run that nobody watches."""

    def log(self, text: str) -> None: ...

    def update(self, name: str, done: float, total: float) -> None: ...


def measure(
    recipes: Sequence[Recipe], *, task: str | Task | None = None, n: int = ITEMS, concurrency: int = 1, out: str = "hasten-out",
    template: str = "auto", device: str = "auto", dtype: str = "auto", split: str = "test", blocks: int = BLOCKS, threads: str | int = "auto",
    workers: str | int | None = None, progress: Progress | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Measurements of recipes on the same items, in the order given; also appended to `out`/measurements.jsonl.

    task: a built-in name or a JSONL file ("arith" if there is none). n: items for quality. blocks: of requests for cost. threads, workers: see
    `hasten.load`. Where the task has no
    answers the first recipe is what the others are compared with. UserError if a recipe cannot run here.
    """
    progress = progress or Silent()
    setting = make_setting(task, concurrency, out, template, device, dtype, threads, workers)
    trials = [Trial(recipe, setting, split) for recipe in recipes]
    items = setting.task.items[split]
    time_blocks(trials, range(blocks), progress)
    for trial in trials:
        answer(trial, items[:n], progress)
    add_divergence(trials, trials[0], items)
    found = [trial.measurement(trials[0].outcomes) for trial in trials]
    for measurement in found:
        setting.store.publish(measurement)
    return found


def make_setting(
    task: str | Task | None, concurrency: int, out: str, template: str, device: str, dtype: str, threads: str | int = "auto",
    workers: str | int | None = None,
) -> Setting:  # fmt: skip
    """What a run's trials share; the stamp in it names the machine and all settings that change a measurement."""
    from hasten.measure import machine

    if concurrency < 1:
        raise UserError(f"concurrency={concurrency}: must be at least 1")
    loaded = task if isinstance(task, Task) else load_task(task or "arith")
    described = machine.describe(device, threads) | ({"workers": workers} if workers is not None else {})
    sampling = repr(sorted(asdict(loaded.sampling).items()))
    stamp = "|".join((machine.fingerprint(described), str(concurrency), template, device, dtype, str(threads), sampling))
    return Setting(loaded, loader(template, device, dtype, threads, workers), Store(out), described, concurrency, stamp)


def loader(template: str, device: str, dtype: str, threads: str | int = "auto", workers: str | int | None = None) -> Load:
    """A function that loads recipes; the models they share are read once."""
    from hasten.load import Models, load

    models = Models() if workers is None else None
    return lambda recipe: load(recipe, device=device, dtype=dtype, template=template, models=models, threads=threads, workers=workers)


def answer(trial: Trial, items: Sequence[Item], progress: Progress) -> None:
    """Quality of one trial on these items, with a bar; its engines are let go of afterwards."""
    name = f"quality  {trial.recipe}"
    trial.answer(items, lambda done: progress.update(name, done, len(items)))
    trial.close()


def time_blocks(trials: Sequence[Trial], blocks: Sequence[int], progress: Progress) -> None:
    """Blocks of timed requests, one block of every trial before the next block of any."""
    steps = [(trial, block) for block in blocks for trial in trials]
    for done, (trial, block) in enumerate(steps, 1):
        trial.time(block, block_items(trial, block))
        progress.update("cost", done, len(steps))


def block_items(trial: Trial, block: int) -> list[Item]:
    """The items of a block: the same for every recipe, from the end of the split, so that few of them are also used for quality."""
    items, size = trial.setting.task.items[trial.split], BLOCK * trial.setting.concurrency
    return [items[-1 - (block * size + i) % len(items)] for i in range(min(size, len(items)))]


def add_divergence(trials: Sequence[Trial], unmodified: Trial, items: Sequence[Item], n: int = 32) -> None:
    """KL from the unmodified model, where the task has no answers: zero for the same model, measured for another of the same vocabulary."""
    from hasten.measure.quality import divergence

    if unmodified.setting.task.answered:
        return
    for trial in trials:
        if _same_model(trial.recipe, unmodified.recipe):
            trial.kl = [0.0] * min(n, len(items))
        elif _vocabulary(trial) == _vocabulary(unmodified):
            trial.kl = divergence(unmodified.loaded, trial.loaded, trial.setting.task, items[:n])


def _same_model(a: Recipe, b: Recipe) -> bool:
    """Whether two recipes hold the same model with the same transforms, which then gives the same probabilities."""
    return a.model == b.model and _transforms(a) == _transforms(b)


def _transforms(recipe: Recipe) -> list[Any]:
    from hasten.techniques import technique

    return [use for use in recipe.uses if technique(use.name).slot == "transform"]


def _vocabulary(trial: Trial) -> Mapping[str, int]:
    return trial.loaded.tokenizer.get_vocab()
