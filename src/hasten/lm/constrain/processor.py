"""The trie in other engines: what transformers' `generate` takes in place of `prefix_allowed_tokens_fn`, and the part that vLLM's plug-in shares.

Rows are masked over the whole vocabulary, for that is the form these engines have. Scores keep their values where a token is allowed. No row is ever
left without a token: where an item is whole, and where a row has left the set (it is padding), only the end tokens are allowed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hasten.lm.constrain.trie import DEAD, Trie
from hasten.lm.constrain.trie_filter import Filter
from hasten.lm.constrain.trie_step import mask, walk
from hasten.values import UserError


def allowed(
    trie: Trie, states: torch.Tensor, depths: torch.Tensor, end_ids: Sequence[int], vocabulary: int, keep: Filter | None = None
) -> torch.Tensor:
    """bool [R, vocabulary] for states and depths int32 [R]; the end tokens alone where no token of an item may follow."""
    filters = None if keep is None else [keep] * len(states)
    out = mask(trie.arrays, states, depths, vocabulary, max(trie.branch), filters)
    over = ~out.any(1)
    for end in end_ids:
        out[:, end] |= over
    return out


class TrieLogitsProcessor:
    """For `generate(logits_processor=LogitsProcessorList([TrieLogitsProcessor(...)]))`, greedy, sampling or beams.

    prompt: tokens of the prompt, padding on the left included: what follows it is the item. It keeps no state: a row's place in the set is found from
    its tokens, so beams may change places. keep: which items may be found.
    """

    def __init__(self, trie: Trie, prompt: int, end_ids: int | Sequence[int], keep: Filter | None = None) -> None:
        self.trie, self.prompt, self.keep = trie, prompt, keep
        self.end_ids = (end_ids,) if isinstance(end_ids, int) else tuple(end_ids)
        if not self.end_ids or not 0 <= min(self.end_ids) <= max(self.end_ids) < trie.vocabulary:
            raise UserError(f"trie: end_ids={self.end_ids} are no tokens of a vocabulary of {trie.vocabulary}")

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """input_ids [rows, length], scores [rows, vocabulary] -> scores, minus infinity where no item goes on."""
        arrays = self.trie.arrays
        taken = input_ids[:, self.prompt :].to(arrays.device)
        roots = torch.full((len(taken),), self.trie.root, dtype=torch.int32, device=arrays.device)
        states = walk(arrays, roots, taken, max(self.trie.branch))
        depths = torch.full_like(states, taken.shape[1])
        keep = allowed(self.trie, states, depths, self.end_ids, scores.shape[1], self.keep)
        return scores.masked_fill(~keep.to(scores.device), float("-inf"))


class Places:
    """Where the requests of a batch stand, by row: for engines that say which rows came, went and moved, and whose token lists grow."""

    def __init__(self) -> None:
        self.rows: dict[int, tuple[Trie, Sequence[int], int, int]] = {}  # set, tokens so far, how many of them were followed, state

    def put(self, row: int, trie: Trie, tokens: Sequence[int]) -> None:
        self.rows[row] = (trie, tokens, 0, trie.root)

    def drop(self, row: int) -> None:
        self.rows.pop(row, None)

    def move(self, a: int, b: int, swap: bool) -> None:
        one, two = self.rows.pop(a, None), self.rows.pop(b, None)
        if one is not None:
            self.rows[b] = one
        if two is not None and swap:
            self.rows[a] = two

    def masked(self, logits: torch.Tensor, end_ids: Sequence[int]) -> torch.Tensor:
        """logits [rows, vocabulary], changed in place: minus infinity where no item goes on; rows that were not put are left alone."""
        for row, (trie, tokens, seen, state) in self.rows.items():
            for token in tokens[seen:]:
                child = trie.child(state, seen, int(token)) if state != DEAD else None
                state, seen = DEAD if child is None else child, seen + 1
            self.rows[row] = (trie, tokens, seen, state)
        for trie in dict.fromkeys(place[0] for place in self.rows.values()):
            some = [(row, place[3], place[2]) for row, place in self.rows.items() if place[0] is trie]
            where, states, depths = (torch.tensor(x, dtype=torch.int32, device=trie.arrays.device) for x in zip(*some, strict=True))
            keep = allowed(trie, states, depths, end_ids, logits.shape[1]).to(logits.device)
            at = where.long().to(logits.device)
            logits[at] = logits[at].masked_fill(~keep, float("-inf"))
        return logits
