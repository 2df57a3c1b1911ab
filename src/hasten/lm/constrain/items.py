"""Answers from a set of items (`trie`): what is committed is always the beginning of an item, and an answer that ends is one.

The set is an artifact (`hasten.lm.constrain.trie.build(...).save(DIR)`), or a file of token tuples: `.npy` with an array [N, L], or `.jsonl`
with one list of tokens a line. It may be replaced while requests run (`swap`): each goes on with the set that it began with.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hasten.values import Request, UserError

if TYPE_CHECKING:
    import torch

    from hasten.lm.constrain.trie import Trie


@dataclass(frozen=True)
class Options:
    """items: a saved set (DIR, or DIR#digest), or a file of token tuples (.npy or .jsonl). end: put the model's end token after each item of a
    file, so that one item may begin another; without it an answer may end, and must, where an item does.
    """

    items: str = ""
    end: bool = False


class State(NamedTuple):
    """A place in a version of the set: the trie's own state, and how many tokens were taken."""

    trie: Trie
    at: int
    depth: int


class Items:
    """Permits the tokens that lead to an item, and the model's end where an item is whole. end_ids: the model's."""

    def __init__(self, trie: Trie, end_ids: Sequence[int]) -> None:
        self.trie, self.end_ids = trie, tuple(end_ids)

    def swap(self, trie: Trie) -> None:
        """Another set, or another version, for the requests that begin from now on."""
        if trie.vocabulary != self.trie.vocabulary:
            raise UserError(f"trie: made for a vocabulary of {trie.vocabulary} tokens, and the model has {self.trie.vocabulary}")
        self.trie = trie

    def check(self, request: Request) -> None:
        """UserError where a request asks for what no item of the set allows."""
        s, shortest = request.sampling, self.trie.shortest - (self.trie.end is not None)
        if s.min_tokens > shortest:
            raise UserError(f"trie: min_tokens={s.min_tokens}, but the set has an item of {shortest} tokens")
        if s.min_tokens and s.stop_token_ids:
            raise UserError("trie: min_tokens and stop_token_ids together could leave no token to choose")

    def start(self, prompt: Sequence[int]) -> Hashable:
        return State(self.trie, self.trie.root, 0)

    def permits(self, state: Any, token: int) -> bool:
        return token in self.end_ids if self._whole(state) else state.trie.child(state.at, state.depth, token) is not None

    def advance(self, state: Any, token: int) -> Hashable:
        if self._whole(state):
            return state
        child = state.trie.child(state.at, state.depth, token)
        if child is None:
            raise ValueError(f"token {token} was committed, and no item goes on with it: a bug, it was masked")
        return State(state.trie, child, state.depth + 1)

    def mask(self, states: Sequence[Any], vocabulary: int, device: torch.device) -> torch.Tensor:
        import torch

        from hasten.lm.constrain import trie_step

        out = torch.zeros(len(states), vocabulary, dtype=torch.bool, device=device)
        for trie in dict.fromkeys(s.trie for s in states):
            rows = [i for i, s in enumerate(states) if s.trie is trie]
            here = trie.arrays.device
            at = torch.tensor([states[i].at for i in rows], dtype=torch.int32, device=here)
            depths = torch.tensor([states[i].depth for i in rows], dtype=torch.int32, device=here)
            out[rows] = trie_step.mask(trie.arrays, at, depths, vocabulary, max(trie.branch)).to(device)
        for i, state in enumerate(states):
            if self._whole(state):
                out[i, list(self.end_ids)] = True
        return out

    def _whole(self, state: State) -> bool:
        return state.at < 0 and state.depth >= state.trie.length_of(~state.at)


def read(path: str, vocabulary: int, end: int | None) -> Trie:
    """The set of a directory or file; UserError says what is wrong with it, and in which line."""
    from hasten.lm.constrain import trie

    file = Path(path.partition("#")[0])
    if file.suffix == ".npy" and file.is_file():
        import numpy as np

        try:
            return trie.build(np.load(file, mmap_mode="r", allow_pickle=False), vocabulary, end=end)
        except (ValueError, OSError, EOFError) as e:
            if isinstance(e, UserError):
                raise
            raise UserError(f"{path}: no array of numbers ({' '.join(str(e).split())[:100]})") from None
    if file.suffix == ".jsonl" and file.is_file():
        return trie.build([_line(path, i, line) for i, line in enumerate(file.read_text("utf-8").splitlines(), 1)], vocabulary, end=end)
    if file.is_file():
        raise UserError(f"{path}: a file of items is .npy or .jsonl")
    return trie.load(path, vocabulary)


def _line(path: str, number: int, line: str) -> list[Any]:
    try:
        item = json.loads(line)
    except json.JSONDecodeError:
        item = None
    if not isinstance(item, list):
        raise UserError(f"{path}: line {number} is not a list of tokens")
    return item


def build(options: Options, target: Any) -> Items:
    """target: has `vocabulary` (number of ids) and `end_ids` of the model."""
    if not options.items:
        raise UserError("trie: needs a set of items: trie(items=DIR)")
    if not target.end_ids:
        raise UserError("trie: the model has no end token, so an answer could not end where an item does")
    return Items(read(options.items, target.vocabulary, target.end_ids[0] if options.end else None), target.end_ids)
