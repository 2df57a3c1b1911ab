"""REBASE, reward-balanced search (Wu et al. 2024, "Inference scaling laws", arXiv:2408.00724): sample solutions step by step, and share the
width out anew at each step by a softmax of the rewards that a process reward model gives the partial solutions.

The width is the number of solutions. It starts with `width` first steps; what finishes takes its part of the width away, the rest is shared out
(`allocate`) among the partial solutions of the last step, and those that get nothing are given up. There is no going back. With rewards that
are all alike it is plain sampling; a width of 1 is one sample.

Where the paper and the released code differ, the options say which is meant: `rounding` (largest-remainder; round: the paper; ceil: the code),
`balance` (0.1 in the paper, 0.2 in the code's settings). Only unfinished partial solutions share the width (the code's rule).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from hasten.strategies import answers, rewards, steps
from hasten.strategies.allocate import ROUNDINGS
from hasten.strategies.best_of_n import select
from hasten.strategies.drive import Flow, Strategy
from hasten.strategies.steps import Node, Tree
from hasten.strategies.vote import tally
from hasten.values import Request, UserError, did_you_mean

CHOICES = ("weighted", "best", "majority")


@dataclass(frozen=True)
class Options:
    """choose: the answer with the greatest sum of rewards (weighted), the solution with the greatest (best), or the most frequent answer."""

    width: int = 16  # solutions
    reward: str = ""  # process reward model: a directory, hub id or zoo:NAME (required)
    balance: float = 0.1  # temperature of the softmax over rewards
    rounding: str = "largest-remainder"  # of the shares: largest-remainder, round or ceil
    choose: str = "weighted"  # weighted, best or majority
    aggregate: str = "last"  # one number from the rewards of a solution's steps: last, min, prod, mean
    temperature: float = 1.0  # of the samples; replaces the request's
    step: str = "auto"  # text that ends a step; auto: what the reward model reads its rewards after, else a blank line
    step_tokens: int = 256  # of a step at most
    extract: str = "auto"  # how an answer is found: auto, hash, boxed, last-number, line, or a regular expression with one group

    def __post_init__(self) -> None:
        if self.width < 1 or not self.balance > 0:
            raise UserError(f"rebase: width={self.width} must be at least 1, and balance={self.balance} more than 0")
        for name, known in (("rounding", [*ROUNDINGS]), ("choose", CHOICES), ("aggregate", [*rewards.AGGREGATES])):
            if getattr(self, name) not in known:
                raise UserError(f"rebase: {name}={getattr(self, name)!r}: no such way{did_you_mean(getattr(self, name), known)}")
        steps.check(self.temperature, 1.0, self.step_tokens, MAX_STEPS)
        answers.extractor(self.extract)


MAX_STEPS = 64  # of a solution; what is longer is given up, so a model that never ends costs something finite


def why_not(options: Options, target: object) -> str | None:
    return None if options.reward else "rebase needs a reward model: rebase(reward=MODEL)"


def roles(options: Options) -> dict[str, str]:
    """Models needed beside the target: the reward model. UserError if the options name none."""
    if reason := why_not(options, None):
        raise UserError(reason)
    return {"reward": options.reward}


def build(options: Options, target: Any = None) -> Strategy:
    """Request -> generator that searches and returns the chosen solution.

    Trace: as of a vote over the solutions, and `rewards` (of each solution), `chosen` (index), `steps` (nodes written), `unfinished` (given up
    for want of tokens), `widths` (branches alive at each step).
    """
    roles(options)
    words = getattr(target, "tokenizers", {})
    scorer, by_ids = rewards.scorer(words), rewards.shared(words)
    delimiter, extract = steps.delimiter(options.step, target), answers.chosen(options.extract, target)

    def rebase(request: Request) -> Flow:
        score = scorer(request)
        tree = Tree(request, delimiter, options.step_tokens, options.temperature, 1.0, score, by_ids)
        left, written = options.width, 0
        done: list[Node] = []
        widths: list[int] = []
        wanted: list[tuple[Node, int]] = [(node, options.width) for node in tree.root()]
        gone: list[Node] = []
        while left > 0 and wanted and len(widths) < MAX_STEPS:
            widths.append(sum(count for _, count in wanted))
            children = yield from tree.grow(wanted, gone)
            written += len(children)
            ended = [child for child in children if child.end]
            done, left = done + ended, left - len(ended)
            gone = [node for node, _ in wanted] + children
            wanted = share([child for child in children if not child.end], left, options)
        trace = {"steps": written, "widths": tuple(widths), "unfinished": sum(node.end != "stop" for node in done)}
        return chosen(done or children, options, extract, words.get("target"), trace)

    return rebase


def share(frontier: Sequence[Node], width: int, options: Options) -> list[tuple[Node, int]]:
    """The next number of children of each partial solution that gets any."""
    if not frontier or width <= 0:
        return []
    counts = ROUNDINGS[options.rounding]([node.scores[-1] for node in frontier], width, options.balance)
    return [(node, count) for node, count in zip(frontier, counts, strict=True) if count > 0]


def chosen(nodes: Sequence[Node], options: Any, extract: answers.Extractor, tokenizer: Any, trace: dict[str, Any]) -> Any:
    """The answer of a search, from its solutions. An unfinished one has no vote; if none is finished, all are compared by reward."""
    results = [node.result(tokenizer) for node in nodes]
    found = [extract(result.text) if node.end == "stop" else None for node, result in zip(nodes, results, strict=True)]
    values = [rewards.aggregate(options.aggregate, node.scores) for node in nodes]
    votes = [1.0] * len(values) if options.choose == "majority" else values
    best = select(found, votes, options.choose != "best")
    return replace(results[best], scores=None, trace={**tally(found), "rewards": tuple(values), "chosen": best, **trace})
