"""Self-speculation through the first layers (LayerSkip, Elhoushi et al. 2024, arXiv:2404.16710), batched over rows: no second model.

The model's own first layers, under its last norm and head, draft the next tokens; the whole model checks them in one pass. Drafting writes
into the target's own cache, in the layers it runs through, so the exit needs neither a cache nor a prompt of its own; what is written for a
token that is not kept lies beyond the row's end. The pass that checks writes the same positions again, in all layers, so the output owes
nothing to how the exit computes (rounding, a native step).

The paper keeps the exit's states and checks from there on, so that no layer runs twice. Where a pass takes the same time for few positions as
for one, that is worth nothing: k exits and the rest of the layers give as many tokens in the same time as k - 1 exits and all layers, whose
last token is the target's own. What it saves is the first layers' arithmetic at k - 1 positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hasten import hf
from hasten.lm.cache import Entry
from hasten.lm.decode.draft import Draft, Job, State, Vocabulary, check_settings, quick
from hasten.lm.decode.draft import exactness as exactness
from hasten.values import UserError

if TYPE_CHECKING:
    from hasten.lm.scheduler import Row
    from hasten.lm.tree import Proposal


@dataclass(frozen=True)
class Options:
    """layers: that draft, from the first (0: as the model's config says in `exit_layers`, else a quarter of them). k: tokens proposed at most.

    mode: coupled, rejection or block (see `verify`). schedule: how many of k are proposed: goodput (as many as pay, none included; default
    with coupled), constant (default otherwise) or heuristic. confidence: stop drafting where the exit's likeliest token is less likely than
    this. ensemble_weight: below 1 more is accepted than is exact (rejection only; approximate).
    """

    layers: int = 0
    k: int = 4
    mode: str = "coupled"
    schedule: str = "auto"
    confidence: float = 0.0
    ensemble_weight: float = 1.0

    branches = 1

    def __post_init__(self) -> None:
        if self.layers < 0:
            raise UserError(f"early_exit: layers={self.layers} must not be negative")
        check_settings("early_exit", self)


class EarlyExit(Draft):
    """Proposals of the target's first layers. model: they, as `hf.cut` gives them; vocabulary: its ids."""

    role = "exit"

    def bind(self, engine: Any) -> None:
        self.engine, self.cache = engine, engine.cache

    def draft(self, rows: Sequence[Row], lengths: Sequence[int]) -> list[Proposal]:
        need = max((len(row.tokens) + k for row, k in zip(rows, lengths, strict=True) if k > 0), default=0)
        most = need if self.cache.reserve(need) else self.cache.capacity  # at once for all: what is drafted must not be moved
        return super().draft(rows, [max(0, min(k, most - len(row.tokens))) for row, k in zip(rows, lengths, strict=True)])

    def _job(self, row: Row, k: int) -> Job:
        """Drafting goes on behind the row's own tokens; the row's entry does not change, as only whole passes count."""
        state = row.decode_state = row.decode_state or State()
        known = row.held.tokens
        state.laws, state.entry = [], Entry(row.held.slot, list(known))
        return Job(row, state, k, row.tokens[len(known) :], constraint=row.constraint_state)

    def finish(self, row: Row) -> None:
        """The cache is the target's, which lets go of the row itself."""


def chosen(options: Options, model: Any) -> int:
    """The number of layers that draft."""
    config = model.config.get_text_config(decoder=True)
    return options.layers or int(getattr(config, "exit_layers", 0)) or max(1, config.num_hidden_layers // 4)


def why_not(options: Options, target: Any) -> str | None:
    if target is None:
        return None
    if hf.facts(target.model).reward:
        return "early_exit: a reward model generates nothing"
    try:
        hf.cut(target.model, chosen(options, target.model))
    except UserError as error:
        return f"early_exit: {error}"
    return None


def build(options: Options, target: Any) -> EarlyExit:
    model = target.model
    return EarlyExit(options, quickest(hf.cut(model, chosen(options, model)), model), Vocabulary(target.vocabulary))


def quickest(exit_: Any, model: Any) -> Any:
    """The exit with steps as quick as the model's own: in one call where it takes that, with weights of as few bits."""
    from hasten.lm.fused import FusedStep, Unfit

    step = getattr(model, "small_step", None)
    if not isinstance(step, FusedStep) or step.bits == 32:
        return quick(exit_)
    bits = {"bits": step.bits, "head": step.head_bits, "rows": step.rows}
    try:
        return hf.derived(exit_, ("fused", *bits.values()), lambda: hf.stepped(hf.shared_copy(exit_), FusedStep(exit_, **bits)))
    except Unfit:
        return exit_
