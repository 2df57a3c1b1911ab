"""One step of beam search under a trie: from the log-probabilities of all tokens to each request's best beams.

On a CPU one call of C++ (native/trie.cpp); elsewhere, and where there is no compiler, gathers of static shape in torch with the same results: only
a node's children are looked at, never a mask over the vocabulary. Candidates are ordered by score, equal ones by beam and then by token, as
in brute-force search over masked log-probabilities [beams x vocabulary]. What cannot be chosen (log-probability minus infinity or NaN) is not
chosen: beams that are missing then are DEAD, with score minus infinity, and stay so.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from hasten.lm.constrain.trie import DEAD, Arrays, Trie
from hasten.lm.constrain.trie_filter import Filter, addresses, permits

Filters = Sequence[Filter | None]


@dataclass(slots=True)
class Beams:
    """states int32 [requests, beams]; depths int32 [requests], tokens so far; scores [requests, beams]: joint log-probabilities."""

    states: torch.Tensor
    depths: torch.Tensor
    scores: torch.Tensor

    @property
    def alive(self) -> torch.Tensor:
        """bool [requests, beams]"""
        return self.states != DEAD


@dataclass(slots=True)
class Step:
    """Best first: parents int64 [requests, most], the beams they come from; tokens int64, -1 where there is none (the beam's item had ended, or the
    beam is dead); beams after the step.
    """

    parents: torch.Tensor
    tokens: torch.Tensor
    beams: Beams


def begin(tries: Sequence[Trie], dtype: torch.dtype = torch.float32) -> Beams:
    """One beam a request at the root of its set."""
    device = tries[0].arrays.device
    states = torch.tensor([[t.root] for t in tries], dtype=torch.int32, device=device)
    return Beams(states, torch.zeros(len(tries), dtype=torch.int32, device=device), torch.zeros(len(tries), 1, dtype=dtype, device=device))


def step(arrays: Arrays, logp: torch.Tensor, beams: Beams, most: int, width: int, filters: Filters | None = None) -> Step:
    """The best `most` continuations of each request.

    logp [requests * beams, vocabulary]: float32 or float64 as the scores are, normalised by the model over the whole vocabulary. width: at least
    the most children of any state here (`Trie.branch` at its depth); C++ needs none. filters: which items a request may use, one or None a request.
    """
    if arrays.native is not None and logp.device.type == "cpu":
        return _native(arrays, logp, beams, most, filters)
    return _gathered(arrays, logp, beams, most, width, filters)


def _native(arrays: Arrays, logp: torch.Tensor, beams: Beams, most: int, filters: Filters | None) -> Step:
    from hasten.native import build

    requests, n = beams.states.shape
    logp = logp if logp.stride(-1) == 1 else logp.contiguous()
    states, depths, sums = beams.states.contiguous(), beams.depths.contiguous(), beams.scores.contiguous()
    scores = torch.empty(requests, most, dtype=sums.dtype)
    picked = torch.empty(2, requests, most, dtype=torch.int64)
    follow = torch.empty(requests, most, dtype=torch.int32)
    chosen = addresses(filters)
    build.library("trie").hasten_trie_step(
        arrays.native, logp.data_ptr(), logp.dtype == torch.float64, logp.stride(0), requests, n, most, states.data_ptr(), depths.data_ptr(),
        sums.data_ptr(), None if chosen is None else chosen.data_ptr(),
        scores.data_ptr(), picked[0].data_ptr(), picked[1].data_ptr(), follow.data_ptr(),
    )  # fmt: skip
    return Step(picked[0], picked[1], Beams(follow, depths + 1, scores))


def transitions(
    arrays: Arrays, states: torch.Tensor, depths: torch.Tensor, width: int, filters: Filters | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """states int32 [R], depths int32 [R] -> (tokens int64 [R, width], states int32, valid bool), padded with token 0 and DEAD.

    An item that has ended follows itself, with the token -1. filters: one or None for each of the R rows.
    """
    node = states.clamp(min=0).long()
    begin = arrays.first[node].long()
    count = (arrays.first[node + 1] - begin) * (states >= 0)
    slot = torch.arange(width, device=states.device)
    valid = slot < count[:, None]
    edge = torch.where(valid, begin[:, None] + slot, 0)
    tokens = torch.where(valid, arrays.tokens[edge].long() + arrays.base, 0)
    follow = torch.where(valid, arrays.next[edge], DEAD)
    leaf = (states < 0) & (states != DEAD)
    row = torch.where(leaf, ~states, 0).long()
    ended = depths >= (arrays.width if arrays.lengths is None else arrays.lengths[row])
    own = arrays.table[row, depths.clamp(max=arrays.width - 1).long()].long() + arrays.base
    tokens[:, 0] = torch.where(leaf, torch.where(ended, -1, own), tokens[:, 0])
    follow[:, 0] = torch.where(leaf, states, follow[:, 0])
    valid[:, 0] |= leaf
    if filters is not None:
        valid &= permits(filters, follow) | (tokens < 0)
        follow = torch.where(valid, follow, DEAD)
    return tokens, follow, valid


def _gathered(arrays: Arrays, logp: torch.Tensor, beams: Beams, most: int, width: int, filters: Filters | None) -> Step:
    many = None if filters is None else [f for f in filters for _ in range(beams.states.shape[1])]
    make = _triton() if logp.device.type == "cuda" else None
    scores, tokens, follow = (make or candidates)(arrays, logp, beams.states, beams.depths, beams.scores, width)
    if many is not None:
        scores = scores.masked_fill(~(permits(many, follow) | (tokens < 0)), float("-inf"))
    return _select(scores, tokens, follow, beams, most)


def candidates(
    arrays: Arrays, logp: torch.Tensor, states: torch.Tensor, depths: torch.Tensor, sums: torch.Tensor, width: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """states, sums [requests, beams], depths [requests] -> scores, tokens int64, next states int32, each [requests * beams, width]; scores are minus
    infinity where nothing may be chosen.
    """
    tokens, follow, valid = transitions(arrays, states.flatten(), depths.repeat_interleave(states.shape[1]), width)
    gained = torch.where(tokens < 0, 0, logp.gather(1, tokens.clamp(min=0)))
    scores = sums.reshape(-1, 1) + gained
    return scores.masked_fill(~valid | scores.isnan(), float("-inf")), tokens, follow


@functools.cache
def _triton() -> Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]] | None:
    """The same as one kernel, where Triton is installed."""
    try:
        from hasten.lm.constrain import trie_triton
    except ImportError:
        return None
    return trie_triton.candidates


def _select(scores: torch.Tensor, tokens: torch.Tensor, follow: torch.Tensor, beams: Beams, most: int) -> Step:
    requests, width = len(beams.states), scores.shape[1]
    best, place = _best(scores.view(requests, -1), most)
    dead = best == float("-inf")
    chosen = [torch.where(dead, fill, x.view(requests, -1).gather(1, place)) for x, fill in ((tokens, -1), (follow, DEAD))]
    return Step(torch.where(dead, 0, place // width), chosen[0], Beams(chosen[1], beams.depths + 1, best))


def _best(scores: torch.Tensor, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest of each row, the first of equal ones, padded with minus infinity (torch.topk leaves open which of equal ones it takes)."""
    if scores.shape[1] < most:
        scores = torch.nn.functional.pad(scores, (0, most - scores.shape[1]), value=float("-inf"))
    best, place = scores.sort(dim=1, descending=True, stable=True)
    place = place[:, :most]
    return best[:, :most], place.where(best[:, :most] > float("-inf"), 0)


