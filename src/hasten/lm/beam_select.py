"""One step of beam search over the whole vocabulary: what `constrain.trie_step` does where no item set says what may follow."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hasten.lm.constrain.trie import DEAD
from hasten.lm.constrain.trie_step import Beams, Step

LIVE, ENDED = 0, -1


def begin(dtype: torch.dtype, device: torch.device) -> Beams:
    """One beam of one request."""
    one = torch.zeros(1, 1, device=device)
    return Beams(one.int(), torch.zeros(1, dtype=torch.int32, device=device), one.to(dtype))


def step(logp: torch.Tensor, beams: Beams, most: int, end_ids: Sequence[int]) -> Step:
    """The best `most` continuations of one request; logp [beams, vocabulary], states [1, beams] LIVE or ENDED. A beam ends with an end token."""
    ended = beams.states[0] == ENDED
    scores = beams.scores[0][:, None] + logp
    scores = scores.nan_to_num(float("-inf"), float("inf"), float("-inf")).masked_fill(ended[:, None], float("-inf"))
    scores[:, 0] = torch.where(ended, beams.scores[0], scores[:, 0])
    place = largest(scores.flatten(), most)
    best, parents, tokens = scores.flatten()[place], place // logp.shape[1], place % logp.shape[1]
    stays, dead = ended[parents], best == float("-inf")
    over = stays | torch.isin(tokens, torch.tensor([*end_ids], dtype=torch.long, device=logp.device))
    states = torch.where(dead, DEAD, torch.where(over, ENDED, LIVE)).int()
    return Step(parents[None], torch.where(stays | dead, -1, tokens)[None], Beams(states[None], beams.depths + 1, best[None]))


def largest(x: torch.Tensor, most: int) -> torch.Tensor:
    """Places of the largest of x [N], in order, the first of equal ones first (torch.topk leaves that open)."""
    most = min(most, len(x))
    least = x.topk(most).values[-1]
    above, equal = (x > least).nonzero()[:, 0], (x == least).nonzero()[:, 0]
    some = torch.cat([above, equal[: most - len(above)]])
    return some[x[some].sort(descending=True, stable=True).indices] if len(above) else some
