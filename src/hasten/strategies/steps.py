"""A tree of partial solutions that grows step by step: what REBASE, step-beam and DVTS share.

A step is what a model writes up to a delimiter. `grow` asks for one more step of some nodes, all at once and with no barrier between writing a
step and scoring it, and gives the new nodes with the reward of each at its end. A child goes on from its parent's cache, of the model and of the
reward model, so that nothing is computed twice; caches of nodes that get no children go back at once. Siblings that wrote the same step are
scored, and later continued, as one.

Random streams: a node's first child goes on in its parent's stream, so a width of one is exactly one sample; other children have streams of
their own, named by the path to them.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias, cast

from hasten import rng
from hasten.strategies import rewards
from hasten.values import Ask, Key, Request, Result, Sampling, UserError

Growth: TypeAlias = "Generator[Ask, dict[Key, Result], list[Node]]"
STEP, SCORE = "step", "score"


@dataclass(eq=False, slots=True)
class Node:
    """A partial solution. tokens: all generated so far, its own step's last. scores: the reward at the end of each step.

    end: why it cannot be continued: "stop" (a whole solution), "length" (no tokens left), or "" where it can.
    """

    path: tuple[int, ...]
    stream: int  # index of its random stream
    tokens: tuple[int, ...] = ()
    text: str = ""
    scores: tuple[float, ...] = ()
    end: str = ""
    first: Node | None = None  # the sibling that wrote the same step before, whose caches it shares
    prompt: tuple[int, ...] = ()

    @property
    def name(self) -> tuple[int, ...]:
        """Path of the node whose caches hold it."""
        return self.path if self.first is None else self.first.path

    def result(self, tokenizer: Any) -> Result:
        """The solution as an answer."""
        words = self.text if tokenizer is None else str(tokenizer.decode(list(self.tokens), skip_special_tokens=True))
        return Result(words, self.tokens, finish_reason=self.end or "length", prompt_tokens=self.prompt, scores=self.scores)


@dataclass
class Tree:
    """One request's. delimiter: text that ends a step. cap: tokens of a step at most; the request's max_tokens is for a whole solution.

    score: as `rewards.scorer` gives it for this request; by_ids: whether it scores the model's own ids, so that a child's reward can go on
    from its parent's.
    """

    request: Request
    delimiter: str
    cap: int
    temperature: float
    top_p: float
    score: Any
    by_ids: bool
    kept: set[Key] = field(default_factory=set)

    def root(self, count: int = 1) -> list[Node]:
        """The root, as the parent of `count` subtrees that share nothing but the prompt."""
        return [Node((), self.request.sample * 4096 + i) for i in range(count)]

    def grow(self, wanted: Sequence[tuple[Node, int]], release: Sequence[Node] = ()) -> Growth:
        """So many children of each node -> the new nodes with their scores, in order. release: nodes that will get no more children."""
        children = [child for node, count in wanted for child in self._children(node, count)]
        parents = _parents(wanted, children)
        new: dict[Key, Request] = {(STEP, child.path): self._step(parents[child.path], child) for child in children}
        by_path = {child.path: child for child in children}
        scored: dict[tuple[Any, ...], Node] = {}
        needed = {node.name for node, _ in wanted}
        drop = self._released([node for node in release if node.path not in needed])
        waiting = len(new)
        while waiting:
            finished = yield Ask(new, drop)
            new, drop = {}, []
            for key, result in finished.items():
                kind, path = cast(tuple[str, tuple[int, ...]], key)
                child, waiting = by_path[path], waiting - 1
                if kind == SCORE:
                    child.scores = (*parents[path].scores, result.scores[-1] if result.scores else 0.0)
                    continue
                self._written(child, parents[path], result)
                same = (parents[path].name, child.tokens)
                if same in scored:
                    child.first = scored[same]
                    drop += self._released([child])
                else:
                    scored[same] = child
                    new[SCORE, path] = self._reward(parents[path], child)
                    waiting += 1
        for child in children:
            if child.first is not None:
                child.scores = child.first.scores
        return children

    # --- requests --------------------------------------------------------------------------------------------------------------------------

    def _children(self, node: Node, count: int) -> list[Node]:
        streams = [node.stream, *(rng.key(node.stream, *node.path, i) >> 2 for i in range(1, count))]
        return [Node((*node.path, *((node.stream,) if not node.path else ()), i), s) for i, s in enumerate(streams[:count])]

    def _step(self, parent: Node, child: Node) -> Request:
        left = self._left(parent)
        stops = (*self.request.sampling.stop, self.delimiter)
        sampling = self.request.sampling.but(
            n=1, max_tokens=min(self.cap, left), stop=stops, temperature=self.temperature, top_p=self.top_p
        )
        self.kept.add((STEP, child.path))
        asked = replace(self.request, role="target", sampling=sampling, sample=child.stream, keep=True)
        return replace(asked, prompt=(), parent=(STEP, parent.name)) if parent.path else asked

    def _reward(self, parent: Node, child: Node) -> Request:
        whole = Result(child.text, child.tokens, prompt_tokens=child.prompt)
        if not self.by_ids:
            return self.score(whole)
        self.kept.add((SCORE, child.path))
        if not parent.path:
            return replace(self.score(whole), keep=True)
        fresh = child.tokens[len(parent.tokens) :]
        start = len(child.prompt) + len(parent.tokens)
        return Request(fresh, role="reward", score=True, score_from=start, parent=(SCORE, parent.name), keep=True)

    def _left(self, node: Node) -> int:
        most = self.request.sampling.max_tokens
        return self.cap if most is None else most - len(node.tokens)

    def _written(self, child: Node, parent: Node, result: Result) -> None:
        """What a finished step makes of a node."""
        child.prompt = parent.prompt or result.prompt_tokens
        child.tokens = (*parent.tokens, *result.tokens)
        goes_on = result.stop_reason == self.delimiter or (result.finish_reason == "length" and self._left(child) > 0)
        child.text = parent.text + result.text + (self.delimiter if result.stop_reason == self.delimiter else "")
        child.end = "" if goes_on and self._left(child) > 0 else "stop" if result.finish_reason == "stop" and not goes_on else "length"

    def _released(self, nodes: Sequence[Node]) -> list[Key]:
        """Keys of caches that nodes hold and no longer need."""
        gone: list[Key] = [key for node in nodes for key in ((STEP, node.path), (SCORE, node.path)) if key in self.kept]
        self.kept -= set(gone)
        return gone


def _parents(wanted: Sequence[tuple[Node, int]], children: Sequence[Node]) -> dict[tuple[int, ...], Node]:
    parents = [node for node, count in wanted for _ in range(count)]
    return {child.path: node for node, child in zip(parents, children, strict=True)}


def check(temperature: float, top_p: float, cap: int, depth: int) -> None:
    """UserError for options of steps that are out of range."""
    Sampling(temperature=temperature, top_p=top_p)
    if cap < 1 or depth < 1:
        raise UserError(f"step_tokens={cap} and max_steps={depth} must be at least 1")


def delimiter(name: str, target: Any) -> str:
    """The text that ends a step: as given, or for "auto" what the reward model reads its rewards after, else a blank line."""
    if name != "auto":
        return name.encode().decode("unicode_escape") if "\\" in name else name
    model, words = (getattr(target, kind, {}).get("reward") for kind in ("models", "tokenizers"))
    ids = getattr(getattr(model, "config", None), "step_token_ids", None) or ()
    own = getattr(target, "tokenizers", {}).get("target")
    if ids and words is not None and own is not None and rewards.shared(getattr(target, "tokenizers", {})):
        return str(words.decode([ids[0]])).strip() or "\n\n"
    return "\n\n"
