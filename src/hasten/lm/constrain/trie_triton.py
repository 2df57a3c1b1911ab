"""The candidates of a step as one Triton kernel for GPUs: what takes a dozen launches in torch, with the same results.

One program a beam: the node's slice of edges, their children, their log-probabilities and the sums, or the one token of a row. Its shapes are
static, and root, states and depths are numbers in tensors, so a captured graph goes on being valid when a set is swapped within its arrays.
Without a GPU the kernel runs in Triton's interpreter (TRITON_INTERPRET=1), which is how it is tested there.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from hasten.lm.constrain.trie import DEAD, Arrays

BLOCK = 128


@triton.jit
def _candidates(
    first, tokens, follow, table, lengths, logp, states, depths, sums, out_scores, out_tokens, out_follow, base, columns, stride, beams,
    width: tl.constexpr, ragged: tl.constexpr, dead: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0)
    state, depth, total = tl.load(states + r), tl.load(depths + r // beams), tl.load(sums + r)
    node = tl.where(state >= 0, state, 0)
    begin = tl.load(first + node)
    count = tl.where(state >= 0, tl.load(first + node + 1) - begin, 0)
    leaf = (state < 0) & (state != dead)
    row = tl.where(leaf, -1 - state, 0).to(tl.int64)
    length = columns
    if ragged:
        length = tl.load(lengths + row).to(tl.int32)
    ended = leaf & (depth >= length)
    own = tl.load(table + row * columns + tl.minimum(depth, columns - 1)).to(tl.int32) + base
    gained = tl.load(logp + r.to(tl.int64) * stride + own)
    own_score = tl.where(ended, total, total + gained)
    own = tl.where(ended, -1, own)
    for at in range(0, width, block):
        k = at + tl.arange(0, block)
        mine = k < count
        token = tl.load(tokens + begin + k, mask=mine, other=0).to(tl.int32) + base
        child = tl.load(follow + begin + k, mask=mine, other=dead)
        score = total + tl.load(logp + r.to(tl.int64) * stride + token, mask=mine, other=float("-inf"))
        only = leaf & (k == 0)
        score = tl.where(only, own_score, tl.where(mine, score, float("-inf")))
        score = tl.where(score == score, score, float("-inf"))  # NaN is not chosen
        to = r.to(tl.int64) * width + k
        tl.store(out_scores + to, score, mask=k < width)
        tl.store(out_tokens + to, tl.where(only, own, tl.where(mine, token, 0)).to(tl.int64), mask=k < width)
        tl.store(out_follow + to, tl.where(only, state, child), mask=k < width)


def candidates(
    arrays: Arrays, logp: torch.Tensor, states: torch.Tensor, depths: torch.Tensor, sums: torch.Tensor, width: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """states, sums [requests, beams], depths [requests] -> scores, tokens int64, next states int32, each [requests * beams, width]; scores are minus
    infinity where nothing may be chosen.
    """
    rows, beams = states.numel(), states.shape[1]
    like: dict[str, Any] = {"device": logp.device}
    scores = torch.empty(rows, width, dtype=sums.dtype, **like)
    tokens, follow = torch.empty(rows, width, dtype=torch.int64, **like), torch.empty(rows, width, dtype=torch.int32, **like)
    a, block = arrays, min(BLOCK, max(16, triton.next_power_of_2(width)))
    _candidates[(rows,)](
        a.first, a.tokens, a.next, a.table, a.first if a.lengths is None else a.lengths, logp, states.contiguous(), depths.contiguous(),
        sums.contiguous(), scores, tokens, follow, a.base, a.width, logp.stride(0), beams,
        width=width, ragged=a.lengths is not None, dead=DEAD, block=block,
    )  # fmt: skip
    return scores, tokens, follow
