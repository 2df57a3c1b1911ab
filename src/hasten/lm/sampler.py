"""From logits to tokens: processors in the field's order, then the Gumbel-max choice with noise keyed by position.

Order (transformers'): constraint, bias, penalties, then temperature, top-k, top-p, min-p. The choice is argmax(log p + noise), the noise a
pure function of (seed, sample, position, token): a draw from p that is the same alone, in any batch, and however many tokens a step tries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from hasten import rng
from hasten.values import Sampling, TokenLogprob

if TYPE_CHECKING:
    from hasten.lm.scheduler import Row

TOKEN = 1  # the purpose part of a noise key


@dataclass(slots=True)
class Choice:
    """One position whose next token is to be chosen.

    sample, position: with sampling.seed they name the random stream. history: prompt and generated ids before it (penalties), of which
    the first `prompt` are the prompt. banned: ids not allowed here (end of sequence before min_tokens).
    """

    sampling: Sampling
    sample: int
    position: int
    history: Sequence[int] = ()
    prompt: int = 0
    banned: Sequence[int] = ()


def choice(row: Row, drafted: Sequence[int], ends: tuple[int, ...]) -> Choice:
    """How a row's token after some proposed ones is to be chosen. ends: ids that end an answer, not allowed before min_tokens."""
    s = row.request.sampling
    full = bool(s.repetition_penalty != 1 or s.presence_penalty or s.frequency_penalty)
    history = [*row.tokens, *drafted] if full else ()
    banned = ends if row.generated + len(drafted) < s.min_tokens else ()
    return Choice(s, row.sample, len(row.tokens) + len(drafted), history, row.prompt, banned)


@dataclass(slots=True)
class Chosen:
    """tokens: one a position. logits: processed, [positions, vocabulary] (temperature not applied); raw: as the model gave them."""

    tokens: list[int]
    logits: torch.Tensor
    raw: torch.Tensor = field(repr=False)


def choose(raw: torch.Tensor, choices: Sequence[Choice], allowed: torch.Tensor | None = None) -> Chosen:
    """raw [positions, vocabulary]; allowed: bool, same shape, or None. One token for each position."""
    logits = processed(raw, choices, allowed)
    drawn = [i for i, c in enumerate(choices) if c.sampling.temperature > 0]
    if not drawn:
        return Chosen(largest(logits).tolist(), logits, raw)
    tokens = largest(logits)
    some = logits if len(drawn) == len(choices) else logits[drawn]
    tokens[drawn] = _draw(some, [choices[i] for i in drawn])
    return Chosen(tokens.tolist(), logits, raw)


def ranked(raw: torch.Tensor, choices: Sequence[Choice], n: int, allowed: torch.Tensor | None = None) -> list[list[int]]:
    """Of each position the n tokens that come first where `choose` takes the first: with noise a draw of n without replacement (Gumbel-top-k,
    Kool et al. 2019, arXiv:1903.06059). Fewer where no more are possible.
    """
    scores = processed(raw, choices, allowed).double().clone()
    drawn = [i for i, c in enumerate(choices) if c.sampling.temperature > 0]
    if drawn:
        scores[drawn] = _noisy(scores[drawn], [choices[i] for i in drawn])
    best = scores.topk(min(n, scores.shape[-1]))
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [[t for t, v in zip(tokens, values, strict=True) if v > float("-inf")] for tokens, values in pairs]


def largest(x: torch.Tensor) -> torch.Tensor:
    """Index of each row's first maximum. On a CPU by NumPy, whose argmax is vectorised: at 49,152 tokens it takes a tenth of PyTorch's time."""
    if x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64):
        return torch.from_numpy(np.argmax(x.numpy(), axis=-1))
    return x.argmax(-1)


def processed(raw: torch.Tensor, choices: Sequence[Choice], allowed: torch.Tensor | None) -> torch.Tensor:
    """Logits after constraint, bias, penalties and bans; temperature and truncation are not applied. `raw` stays as it is."""
    logits = raw if allowed is None else raw.masked_fill(~allowed, float("-inf"))
    for i, c in enumerate(choices):
        if c.banned or _adjusts(c.sampling):
            logits = logits.clone() if logits is raw else logits
            _adjust(logits[i], c)
    return logits


def _adjusts(s: Sampling) -> bool:
    return bool(s.logit_bias) or s.repetition_penalty != 1 or s.presence_penalty != 0 or s.frequency_penalty != 0