def walk(arrays: Arrays, states: torch.Tensor, tokens: torch.Tensor, width: int, depths: torch.Tensor | None = None) -> torch.Tensor:
    """States int32 [R] after following tokens int64 [R, n] from states [R] at depths [R] (default 0); DEAD where they lead nowhere."""
    states = states.clone()
    depths = torch.zeros_like(states) if depths is None else depths.clone()
    if arrays.native is not None:
        from hasten.native import build

        tokens = tokens.contiguous()
        build.library("trie").hasten_trie_walk(
            arrays.native, len(states), states.data_ptr(), depths.data_ptr(), tokens.data_ptr(), tokens.stride(0), tokens.shape[1]
        )
        return states
    for column in range(tokens.shape[1]):
        offered, follow, valid = transitions(arrays, states, depths, width)
        hit = valid & (offered == tokens[:, column, None]) & (offered >= 0)
        states = torch.where(hit.any(1), follow.gather(1, hit.long().argmax(1, keepdim=True))[:, 0], DEAD)
        depths = depths + 1
    return states


def mask(
    arrays: Arrays, states: torch.Tensor, depths: torch.Tensor, vocabulary: int, width: int, filters: Filters | None = None
) -> torch.Tensor:
    """bool [R, vocabulary], true where a token may follow: the form that foreign engines want. All false: the state is dead or its item has ended."""
    if arrays.native is not None:
        from hasten.native import build

        out, chosen = torch.empty(len(states), vocabulary, dtype=torch.bool), addresses(filters)
        states, depths = states.contiguous(), depths.contiguous()
        build.library("trie").hasten_trie_mask(
            arrays.native,
            len(states),
            states.data_ptr(),
            depths.data_ptr(),
            None if chosen is None else chosen.data_ptr(),
            out.data_ptr(),
            vocabulary,
        )
        return out
    tokens, _, valid = transitions(arrays, states, depths, width, filters)
    valid &= tokens >= 0
    out = torch.zeros(len(states), vocabulary + 1, dtype=torch.bool, device=states.device)  # a last column for what is not valid
    return out.scatter_(1, torch.where(valid, tokens, vocabulary), True)[:, :vocabulary]
