"""Training and measuring of the process reward model; its labels are made in `reward.py`."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch

from hasten.rng import key
from hasten.zoo import NAMES, arith, sample, spec, tokenizer
from hasten.zoo import evaluate as measuring
from hasten.zoo.model import Llama
from hasten.zoo.muon import Muon
from hasten.zoo.reward import BATCH, CHUNK, COMPLETER, POLICIES, PROBLEMS, ROLLOUTS, TEMPERATURE, Labelled, labels, loss_of

Progress = Callable[[dict], None]


def train(
    name: str,
    out: str | Path | None = None,
    seconds: float | None = None,
    resume: bool = True,
    progress: Progress | None = None,
    steps: int | None = None,
    label_seconds: float | None = None,
) -> Path:
    """Label solutions (cached by chunk), then train; `train.train` says what the arguments are. label_seconds ends the labelling early."""
    from hasten.zoo import save
    from hasten.zoo.train import Run, cache

    s = spec(name)
    cpu, wall = time.process_time(), time.monotonic()
    rows = labels(name, PROBLEMS // CHUNK, None if label_seconds is None else wall + label_seconds, progress)
    run = Run(name, s, steps or s.tokens // (BATCH * 90))
    assert s.start is not None
    _build_on(run.model, sample.load(s.start))
    run.model.score = torch.nn.Linear(s.width, 1)
    torch.nn.init.zeros_(run.model.score.weight)
    torch.nn.init.zeros_(run.model.score.bias)
    run.optimizer = Muon(run.model, lr=0.004, adam_lr=2e-3)
    if resume:
        run.load()
    run.cpu, run.seconds = run.cpu + time.process_time() - cpu, run.seconds + time.monotonic() - wall
    run.go(seconds, progress, lambda step: _loss(run.model, rows, s.seed, step))
    record = run.record() | {
        "solutions": len(rows),
        "labels": sum(len(r.labels) for r in rows),
        "policies": POLICIES,
        "completer": COMPLETER,
        "rollouts": ROLLOUTS,
        "rollout_temperature": TEMPERATURE,
    }
    return save.reward(run.model, Path(out) if out else cache(name) / "model", record)


def _build_on(model: Llama, policy: Llama) -> None:
    """Put a frozen policy below: the layers above it begin as identities and read at a step's end what the policy expected there."""
    model.model.embed_tokens.load_state_dict(policy.model.embed_tokens.state_dict())
    model.model.norm.load_state_dict(policy.model.norm.state_dict())
    model.model.embed_tokens.requires_grad_(False)
    for i, layer in enumerate(model.model.layers):
        if i < len(policy.model.layers):
            layer.load_state_dict(policy.model.layers[i].state_dict())
            layer.requires_grad_(False)
        else:
            torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
            torch.nn.init.zeros_(layer.mlp.down_proj.weight)


def _loss(model: Llama, rows: list[Labelled], seed: int, step: int) -> torch.Tensor:
    chosen = [rows[key(seed, step, i) % len(rows)] for i in range(BATCH)]
    return loss_of(model, chosen)


def evaluate(name: str, n: int = 2000, seed: int = 0, directory: str | Path | None = None) -> dict:
    """AUC a step against the true checker, calibration error and the share right, on one sample of each policy for n test problems."""
    model = sample.load(name, directory)
    ps = list(arith.problems("test", n))
    prompts = [tokenizer.encode(p.prompt, bos=True) for p in ps]
    result: dict = {"name": name, "n": n}
    for policy in [n for n in NAMES if NAMES[n].kind == "policy"]:
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
