"""A fixed set of tokens: nothing else is ever committed. The simplest constraint, for answers from a closed alphabet."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hasten.values import Request, UserError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Options:
    """tokens: ids that are allowed. text: words whose tokens are allowed too. end: the model may also end its answer (default)."""

    tokens: tuple[int, ...] = ()
    text: str = ""
    end: bool = True


class Allowed:
    """Permits the given ids at every position."""

    def __init__(self, ids: Iterable[int]) -> None:
        self.ids = frozenset(ids)
        self._mask: torch.Tensor | None = None

    def check(self, request: Request) -> None:
        """Whatever is asked can be served."""

    def start(self, prompt: Sequence[int]) -> Hashable:
        return None

    def permits(self, state: Hashable, token: int) -> bool:
        return token in self.ids

    def advance(self, state: Hashable, token: int) -> Hashable:
        return None

    def mask(self, states: Sequence[Hashable], vocabulary: int, device: torch.device) -> torch.Tensor:
        import torch

        if self._mask is None or self._mask.device != device or self._mask.numel() != vocabulary:
            self._mask = torch.zeros(vocabulary, dtype=torch.bool, device=device)
            self._mask[sorted(self.ids)] = True
        return self._mask.expand(len(states), -1)


def build(options: Options, target: Any) -> Allowed:
    """target: has `tokenizer`, `vocabulary` (number of ids) and `end_ids` of the model."""
    words = target.tokenizer(options.text, add_special_tokens=False)["input_ids"] if options.text else []
    ids = {*options.tokens, *words}
    wrong = sorted(t for t in ids if not 0 <= t < target.vocabulary)
    if wrong:
        raise UserError(f"allowed: token {wrong[0]} is outside the vocabulary of {target.vocabulary} tokens")
    if not ids:
        raise UserError("allowed: no token is allowed; give tokens=… or text=…")
    return Allowed(ids | set(target.end_ids if options.end else ()))
