"""Problems as rows of tokens: several documents are packed in a row, so that every step of training has one shape."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.rng import key
from hasten.zoo import arith, tokenizer

ROW = 176  # tokens a row: two problems whose K sum to seven fill 172 to 176


@dataclass(frozen=True, slots=True)
class Batch:
    """ids, positions, documents [B, 176] int64; targets [B, 176]: the next token where it belongs to a solution, else -100."""

    ids: Tensor
    positions: Tensor
    documents: Tensor
    targets: Tensor

    def mask(self) -> Tensor:
        """[B, 1, T, T] bool: a token sees its own document up to itself."""
        return document_mask(self.documents)


def document_mask(documents: Tensor) -> Tensor:
    causal = torch.ones(documents.shape[1], documents.shape[1], dtype=torch.bool).tril()
    return ((documents[:, :, None] == documents[:, None, :]) & causal)[:, None]


def length(k: int) -> int:
    """Tokens of a problem with K = k, <bos> and <eos> included."""
    return 39 if k == 1 else 25 + 18 * k


def tokens(problem: arith.Problem, solution: str | None = None) -> tuple[list[int], int]:
    """Tokens of a problem and its solution (or another) from <bos> to <eos>, and how many of them are prompt."""
    prompt = tokenizer.encode(problem.prompt, bos=True)
    return prompt + tokenizer.encode(solution or problem.solution, eos=True), len(prompt)


def batch(seed: int, step: int, rows: int, most: int, slips: bool = False) -> Batch:
    """Training batch of one step: a pure function of its arguments. K is uniform in 1..most; slips: solutions are `arith.slipped`."""
    ids = torch.zeros(rows, ROW, dtype=torch.int64)
    positions, documents, targets = torch.zeros_like(ids), torch.zeros_like(ids), torch.full_like(ids, -100)
    for row in range(rows):
        start = 0
        for d, k in enumerate(_sizes(seed, step, row, most)):
            index = (step * rows + row) * 16 + d
            problem = arith.sample_problem(seed, index, "train", k=k)
            doc, prompt = tokens(problem, arith.slipped(problem, seed, index) if slips else None)
            stop = start + len(doc)
            ids[row, start:stop] = torch.tensor(doc)
            positions[row, start:stop] = torch.arange(len(doc))
            documents[row, start:stop] = d + 1
            targets[row, start + prompt - 1 : stop - 1] = torch.tensor(doc[prompt:])
            start = stop
    return Batch(ids, positions, documents, targets)


def _sizes(seed: int, step: int, row: int, most: int) -> list[int]:
    """K of each document of a row: k and most + 1 - k, so that K is uniform, and then whatever fits."""
    k = 1 + key(seed, step, row, "k") % most
    sizes: list[int] = []
    room = ROW
    while True:
        for n in (k, most + 1 - k):
            if length(n) > room:
                return sizes
            sizes.append(n)
            room -= length(n)
        k = 1 + k % most
