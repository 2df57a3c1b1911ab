"""Training and measuring of the process reward model; what it learns from is made in `reward.py`.

A policy's layers stay as they are; new ones on top of them learn to judge. From rollout labels alone they never learnt to compare a result
with what the policy would have written: whether 25,000 solutions or 60,000, the AUC stayed at .66, which position and length alone give. So
there is a first stage without labels, replaced-token detection (Clark et al. 2020, ELECTRA, 2003.10555) of results in training text: after
400 steps replaced results are found, 300 later the reward says so. It is asked for one layer below the last as well, or what was found
would be where no later token can see it. Queries and keys of the new layers start equal: a token looks for places that resemble it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch

from hasten.rng import uniform
from hasten.zoo import arith, reward, sample, spec, tokenizer
from hasten.zoo import evaluate as measuring
from hasten.zoo.model import Llama
from hasten.zoo.muon import Muon
from hasten.zoo.reward import Labelled

Progress = Callable[[dict], None]
BATCH, EPOCHS = 32, 1
SPOT = 1200  # steps of the first stage


def train(
    name: str,
    out: str | Path | None = None,
    seconds: float | None = None,
    resume: bool = True,
    progress: Progress | None = None,
    steps: int | None = None,
    chunks: int = reward.CHUNKS,
) -> Path:
    """Label solutions (cached by chunk), then train; `train.train` says what the arguments are. The last chunk is held out."""
    from hasten.zoo import save
    from hasten.zoo.train import Run, cache

    s = spec(name)
    cpu, wall = time.process_time(), time.monotonic()
    *used, held = reward.labels(name, range(chunks), progress)
    order = batches([r for rows in used for r in rows], s.seed)
    run = Run(name, s, SPOT + (steps or len(order)))
    spot = topped(run.model, sample.load(s.start or ""), s.seed)
    run.optimizer = Stages(run.model)  # type: ignore[assignment]
    if resume:
        run.load()
    run.cpu, run.seconds = run.cpu + time.process_time() - cpu, run.seconds + time.monotonic() - wall
    run.go(seconds, progress, lambda step: loss_at(run.model, spot, order, s.seed, step))
    del run.model.spot
    record = run.record() | {
        "first_stage_steps": min(run.step, SPOT),
        "tokens": sum(len(r.ids) for b in order[: max(0, run.step - SPOT)] for r in b),
        "solutions": sum(map(len, used)),
        "labels": sum(len(r.labels) for rows in used for r in rows),
        "policies": sorted(set(reward.POLICIES)),
        "completer": reward.COMPLETER,
        "rollouts": reward.ROLLOUTS,
        "rollout_temperature": reward.TEMPERATURE,
        "held_out_label_auc": label_auc(run.model.eval(), held),
    }
    return save.reward(run.model, Path(out) if out else cache(name) / "model", record)


def topped(model: Llama, small: Llama, seed: int) -> torch.nn.Linear:
    """The small model's layers, which stay as they are, below new ones; a `score`, and the head of the first stage, which is returned."""
    torch.manual_seed(seed)
    width, layers = model.size.width, model.model.layers
    model.model.embed_tokens.load_state_dict(small.model.embed_tokens.state_dict())
    for mine, theirs in zip(layers, small.model.layers, strict=False):
        mine.load_state_dict(theirs.state_dict())
    for part in (model.model.embed_tokens, *layers[: len(small.model.layers)]):
        part.requires_grad_(False)
    for layer in layers[len(small.model.layers) :]:
        torch.nn.init.orthogonal_(layer.self_attn.q_proj.weight, 2.0)
        layer.self_attn.k_proj.load_state_dict(layer.self_attn.q_proj.state_dict())
    model.score, model.spot = torch.nn.Linear(width, 1), torch.nn.Linear(width, 1)
    torch.nn.init.zeros_(model.score.weight)
    torch.nn.init.zeros_(model.score.bias)
    return model.spot


class Stages:
    """Muon for the first stage; AdamW for the second, whose labels are noisy: there Muon, which makes every update large, unlearns."""

    def __init__(self, model: Llama) -> None:
        self.optimizers = (Muon(model, lr=0.004, adam_lr=2e-3), Muon(model, adam_lr=7e-4, matrices=False))
        self.done = 0

    def step(self, scale: float) -> None:
        self.optimizers[self.done >= SPOT].step(scale)
        self.done += 1

    def state(self) -> dict:
        return {"done": self.done, "stages": [o.state() for o in self.optimizers]}

    def load(self, state: dict) -> None:
        self.done = state["done"]
        for optimizer, saved in zip(self.optimizers, state["stages"], strict=True):
            optimizer.load(saved)


