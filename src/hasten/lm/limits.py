"""What a token engine can serve, as plain numbers: whoever passes requests on to an engine in another process refuses what it would refuse."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hasten.values import Request, UserError


@dataclass(frozen=True, slots=True)
class Limits:
    """positions: of one row of the cache. inputs: ids that have an embedding. vocabulary: ids of the output layer. reward: it scores only.
    words: it has a tokenizer."""

    positions: int
    inputs: int
    vocabulary: int
    reward: bool
    words: bool

    def check(self, request: Request, tokens: Sequence[int]) -> None:
        """UserError names what cannot be served. tokens: the whole prompt."""
        s = request.sampling
        if not tokens:
            raise UserError("the prompt is empty")
        if not 0 <= min(tokens) <= max(tokens) < self.inputs:
            wrong = min(tokens) if min(tokens) < 0 else max(tokens)
            raise UserError(f"prompt: token id {wrong} is outside the model's vocabulary of {self.inputs}")
        if self.reward and not request.score:
            raise UserError("this is a reward model: it answers score requests only")
        need = len(tokens) + (0 if request.score else s.max_tokens or 0)
        if need > self.positions:
            what = f"{len(tokens)} prompt tokens" + ("" if request.score else f" + max_tokens={s.max_tokens or 0}")
            raise UserError(
                f"request {request.id or ''}".rstrip() + f": {what} = {need} positions, but the cache holds {self.positions} a row"
            )
        if s.n > 1 and (request.keep or request.score):
            raise UserError("n > 1 goes neither with keep nor with score")
        if s.stop and not self.words:
            raise UserError("stop: stop strings need a tokenizer; give stop_token_ids")
        if s.logit_bias and not all(0 <= int(t) < self.vocabulary for t in s.logit_bias):
            raise UserError("logit_bias: a token id is outside the model's vocabulary")
