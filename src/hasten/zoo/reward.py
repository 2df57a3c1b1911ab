"""The process reward model, trained as Math-Shepherd's (Wang et al. 2023, 2312.08935): labels are rollouts, not a checker.

Policies sample solutions at temperature 1; from each step's end a completer samples a few continuations, and the share that reach the right
answer is the soft label of the prefix that ends there. A finished solution's label is whether its answer is right, and more solutions
get that label only. The model is a frozen policy with two
trained layers on top: they compare what a step says with what the policy expected there.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from hasten.rng import key
from hasten.zoo import arith, sample, tokenizer
from hasten.zoo.model import Llama

POLICIES = {"arith-xs": 2, "arith-s": 6, "arith-m": 4}  # solutions of each for a problem
ROLLED = 6  # of each policy's solutions for a problem, how many get rollouts; the others are labelled at their end only
COMPLETER, ROLLOUTS, TEMPERATURE = "arith-m", 2, 0.5
PROBLEMS, CHUNK = 1000, 50
BATCH = 24  # solutions a step
EPOCH_SEED = 77


@dataclass(slots=True)
class Labelled:
    """A prompt and solution, positions of its delimiters in the whole row, and the label of each."""

    ids: list[int]
    at: list[int]
    labels: list[float]


def delimiters(prompt: list[int], solution: list[int]) -> list[int]:
    """Where rewards stand in prompt + solution: at each ` ;` of the solution, and at its last token."""
    return [len(prompt) + i for i, t in enumerate(solution) if t == tokenizer.STEP_END] + [len(prompt) + len(solution) - 1]


def problem(index: int) -> arith.Problem:
    """Problem of the reward model's stream: structures of the training split, numbers uniform."""
    return arith.sample_problem(EPOCH_SEED, index, "train", skew=False)


def label(chunk: int, policies: dict[str, Llama], completer: Llama) -> list[Labelled]:
    """Sample and label the solutions of one chunk of problems; a pure function of the chunk's number and the models."""
    ps = [problem(chunk * CHUNK + i) for i in range(CHUNK)]
    prompts = [tokenizer.encode(p.prompt, bos=True) for p in ps]
    prefixes: list[list[int]] = []
    answers: list[str] = []
    rows: list[Labelled] = []
    for name, copies in POLICIES.items():
        drawn = sample.sample(policies[name], prompts, 1.0, key(chunk, name) >> 1, copies=copies)
        for p, prompt, solutions in zip(ps, prompts, drawn, strict=True):
            for i, s in enumerate({tuple(s): s for s in solutions}.values()):
                outcome = float(arith.answer_of(tokenizer.decode(s)) == p.answer)
                row = Labelled(prompt + s, delimiters(prompt, s), [outcome])
                if i >= ROLLED:
                    row.at = row.at[-2:]
                    row.labels = [outcome] * len(row.at)
                else:
                    prefixes += [row.ids[: j + 1] for j in row.at[:-1]]
                    answers += [p.answer] * (len(row.at) - 1)
                rows.append(row)
    rolled = sample.sample(completer, prefixes, TEMPERATURE, key(chunk, "rollout") >> 1, copies=ROLLOUTS)
    shares = iter([sum(_reaches(p, r, a) for r in rs) / ROLLOUTS for p, rs, a in zip(prefixes, rolled, answers, strict=True)])
    for row in rows:
        if len(row.labels) < len(row.at):
            row.labels = [next(shares) for _ in row.at[:-1]] + row.labels
    return rows


def _reaches(prefix: list[int], rest: list[int], answer: str) -> bool:
    return arith.answer_of(tokenizer.decode(rest)) == answer or arith.answer_of(tokenizer.decode(prefix)) == answer


def labels(name: str, chunks: int, until: float | None, progress: Callable[[dict], None] | None = None) -> list[Labelled]:
    """All labelled solutions, from the cache where a chunk is there; stops making new ones at monotonic time `until`."""
    from hasten.zoo.train import cache

    folder = cache(name) / "labels"
    folder.mkdir(parents=True, exist_ok=True)
    policies: dict[str, Llama] = {}
    rows: list[Labelled] = []
    for chunk in range(chunks):
        file = folder / f"{chunk:04d}.json"
        if not file.is_file():
            if until is not None and time.monotonic() > until:
                break
            policies = policies or {n: sample.load(n) for n in POLICIES}
            made = label(chunk, policies, policies[COMPLETER])
            part = file.with_suffix(".part")
            part.write_text(json.dumps([[r.ids, r.at, r.labels] for r in made]))
            part.rename(file)
            if progress:
                progress({"labelled": chunk + 1, "of": chunks})
        rows += [Labelled(*r) for r in json.loads(file.read_text())]
    return rows


def loss_of(model: Llama, rows: list[Labelled]) -> Tensor:
    """Binary cross-entropy, the mean over delimiters."""
    width = max(len(r.ids) for r in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    where, target = [], []
    for i, r in enumerate(rows):
        ids[i, : len(r.ids)] = torch.tensor(r.ids)
        where += [i * width + j for j in r.at]
        target += r.labels
    hidden = model(ids, torch.arange(width), None).flatten(0, 1)[torch.tensor(where)]
    return F.binary_cross_entropy_with_logits(model.score(hidden)[:, 0], torch.tensor(target))
