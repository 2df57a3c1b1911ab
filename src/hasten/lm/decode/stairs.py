"""Staircase validation (Grigaliunas and Lukosevicius 2024, arXiv:2407.19947): checking drafts with a model that gives one output a row.

Causal verification asks a pass for its output at every drafted position. Where only a row's last output can be had (an exported graph that
ends in the last position, an endpoint that answers with the next token), the k drafted tokens become k + 1 rows of one batch, each a token
longer than the one before: row i ends where token i + 1 is to be judged. Decisions, and so the output, are those of causal verification; the
price is (k + 1)(k + 2) / 2 positions a row in place of k + 1.

The paper repeats the whole text in every row. Here the rows of a staircase share one row of the cache: what two of them have in common is
equal, so they may write the same places, and each reads no further than its own end. The draft is a smaller model, as in the paper.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from hasten import hf
from hasten.flops import ModelCost
from hasten.lm.attention import Plan, Span
from hasten.lm.decode.control import check
from hasten.lm.decode.draft import Draft, quick, vocabulary
from hasten.usage import Cost
from hasten.values import UserError

if TYPE_CHECKING:
    from hasten.lm.scheduler import Row
    from hasten.lm.tree import Proposal


@dataclass(frozen=True)
class Options:
    """model: the draft, a directory, hub id or zoo:NAME. k: tokens proposed at most. schedule: how many of k are, goodput (as many as pay, none
    included), constant or heuristic.
    """

    model: str = ""
    k: int = 4
    schedule: str = "goodput"

    mode, confidence, ensemble_weight, branches = (
        "coupled",
        0.0,
        1.0,
        1,
    )  # what `Draft` asks; one output a row is enough for this mode alone

    def __post_init__(self) -> None:
        check("stairs", self.k, self.schedule)


def roles(options: Options) -> dict[str, str]:
    """Models needed beside the target. UserError if the options name none."""
    if not options.model:
        raise UserError("stairs needs a draft model: stairs(model=MODEL)")
    return {"draft": options.model}


class Stairs(Draft):
    """A draft model whose tokens are checked one row each."""

    def bind(self, engine: Any) -> None:
        super().bind(engine)
        engine.model = hf.stepped(hf.shared_copy(engine.model), Staircase(engine.model))
        self.target: ModelCost = engine.costs
        self.extra: dict[int, Cost] = {}  # of each row under way: what its staircases cost beyond causal verification

    def accept(self, row: Row, proposal: Proposal, chosen: Sequence[int], logits: torch.Tensor) -> list[int]:
        if proposal:
            self.extra[id(row)] = self.extra.get(id(row), Cost()) + self._beyond(len(row.tokens) - 1, len(proposal))
        return super().accept(row, proposal, chosen, logits)

    def _beyond(self, start: int, k: int) -> Cost:
        """All rows but the last, which is the one that causal verification computes, outputs apart."""
        flops = sum(self.target.flops(i + 1, start, 0) for i in range(k))
        return Cost(flops=flops, bytes=sum(self.target.bytes(start + i + 1, 0) for i in range(k)))

    def costs(self, row: Row) -> Mapping[str, Cost]:
        """The draft's, and under "stairs" what the target computed more than once."""
        return {**super().costs(row), "stairs": self.extra.pop(id(row), Cost())}


class Staircase:
    """Does the passes of which more than a row's last output is asked, in steps of one output a row (see `hf.stepped`)."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.small = getattr(model, "small_step", None)

    @property
    def seconds(self) -> dict[str, float]:
        """What the model's own compiled steps took to make."""
        return getattr(self.small, "seconds", {})

    def takes(self, ids: torch.Tensor, plan: Any) -> bool:
        return isinstance(plan, Plan)

    def __call__(self, ids: torch.Tensor, positions: torch.Tensor, outputs: torch.Tensor | None, plan: Plan) -> torch.Tensor:
        """ids, positions [N] -> logits [outputs, vocabulary]; new keys and values go to the plan's cache."""
        wanted = range(len(ids)) if outputs is None else outputs.tolist()
        stairs = rows_of(plan.spans, wanted)
        if len(stairs) == len(plan.spans):
            return hf.forward(self.model, ids, positions, outputs, plan)
        source = [s.offset + t for s in stairs for t in range(s.n)]
        spans, ends, at = [], [], 0
        for s in stairs:
            spans.append(Span(s.slot, s.start, s.n, at))
            at += s.n
            if s.asked:
                ends.append(at - 1)
        picked = torch.tensor(source, device=ids.device)
        return hf.forward(self.model, ids[picked], positions[picked], torch.tensor(ends, device=ids.device), Plan(plan.cache, spans))


@dataclass(frozen=True)
class Stair(Span):
    """One row: `n` tokens from `offset` of the pass it is made from; asked: whether its last output is."""

    asked: bool = True


def rows_of(spans: Sequence[Span], wanted: Sequence[int]) -> list[Stair]:
    """Rows of which only the last output is asked, in the order of the outputs (those of a pass are sorted)."""
    found, asked = [], sorted(wanted)
    for s in sorted(spans, key=lambda s: s.offset):
        ends = [i - s.offset + 1 for i in asked if s.offset <= i < s.offset + s.n]
        found += [Stair(s.slot, s.start, n, s.offset) for n in ends]
        if s.n not in ends:
            found.append(Stair(s.slot, s.start, s.n, s.offset, asked=False))
    return found


def build(options: Options, target: Any) -> Stairs:
    return Stairs(options, quick(target.models["draft"]), vocabulary(target))
