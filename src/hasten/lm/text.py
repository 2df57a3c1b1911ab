"""Between text and tokens: prompts of every kind to ids, ids to text, stop strings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hasten.values import Prompt, UserError


def encode(tokenizer: Any, prompt: Prompt, *, special: bool = True) -> list[int]:
    """Ids of a prompt: text as it is, ids as given, chat messages through the tokenizer's template with the turn of the assistant opened."""
    if isinstance(prompt, str):
        return list(_needed(tokenizer)(prompt, add_special_tokens=special)["input_ids"])
    items: list[Any] = list(prompt)
    if all(isinstance(i, int) and not isinstance(i, bool) for i in items):
        return [int(i) for i in items]
    if all(isinstance(m, Mapping) and "role" in m and "content" in m for m in items):
        return _chat(_needed(tokenizer), items)
    raise UserError("a prompt is a string, a list of token ids, or a list of chat messages with 'role' and 'content'")


def _needed(tokenizer: Any) -> Any:
    if tokenizer is None:
        raise UserError("this model was loaded without a tokenizer: give prompts as token ids")
    return tokenizer


def _chat(tokenizer: Any, messages: Sequence[Mapping[str, Any]]) -> list[int]:
    if not getattr(tokenizer, "chat_template", None):
        raise UserError("chat messages need a chat template, and this tokenizer has none: give the prompt as a string")
    out = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=True, return_dict=True)
    return list(out["input_ids"])


def decode(tokenizer: Any, tokens: Sequence[int]) -> str:
    """Text of generated ids without special tokens; empty without a tokenizer."""
    return "" if tokenizer is None else str(tokenizer.decode(list(tokens), skip_special_tokens=True))


def stopped(tokenizer: Any, generated: Sequence[int], new: int, stops: Sequence[str]) -> str | None:
    """The first stop string that ends within the last `new` tokens. Only a tail is decoded: a character takes at most four byte tokens."""
    tail = generated[-(4 * max(map(len, stops)) + new + 4) :]
    text = decode(tokenizer, tail)
    return next((s for s in stops if s in text), None)


def cut(text: str, stops: Sequence[str]) -> str:
    """The text before the first stop string."""
    ends = [i for i in (text.find(s) for s in stops) if i >= 0]
    return text[: min(ends)] if ends else text
