"""The verifier: how much of a proposal is committed, and what follows it. p is the draft's law at a position, q the target's, both processed
(temperature, truncation, penalties), in float64.

* `coupled`: the target chooses at every position with that position's own noise, and a proposal is kept while it agrees (of a tree the path
  that agrees; nodes of one depth share their noise). What is committed is
  exactly what the target would have chosen one token at a time with the same noise, so output is identical to plain decoding at any
  temperature and whatever was proposed (Daliri et al. 2024, arXiv:2408.07978; transformers' rule for proposals without laws, made
  reproducible). A draft that draws with the same noise agrees with probability at least (1 - TV) / (1 + TV).
* `rejection`: accept x with probability min(1, q(x) / p(x)), else draw from (q - p)+ (Leviathan et al. 2023, arXiv:2211.17192): agrees with
  probability 1 - TV, the most there is token by token; output has the target's law, but depends on what was proposed.
* `rounds`: the same over a tree, child after child, each refusal leaving (q - p)+ to the next (Miao et al. 2023, SpecInfer, arXiv:2305.09781);
  children are drawn without replacement, so p loses what was refused as well (Chen et al. 2024, Sequoia, arXiv:2402.12374).
* `block`: accept the longest prefix that may be kept jointly (Sun et al. 2024, arXiv:2403.10444): never fewer tokens than `rejection`.

All random numbers of a round are keyed by where the round started as well: a number that has decided something once is never used again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from hasten.lm.decode import coupled
from hasten.lm.tree import ROOT, Tree

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


def rounds(tree: Tree, p: Mapping[int, torch.Tensor], q: torch.Tensor, uniform: Uniform) -> list[int]:
    """Tokens to commit. p: by node (ROOT too) the law [V] that its children were drawn from, in their order and without replacement; a node
    that has none there got its children for certain. q [nodes + 1, V], after the root and after each node.
    """
    out: list[int] = []
    node: int | None = ROOT
    while node is not None:
        at, law = node, q[node + 1]
        node, law = _next(tree, at, p.get(at), law, uniform)
        out.append(drawn(law, uniform(AFTER, at + 1)) if node is None else tree.tokens[node])
    return out


def _next(tree: Tree, at: int, drafted: torch.Tensor | None, law: torch.Tensor, uniform: Uniform) -> tuple[int | None, torch.Tensor]:
    """(the child of a node that is kept, or None; what is left of the target's law after those that are not)."""
    for child in tree.children.get(at, ()):
        token = tree.tokens[child]
        if uniform(ACCEPT, child) * (1.0 if drafted is None else float(drafted[token])) < float(law[token]):
            return child, law
        left = _without(law, token) if drafted is None else torch.clamp(law - drafted, min=0)
        law = left / left.sum() if left.sum() > 0 else law
        if drafted is not None:
            rest = _without(drafted, token)
            drafted = rest / rest.sum().clamp(min=1e-300)
    return None, law


def several(law: torch.Tensor, n: int, uniform: Callable[[int], float]) -> list[int]:
    """At most n tokens drawn without replacement from a law [V], by uniform(0), uniform(1), ...: fewer where no more have a probability."""
    out: list[int] = []
    while len(out) < n and law.sum() > 0:
        out.append(drawn(law, uniform(len(out))))
        law = _without(law, out[-1])
    return out


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


__all__ = ["ACCEPT", "AFTER", "DRAFT", "accepts", "block", "coupled", "drawn", "instead", "rejection", "rounds", "several"]
