"""Asking a reward model about a solution, and one number from the rewards of its steps.

A process reward model gives one reward in [0, 1] a step. `last` suits models trained on soft labels, whose reward is a value (Snell et al.
2024, arXiv:2408.03314); `min` and `prod` suit hard labels (Lightman et al. 2023, arXiv:2305.20050; Math-Shepherd, arXiv:2312.08935).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from hasten.values import Message, Request, Result, UserError

Scorer: TypeAlias = Callable[[Request], Callable[[Result], Request]]

AGGREGATES: dict[str, Callable[[Sequence[float]], float]] = {
    "last": lambda rewards: rewards[-1],
    "min": min,
    "prod": math.prod,
    "mean": lambda rewards: math.fsum(rewards) / len(rewards),
}


def aggregate(name: str, rewards: Sequence[float] | None) -> float:
    """One number from the rewards of a solution's steps; 0 for a solution without a step."""
    return AGGREGATES[name](rewards) if rewards else 0.0


def scorer(tokenizers: Mapping[str, Any]) -> Scorer:
    """How samples become score requests: the strategy's request -> (a sample -> request of the role "reward").

    tokenizers: by role. If every token of the target's vocabulary has the same id in the reward model's (or no tokenizers are given: the
    same model family), the sample's own ids are scored, exactly as they were drawn, end-of-sequence token included. Else prompt and answer
    are encoded by the reward model's tokenizer, each on its own so that the boundary is known: text as it is, chat messages through the
    reward model's template. UserError, before any sample is drawn, where that cannot be right: a prompt given as the target's ids, or text
    with the target's special tokens in it.
    """
    target, reward = tokenizers.get("target"), tokenizers.get("reward")
    if shared(tokenizers):
        return lambda request: _by_ids
    return lambda request: _by_text(_prompt_ids(request.prompt, target, reward), reward)


def shared(tokenizers: Mapping[str, Any]) -> bool:
    """Whether the reward model reads the target's ids as the target means them."""
    target, reward = tokenizers.get("target"), tokenizers.get("reward")
    return target is None or reward is None or target is reward or target.get_vocab().items() <= reward.get_vocab().items()


def _score(prompt: Sequence[int], answer: Sequence[int]) -> Request:
    return Request((*prompt, *answer), role="reward", score=True, score_from=len(prompt))


def _by_ids(sample: Result) -> Request:
    if not sample.prompt_tokens:
        raise UserError("the reward model scores token ids, but the target's engine does not say which ids the prompt has")
    return _score(sample.prompt_tokens, sample.tokens)


def _by_text(prompt: Sequence[int], reward: Any) -> Callable[[Result], Request]:
    return lambda sample: _score(prompt, reward.encode(sample.text, add_special_tokens=False))


def _prompt_ids(prompt: Any, target: Any, reward: Any) -> list[int]:
    """A prompt in the ids of another model's tokenizer."""
    if isinstance(prompt, str):
        special = next((token for token in target.all_special_tokens if token in prompt), None)
        if special is not None:
            raise UserError(
                f"the prompt holds the target's special token {special!r}, which the reward model does not share; send chat messages"
            )
        return list(reward.encode(prompt))
    if prompt and isinstance(prompt[0], Mapping):
        return _templated(prompt, reward)
    raise UserError("the reward model's tokenizer differs from the target's, so the prompt must be text or chat messages, not token ids")


def _templated(messages: Sequence[Message], reward: Any) -> list[int]:
    if not reward.chat_template:
        raise UserError("the prompt is chat messages, but the reward model's tokenizer differs from the target's and has no chat template")
    text = reward.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    return list(reward.encode(text, add_special_tokens=False))
