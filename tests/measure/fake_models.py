"""Engines that need no model: how good and how dear each recipe is, is written down here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hasten import rng
from hasten.measure.tasks import Item, Task
from hasten.recipe import Recipe
from hasten.strategies import answers
from hasten.usage import Cost, Usage
from hasten.values import Event, Key, Prompt, Request, Result, Sampling, UserError


@dataclass
class FakeEngine:
    """Answers one request a step, rightly with probability `skill`; a request's ledger says what the model's size and samples cost."""

    skill: float
    seconds: float
    log: list[str] = field(default_factory=list)
    fail_after: int | None = None
    waiting: dict[Key, Request] = field(default_factory=dict)
    most: int = 0

    @property
    def idle(self) -> bool:
        return not self.waiting

    def add(self, key: Key, request: Request) -> None:
        self.waiting[key] = request
        self.most = max(self.most, len(self.waiting))

    def cancel(self, key: Key) -> None:
        self.waiting.pop(key, None)

    def step(self) -> list[Event]:
        if self.fail_after is not None and len(self.log) >= self.fail_after:
            raise KeyboardInterrupt
        key, request = next(iter(self.waiting.items()))
        del self.waiting[key]
        self.log.append(request.id)
        right = rng.uniform(request.sampling.seed, "luck") < self.skill
        cost = Cost(prompt=3, generated=5, forwards=5, flops=1e6 * self.seconds, bytes=10.0)
        usage = Usage({"target": cost}, seconds=self.seconds, ttft=self.seconds / 5, tpot=self.seconds / 5, peak_bytes=100)
        text = f"#### {str(request.prompt).split()[-1] if right else 'wrong'}"
        return [Event(key, (1,), Result(text, (1, int(right)), usage=usage, prompt_tokens=(7,)))]


@dataclass
class FakeLoaded:
    recipe: Recipe
    engine: FakeEngine
    threads: int = 1
    startup: Mapping[str, float] = field(default_factory=dict)

    def processor_seconds(self) -> float:
        return 0.0

    def ask(self, prompt: Prompt) -> Prompt:
        return prompt


SKILLS = {"small": (0.3, 1.0), "large": (0.6, 4.0)}


def fake_load(recipe: Recipe, compiler: bool = False) -> FakeLoaded:
    """A vote of n adds to the skill and to the seconds; n-gram speculation takes a quarter of the seconds away; temperature 1 is refused,
    and so are native steps without a compiler; with one they take half of the seconds."""
    skill, seconds = SKILLS[recipe.model]
    options: Mapping[str, Mapping[str, Any]] = {use.name: use.options for use in recipe.uses}
    if "native" in options:
        seconds /= 2
        if not compiler:
            raise UserError(f"{recipe}: no C++ compiler was found")
    if options.get("vote", {}).get("temperature") == 1.0:
        raise UserError(f"{recipe}: cannot run here")
    if "vote" in options:
        n = int(options["vote"].get("n", 8))
        skill, seconds = skill + 0.02 * n, seconds * (1 + 0.05 * n)
    return FakeLoaded(recipe, FakeEngine(skill, seconds * (0.75 if "ngram" in options else 1.0)))


def make_task(answered: bool = True, n: int = 400) -> Task:
    items = {split: [Item(f"{split}-{i}", f"say {i}", str(i) if answered else None) for i in range(n)] for split in ("calibration", "test")}
    return Task("echo", items, Sampling(max_tokens=8), "accuracy" if answered else "agreement", answers.extractor("hash"), "echo-1")
