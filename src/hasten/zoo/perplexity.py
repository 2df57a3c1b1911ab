"""Measuring the text models: how well each predicts held-out files, and how well the small one drafts for the large one.

A held-out text is cut into windows of 512 tokens, each on its own, so a token has 256 before it on average. A drafted token is accepted with
probability 1 - TV(draft, target), the total variation distance of the two models' next-token distributions (Leviathan et al. 2022, 2211.17192,
theorem 3.5), and at temperature 0 where both find the same token likeliest. Both rates here are means over positions of held-out text.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from hasten.zoo import NAMES, path, python, sample
from hasten.zoo.model import Llama
from hasten.zoo.tokenizer import SPECIAL

if TYPE_CHECKING:
    from tokenizers import Tokenizer

WINDOW, ROWS = 512, 8
SLICE = ("bisect.py", "codeop.py", "lzma.py", "netrc.py")  # of the calibration split, and much the same in all versions of Python


def evaluate(name: str, n: int = 2000, directory: str | Path | None = None) -> dict:
    """Perplexity a token and bits a byte on n windows of the test files (all if there are fewer), and the pair's rates of acceptance.

    `slice` is the perplexity on a few files that hardly differ between versions of Python: what the tests check.
    """
    start = time.process_time()
    model, words = sample.load(name, directory), python.tokenizer(directory or path(name))
    cut = shuffled(windows_of(words, python.files("test")))[:n]
    nats = mean_nats(model, cut)
    result = {
        "name": name,
        "n": len(cut),
        "perplexity": round(math.exp(nats), 3),
        "bits_per_byte": round(nats / math.log(2) * cut[:, 1:].numel() / sizes(words)[cut[:, 1:]].sum().item(), 4),
        "slice": {"files": list(SLICE), "perplexity": round(math.exp(mean_nats(model, windows_of(words, SLICE))), 3)},
    }
    return result | pair(name, model, cut) | {"cpu_seconds": round(time.process_time() - start, 1)}


def pair(name: str, model: Llama, cut: Tensor) -> dict:
    """Rates of acceptance of the smaller model's tokens by each model that began from it, or by this one; {} without a partner."""
    start = NAMES[name].start
    partners = [start] if start else [other for other, s in NAMES.items() if s.start == name]
    found = {}
    for other in partners:
        try:
            sampled, greedy = acceptance(model, sample.load(other), cut)
        except ValueError:  # its weights are not here
            continue
        found[f"with {other}"] = {"acceptance": round(sampled, 4), "greedy_acceptance": round(greedy, 4)}
    return found


def shuffled(cut: Tensor) -> Tensor:
    """The windows in a fixed random order, so that the first n are a sample of all files."""
    return cut[torch.randperm(len(cut), generator=torch.Generator().manual_seed(0))]


def windows_of(words: Tokenizer, some: Sequence[str]) -> Tensor:
    """[n, WINDOW + 1]: windows of some files, with the token that follows each."""
    return python.windows(python.stream(words, some), WINDOW)


def sizes(words: Tokenizer) -> Tensor:
    """[vocabulary] bytes that each token stands for: one a letter of the byte-level alphabet, none for a special token."""
    found = words.get_vocab()
    out = torch.zeros(len(found), dtype=torch.int64)
    for word, i in found.items():
        out[i] = 0 if word in SPECIAL else len(word)
    return out


@torch.inference_mode()
def logs(model: Llama, cut: Tensor) -> Iterator[Tensor]:
    """Log-probabilities [rows, WINDOW, vocabulary] of the windows, some rows at a time."""
    for part in cut.split(ROWS):
        ids = part[:, :-1]
        yield model.logits(model(ids, torch.arange(ids.shape[1]), None)).log_softmax(-1)


def mean_nats(model: Llama, cut: Tensor) -> float:
    """Mean of -log p of the windows' tokens."""
    total = 0.0
    for log, part in zip(logs(model, cut), cut.split(ROWS), strict=True):
        total += F.nll_loss(log.flatten(0, 1), part[:, 1:].flatten(), reduction="sum").item()
    return total / cut[:, 1:].numel()


def acceptance(a: Llama, b: Llama, cut: Tensor) -> tuple[float, float]:
    """Means over positions of 1 - TV of the two distributions (the overlap: the sum of the lesser probabilities), and of equal argmax."""
    overlap = same = 0.0
    for p, q in zip(logs(a, cut), logs(b, cut), strict=True):
        overlap += torch.minimum(p, q).exp().sum().item()
        same += (p.argmax(-1) == q.argmax(-1)).sum().item()
    return overlap / cut[:, 1:].numel(), same / cut[:, 1:].numel()