def _adjust(row: torch.Tensor, c: Choice) -> None:
    """In place: bias, repetition penalty over prompt and answer (Keskar et al. 2019), presence and frequency over the answer (OpenAI)."""
    s = c.sampling
    for token, bias in s.logit_bias.items():
        row[int(token)] += bias
    if s.repetition_penalty != 1:
        seen = torch.tensor(sorted(set(c.history)), device=row.device)
        x = row[seen]
        row[seen] = torch.where(x < 0, x * s.repetition_penalty, x / s.repetition_penalty)
    if s.presence_penalty or s.frequency_penalty:
        ids, counts = torch.tensor(list(c.history[c.prompt :]), dtype=torch.long, device=row.device).unique(return_counts=True)
        row[ids] -= s.presence_penalty + s.frequency_penalty * counts.to(row.dtype)
    if c.banned:
        row[list(c.banned)] = float("-inf")


def _draw(logits: torch.Tensor, choices: Sequence[Choice]) -> torch.Tensor:
    """One token a row from the truncated, tempered distribution."""
    return largest(_noisy(logits, choices))


def _noisy(logits: torch.Tensor, choices: Sequence[Choice]) -> torch.Tensor:
    x = _tempered(logits, [c.sampling for c in choices])
    keys = [rng.key(c.sampling.seed, c.sample, c.position, TOKEN) for c in choices]
    return x + rng.gumbel(keys, x.shape[-1], x.device)


def _tempered(logits: torch.Tensor, samplings: Sequence[Sampling]) -> torch.Tensor:
    return _truncated(logits.double() / _column([s.temperature for s in samplings], logits), samplings)


def laws(logits: torch.Tensor, samplings: Sequence[Sampling]) -> torch.Tensor:
    """Probabilities [N, vocabulary] in float64 that tokens are drawn with from processed logits; of greedy rows all on the likeliest."""
    out = torch.zeros(logits.shape, dtype=torch.float64, device=logits.device)
    out.scatter_(1, largest(logits)[:, None].to(logits.device), 1.0)
    drawn = [i for i, s in enumerate(samplings) if s.temperature > 0]
    if drawn:
        out[drawn] = torch.softmax(_tempered(logits[drawn], [samplings[i] for i in drawn]), -1)
    return out


def _truncated(x: torch.Tensor, samplings: Sequence[Sampling]) -> torch.Tensor:
    """Keep the top k, then the smallest set of mass top_p, then tokens with at least min_p of the best one's probability."""
    if any(0 < s.top_k < x.shape[-1] for s in samplings):
        x = _top_k(x, [s.top_k for s in samplings])
    if any(s.top_p < 1 for s in samplings):
        x = _top_p(x, [s.top_p for s in samplings])
    if any(s.min_p > 0 for s in samplings):
        p = torch.softmax(x, -1)
        x = x.masked_fill(p < _column([s.min_p for s in samplings], x) * p.amax(-1, keepdim=True), float("-inf"))
    return x


def _top_k(x: torch.Tensor, ks: Sequence[int]) -> torch.Tensor:
    size = x.shape[-1]
    full = [k if 0 < k < size else size for k in ks]
    best = x.topk(max(k for k in full if k < size), dim=-1).values
    last = torch.tensor([min(k, best.shape[-1]) - 1 for k in full], device=x.device)[:, None]
    cut = best.gather(-1, last)
    return torch.where((x < cut) & (_column(full, x) < size), float("-inf"), x)


def _top_p(x: torch.Tensor, ps: Sequence[float]) -> torch.Tensor:
    """Nucleus sampling (Holtzman et al. 2020): drop the tail whose total mass is at most 1 - p; the best token always stays."""
    values, order = x.sort(-1)
    tail = torch.softmax(values, -1).cumsum(-1) <= 1 - _column(ps, x)
    tail[:, -1] = False
    tail &= _column(ps, x) < 1
    return x.masked_fill(torch.zeros_like(tail).scatter(-1, order, tail), float("-inf"))


def _column(values: Sequence[float], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64, device=like.device)[:, None]


def logprobs(raw: torch.Tensor, tokens: Sequence[int], top: int) -> list[TokenLogprob]:
    """Log-probabilities of the model itself (temperature 1, no truncation). raw [positions, vocabulary]."""
    logp = torch.log_softmax(raw.float(), -1)
    chosen = logp.gather(-1, torch.tensor(tokens, device=raw.device)[:, None])[:, 0].tolist()
    if top == 0:
        return [TokenLogprob(t, p) for t, p in zip(tokens, chosen, strict=True)]
    values, ids = logp.topk(min(top, logp.shape[-1]), -1)
    rows = zip(tokens, chosen, ids.tolist(), values.tolist(), strict=True)
    return [TokenLogprob(t, p, tuple(zip(i, v, strict=True))) for t, p, i, v in rows]
