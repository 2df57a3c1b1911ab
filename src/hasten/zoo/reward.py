"""What the process reward model learns from. Its labels are made as Math-Shepherd's (Wang et al. 2023, 2312.08935): by rollouts, not by a checker.

A policy samples one solution of each problem. A step is labelled 1 if any of ROLLOUTS + 1 continuations from its end reaches the right answer
(their "hard estimation"); the solution itself is one of them, so a right solution needs no others. One solution a problem, and many problems:
from some thousand problems with many solutions each, a model this small learns the problems by heart and nothing of the steps.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from hasten.rng import key
from hasten.zoo import arith, data, path, sample, tokenizer
from hasten.zoo.model import Llama

POLICIES = ("arith-s", "arith-m", "arith-s", "arith-m", "arith-xs")  # whose solutions chunk i has: POLICIES[i % 5]
COMPLETER, ROLLOUTS, TEMPERATURE = "arith-s", 3, 0.7
CHUNKS, CHUNK = 30, 2000
STREAM = 77
SPOILT = 0.4  # of results, replaced in the first stage


@dataclass(slots=True)
class Labelled:
    """A prompt and solution, positions of its delimiters in the whole row, the label of each, and the problem's K."""

    ids: list[int]
    at: list[int]
    labels: list[float]
    k: int


def delimiters(prompt: list[int], solution: list[int]) -> list[int]:
    """Where rewards stand in prompt + solution: at each ` ;` of the solution, and at its last token."""
    return [len(prompt) + i for i, t in enumerate(solution) if t == tokenizer.STEP_END] + [len(prompt) + len(solution) - 1]


def problem(index: int) -> arith.Problem:
    """Problem of the reward model's stream: structures of the training split."""
    return arith.sample_problem(STREAM, index, "train")


def label(chunk: int, policy: Llama, completer: Llama, size: int = CHUNK) -> list[Labelled]:
    """Sample and label one solution of each problem of a chunk; a pure function of the chunk's number and the models."""
    ps = [problem(chunk * CHUNK + i) for i in range(size)]
    prompts = [tokenizer.encode(p.prompt, bos=True) for p in ps]
    drawn = sample.sample(policy, prompts, 1.0, key(chunk, "solution") >> 1)
    rows = []
    for p, prompt, (solution,) in zip(ps, prompts, drawn, strict=True):
        at = delimiters(prompt, solution)
        right = arith.answer_of(tokenizer.decode(solution)) == p.answer
        rows.append(Labelled(prompt + solution, at, [float(right)] * len(at), p.k))
    asked = [(row, i, p.answer) for row, p in zip(rows, ps, strict=True) if not row.labels[-1] for i in range(len(row.at) - 1)]
    prefixes = [row.ids[: row.at[i] + 1] for row, i, _ in asked]
    rolled = sample.sample(completer, prefixes, TEMPERATURE, key(chunk, "rollout") >> 1, copies=ROLLOUTS)
    for (row, i, answer), prefix, ends in zip(asked, prefixes, rolled, strict=True):
        row.labels[i] = float(any(_answer(prefix, end) == answer for end in ends))
    return rows


def _answer(prefix: list[int], rest: list[int]) -> str | None:
    return arith.answer_of(tokenizer.decode(rest)) or arith.answer_of(tokenizer.decode(prefix))


def labels(name: str, chunks: range = range(CHUNKS), progress: Callable[[dict], None] | None = None) -> list[list[Labelled]]:
    """The chunks' rows, made where they are not in the cache yet. A chunk is kept under a hash of the weights it came from."""
    from hasten.zoo.train import cache

    folder = cache(name) / "labels"
    folder.mkdir(parents=True, exist_ok=True)
    models: dict[str, Llama] = {}
    rows: list[list[Labelled]] = []
    for chunk in chunks:
        policy = POLICIES[chunk % len(POLICIES)]
        file = folder / f"{chunk:04d}-{_digest(policy)}.json"
        if not file.is_file():
            models |= {n: sample.load(n) for n in (policy, COMPLETER) if n not in models}
            made = label(chunk, models[policy], models[COMPLETER])
            part = file.with_suffix(".part")
            part.write_text(json.dumps([[r.ids, r.at, r.labels, r.k] for r in made]))
            part.rename(file)
            if progress:
                progress({"labelled": chunk + 1, "of": CHUNKS})
        rows.append([Labelled(*r) for r in json.loads(file.read_text())])
    return rows


def _digest(policy: str) -> str:
    h = hashlib.blake2b(repr((ROLLOUTS, TEMPERATURE, CHUNK)).encode(), digest_size=6)
    for n in (policy, COMPLETER):
        h.update((path(n) / "model.safetensors").read_bytes())
    return h.hexdigest()


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


# --- the first stage: results replaced at random ----------------------------------------------------------------------------------------------


def spoilt(seed: int, step: int, done: float) -> tuple[data.Batch, Tensor]:
    """A batch of training text, and bool [B, 176]: where a step's result was replaced (in the batch's `ids`) by another number."""
    from hasten.zoo.train import ROWS, most

    b = data.batch(seed, step, ROWS, most(done))
    numbers = torch.tensor([tokenizer.IDS[str(i)] for i in range(arith.MODULUS)])
    results = torch.zeros_like(b.ids, dtype=torch.bool)
    results[:, :-1] = (b.ids[:, 1:] == tokenizer.STEP_END) & (b.targets[:, :-1] != -100)  # a solution's token before ` ;`
    g = torch.Generator().manual_seed(key(seed, step, "spoilt") >> 1)
    shift = torch.randint(1, arith.MODULUS, b.ids.shape, generator=g)
    replaced = results & (torch.rand(b.ids.shape, generator=g) < SPOILT)
    b.ids[replaced] = numbers[(b.ids - numbers[0] + shift)[replaced] % arith.MODULUS]
    return b, replaced


def spotting_loss(model: Llama, spot: torch.nn.Linear, seed: int, step: int, done: float) -> Tensor:
    """Was this result replaced, read from the last layer but one at each result; was none replaced so far, read where rewards are."""
    b, replaced = spoilt(seed, step, done)
    below: list[Tensor] = []
    handle = model.model.layers[-2].register_forward_hook(lambda module, args, out: below.append(out))
    hidden = model(b.ids, b.positions, b.mask())
    handle.remove()
    solution = torch.zeros_like(replaced)
    solution[:, 1:] = (b.targets[:, :-1] != -100) & (b.documents[:, 1:] == b.documents[:, :-1])
    result, end = torch.zeros_like(replaced), solution & ((b.ids == tokenizer.STEP_END) | (b.ids == tokenizer.EOS))
    result[:, :-1] = solution[:, :-1] & (b.ids[:, 1:] == tokenizer.STEP_END)
    so_far = (data.document_mask(b.documents)[:, 0] & replaced[:, None, :]).any(-1)
    found = spot(F.rms_norm(below[0], below[0].shape[-1:]))[..., 0]
    return F.binary_cross_entropy_with_logits(found[result], replaced[result].float()) + F.binary_cross_entropy_with_logits(
        model.score(hidden)[..., 0][end], (~so_far[end]).float()
    )


if __name__ == "__main__":  # `python -m hasten.zoo.reward arith-prm-s FIRST STOP`: some chunks, so that two cores can share the work
    import sys

    torch.set_num_threads(1)
    labels(sys.argv[1], range(int(sys.argv[2]), int(sys.argv[3])), lambda p: print(p, flush=True))