def loss_at(model: Llama, spot: torch.nn.Linear, order: list[list[Labelled]], seed: int, step: int) -> torch.Tensor:
    """The first SPOT steps find replaced results, the others learn the labels."""
    if step < SPOT:
        return reward.spotting_loss(model, spot, seed, step, step / SPOT)
    return reward.loss_of(model, order[(step - SPOT) % len(order)])


def batches(rows: list[Labelled], seed: int) -> list[list[Labelled]]:
    """EPOCHS passes over the rows in batches of similar length; in the first, problems of fewer steps come rather earlier than others."""
    out = []
    for epoch in range(EPOCHS):
        when = {id(r): uniform(seed, epoch, i) + (0.12 * r.k if epoch == 0 else 0) for i, r in enumerate(rows)}
        order = sorted(rows, key=lambda r: when[id(r)])
        for start in range(0, len(order) - BATCH * 16 + 1, BATCH * 16):
            window = sorted(order[start : start + BATCH * 16], key=lambda r: len(r.ids))
            parts = [window[i : i + BATCH] for i in range(0, len(window), BATCH)]
            out += sorted(parts, key=lambda b: when[id(b[0])])
    return out


@torch.inference_mode()
def label_auc(model: Llama, rows: list[Labelled]) -> float:
    """AUC of the model's rewards against rollout labels."""
    scores: list[float] = []
    for start in range(0, len(rows), 250):
        part = rows[start : start + 250]
        ids = torch.zeros(len(part), max(len(r.ids) for r in part), dtype=torch.int64)
        for line, r in zip(ids, part, strict=True):
            line[: len(r.ids)] = torch.tensor(r.ids)
        out = model.score(model(ids, torch.arange(ids.shape[1]), None))[..., 0]
        scores += [out[i, j].item() for i, r in enumerate(part) for j in r.at]
    return auc(scores, [label > 0.5 for r in rows for label in r.labels])


def evaluate(name: str, n: int = 2000, seed: int = 0, directory: str | Path | None = None) -> dict:
    """AUC a step against the true checker, calibration error and the share right, on one sample of each policy for n test problems."""
    model = sample.load(name, directory)
    ps = list(arith.problems("test", n))
    prompts = [tokenizer.encode(p.prompt, bos=True) for p in ps]
    result: dict = {"name": name, "n": n}
    for policy in sorted(set(reward.POLICIES)):  # it has not learnt from the solutions of others
        drawn = [d[0] for d in sample.sample(sample.load(policy), prompts, 1.0, seed + 1)]
        rewards = measuring.step_rewards(model, prompts, drawn)
        flat, right, last, answered = [], [], [], []
        for p, d, r in zip(ps, drawn, rewards, strict=True):
            flags = arith.check_steps(p, tokenizer.decode(d))
            for score, flag in zip(r, flags, strict=False):
                flat.append(score)
                right.append(flag)
            last.append(r[-1])
            answered.append(arith.answer_of(tokenizer.decode(d)) == p.answer)
        result[policy] = {
            "step_auc": auc(flat, right),
            "answer_auc": auc(last, answered),
            "answer_ece": calibration_error(last, answered),
            "right_steps": round(sum(right) / len(right), 4),
        }
    return result


def auc(scores: list[float], right: list[bool]) -> float:
    """Area under the ROC curve by ranks, ties counted half; nan where one class is empty."""
    order = sorted(range(len(scores)), key=scores.__getitem__)
    rank, i, good = 0.0, 0, sum(right)
    while i < len(order):
        j = i
        while j < len(order) and scores[order[j]] == scores[order[i]]:
            j += 1
        rank += (i + j + 1) / 2 * sum(right[o] for o in order[i:j])
        i = j
    bad = len(right) - good
    return round((rank - good * (good + 1) / 2) / (good * bad), 4) if good and bad else float("nan")


def calibration_error(scores: list[float], right: list[bool], bins: int = 10) -> float:
    """Expected calibration error: mean over scores of |mean score - share right| of the score's bin."""
    total = 0.0
    for b in range(bins):
        inside = [i for i, s in enumerate(scores) if min(int(s * bins), bins - 1) == b]
        total += abs(sum(scores[i] for i in inside) - sum(right[i] for i in inside))
    return round(total / len(scores), 4)
