"""What a rival of `bench/cpu.py` does: it is a process of its own, so that the rivals' libraries and threads do not meet.

    python RIVAL.py convert FOLDER KIND          writes the model in the rival's own form, once; not all need it
    python RIVAL.py serve FOLDER KIND THREADS    loads it, writes {"ready": facts}, then answers each line of JSON with one

{"fill": [rows, context]}          forgets everything, computes so many prompts         -> {"seconds": s}
{"steps": n}                       goes on from there, one greedy token a row and step  -> {"seconds": [n], "passes": [n]}
{"prefill": n}                     computes one prompt of n tokens after forgetting     -> {"seconds": s}
{"greedy": [prompts], "steps": n}  prompts of one length, then n greedy steps           -> {"tokens": [rows][n], "logits": [rows][vocabulary]}

A step is tokens in, next tokens out: choosing is part of it. `passes` are the seconds inside the model's pass alone.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np


class Rival:
    """facts: version and formats, for the table. logits: of the last pass, [rows, vocabulary]. tokens: chosen from them, a row each."""

    facts: dict[str, Any]
    logits: np.ndarray
    tokens: Sequence[int]

    def forget(self) -> None:
        """Drop all rows."""
        raise NotImplementedError

    def prompt(self, rows: Sequence[Sequence[int]]) -> None:
        """Compute prompts of one length."""
        raise NotImplementedError

    def forward(self) -> None:
        """Compute one step of all rows from `tokens`."""
        raise NotImplementedError

    def step(self) -> float:
        """One greedy step; the seconds of its pass."""
        began = time.perf_counter()
        self.forward()
        inside = time.perf_counter() - began
        self.choose()
        return inside

    def choose(self) -> None:
        self.tokens = self.logits.argmax(-1).tolist()


def main(load: Callable[[Path, str, int], Rival], convert: Callable[[Path, str], Any] | None = None) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    verb, folder, kind, *rest = sys.argv[1:]
    if verb == "convert" and convert is not None:
        convert(Path(folder), kind)
        return
    rival = load(Path(folder), kind, int(rest[0]))
    fill(rival, 1, 4)  # what is made on first use is part of the start
    rival.step()
    print(json.dumps({"ready": rival.facts}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(rival, json.loads(line))), file=answers, flush=True)


def answer(rival: Rival, ask: dict[str, Any]) -> dict[str, Any]:
    if "fill" in ask:
        return {"seconds": fill(rival, *ask["fill"])}
    if "prefill" in ask:
        return {"seconds": fill(rival, 1, ask["prefill"])}
    if "greedy" in ask:
        return greedy(rival, ask["greedy"], ask["steps"])
    return steps(rival, ask["steps"])


def fill(rival: Rival, rows: int, context: int) -> float:
    prompts = np.random.default_rng(rows).integers(1, 900, (rows, context)).tolist()
    rival.forget()
    began = time.perf_counter()
    rival.prompt(prompts)
    return time.perf_counter() - began


def steps(rival: Rival, n: int) -> dict[str, Any]:
    seconds, passes = [], []
    for _ in range(n):
        began = time.perf_counter()
        passes.append(rival.step())
        seconds.append(time.perf_counter() - began)
    return {"seconds": seconds, "passes": passes}


def greedy(rival: Rival, prompts: list[list[int]], n: int) -> dict[str, Any]:
    """tokens: those that the last logits are conditioned on, in addition to the prompts."""
    rival.forget()
    rival.prompt(prompts)
    tokens = []
    for _ in range(n):
        tokens.append(list(rival.tokens))
        rival.step()
    return {"tokens": [list(row) for row in zip(*tokens, strict=True)], "logits": rival.logits.astype(float).tolist()}
