"""The verifier: how much of a proposal is committed, and what follows it. p is the draft's law at a position, q the target's, both processed
(temperature, truncation, penalties), in float64.

* `coupled`: the target chooses at every position with that position's own noise, and a proposal is kept while it agrees. What is committed is
  exactly what the target would have chosen one token at a time with the same noise, so output is identical to plain decoding at any
  temperature and whatever was proposed (Daliri et al. 2024, arXiv:2408.07978; transformers' rule for proposals without laws, made
  reproducible). A draft that draws with the same noise agrees with probability at least (1 - TV) / (1 + TV).
* `rejection`: accept x with probability min(1, q(x) / p(x)), else draw from (q - p)+ (Leviathan et al. 2023, arXiv:2211.17192): agrees with
  probability 1 - TV, the most there is token by token; output has the target's law, but depends on what was proposed.
* `block`: accept the longest prefix that may be kept jointly (Sun et al. 2024, arXiv:2403.10444): never fewer tokens than `rejection`.

All random numbers of a round are keyed by where the round started as well: a number that has decided something once is never used again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from hasten.lm.decode import coupled

ACCEPT, DRAFT, AFTER = 2, 3, 4  # purposes in a noise key, beside the sampler's TOKEN
Uniform = Callable[[int, int], float]  # (purpose, index in the round) -> a number in (0, 1)


def rejection(proposal: Sequence[int], p: torch.Tensor | None, q: torch.Tensor, uniform: Uniform, keep: float = 1.0) -> list[int]:
    """Tokens to commit. p [k, V] (None: the proposal was not drawn, its law is certain), q [k + 1, V].

    keep: weight w of the exact rule; below 1 more is accepted, min(1, 1 - w + w q / p), which trades bias for rejections (see `theory`).
    """
    for i, token in enumerate(proposal):
        if not accepts(1.0 if p is None else float(p[i, token]), float(q[i, token]), uniform(ACCEPT, i), keep):
            return [*proposal[:i], instead(token, None if p is None else p[i], q[i], uniform(AFTER, i))]
    return [*proposal, drawn(q[len(proposal)], uniform(AFTER, len(proposal)))]


def accepts(p: float, q: float, u: float, keep: float = 1.0) -> bool:
    """Whether a token that the draft gives probability p and the target q is kept, by the uniform number u."""
    return u * p < (1 - keep) * p + keep * q


def instead(token: int, p: torch.Tensor | None, q: torch.Tensor, u: float) -> int:
    """What takes the place of a token that was refused: drawn from (q - p)+. p, q [V]; p None: the token was certain."""
    left = _without(q, token) if p is None else torch.clamp(q - p, min=0)
    return drawn(left if left.sum() > 0 else q, u)


def block(proposal: Sequence[int], p: torch.Tensor, q: torch.Tensor, uniform: Uniform) -> list[int]:
    """Tokens to commit, verified jointly. p [k, V], q [k + 1, V]."""
    kept, ratio, at = 0, 1.0, 1.0
    for i, token in enumerate(proposal):
        ratio = min(1.0, ratio * float(q[i, token]) / max(float(p[i, token]), 1e-300))
        if i + 1 == len(proposal):
            least = ratio
        else:
            left = float(torch.clamp(ratio * q[i + 1] - p[i + 1], min=0).sum())
            least = left / max(left + 1 - ratio, 1e-300)
        if uniform(ACCEPT, i) < least:
            kept, at = i + 1, ratio
    law = q[kept] if kept == len(proposal) else torch.clamp(at * q[kept] - p[kept], min=0)
    return [*proposal[:kept], drawn(law if law.sum() > 0 else q[kept], uniform(AFTER, kept))]


def drawn(weights: torch.Tensor, u: float) -> int:
    """One index with probability proportional to weights [V], from one uniform number."""
    edges = weights.cumsum(-1)
    return min(int(torch.searchsorted(edges, u * float(edges[-1]), right=True)), int(weights.nonzero()[-1]))


def _without(q: torch.Tensor, token: int) -> torch.Tensor:
    left = q.clone()
    left[token] = 0
    return left


__all__ = ["ACCEPT", "AFTER", "DRAFT", "accepts", "block", "coupled", "drawn", "instead", "rejection"]
