"""An engine without a model: answers are a function of the request, and take a number of steps that is one too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from hasten.rng import integer
from hasten.usage import Cost, Usage
from hasten.values import Event, Key, Request, Result


def words(request: Request) -> Result:
    """`#### k`, k drawn from the request's own random stream; tokens are its characters, prompt tokens those of the prompt."""
    text = f"#### {integer(4, request.sampling.seed, request.sample, str(request.prompt))}"
    return Result(text, tuple(map(ord, text)), prompt_tokens=tuple(map(ord, str(request.prompt))))


@dataclass
class FakeEngine:
    """rows: requests worked on in one step; the others wait. Every step of work is one forward pass in the ledger."""

    answer: Callable[[Request], Result] = words
    steps: Callable[[Request], int] = lambda request: 1 + request.sample % 3
    role: str = "target"
    rows: int = 8
    asked: list[Request] = field(default_factory=list)
    cancelled: list[Key] = field(default_factory=list)
    waiting: dict[Key, tuple[Request, int]] = field(default_factory=dict)  # key -> request, steps done
    news: list[Event] = field(default_factory=list)
    emits_cancelled: bool = True

    @property
    def idle(self) -> bool:
        return not (self.waiting or self.news)

    def add(self, key: Key, request: Request) -> None:
        assert key not in self.waiting
        self.asked.append(request)
        self.waiting[key] = (request, 0)

    def step(self) -> list[Event]:
        assert not self.idle, "an idle engine need not be stepped"
        for key, (request, done) in list(self.waiting.items())[: self.rows]:
            self.waiting[key] = (request, done + 1)
            if done + 1 >= self.steps(request):
                self._finish(key, self.answer(request))
        news, self.news = self.news, []
        return news

    def cancel(self, key: Key) -> None:
        self.cancelled.append(key)
        if key in self.waiting and self.emits_cancelled:
            self._finish(key, Result(finish_reason="cancelled"))
        self.waiting.pop(key, None)

    def _finish(self, key: Key, result: Result) -> None:
        request, done = self.waiting.pop(key)
        cost = Cost(prompt=len(request.prompt), generated=len(result.tokens), forwards=done)
        self.news.append(Event(key, result=replace(result, usage=Usage({self.role: cost}, peak_bytes=10 * done))))
