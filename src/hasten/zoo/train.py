"""Training of the zoo's policies and text models, on one core in minutes: `train("arith-s")`.

The data are endless and a pure function of (seed, step), so a run that was stopped and resumed ends in the same weights as one that
was not. Muon at 0.004 and a curriculum that starts at K = 1 are what makes this task learnable in some million tokens: at 0.02 and with
larger K from the start, no size had learnt to copy an operand after 6 million. The rate falls to zero over the last half.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from hasten.zoo import NAMES, Spec, arith, data, path, python, spec
from hasten.zoo.model import Llama, Size
from hasten.zoo.muon import Muon

ROWS = 8  # rows of 176 tokens a step
CHECKPOINT_SECONDS = 120.0
Progress = Callable[[dict], None]


def cache(name: str) -> Path:
    """Where a model's checkpoints lie: $HASTEN_CACHE/zoo/NAME, by default ~/.cache/hasten/zoo/NAME."""
    root = os.environ.get("HASTEN_CACHE")
    return (Path(root) if root else Path.home() / ".cache" / "hasten") / "zoo" / name


def size(s: Spec) -> Size:
    return Size(s.width, s.inner, s.layers, s.heads, s.vocabulary, s.positions)


def scale(done: float, decay: float = 0.5) -> float:
    """Learning-rate factor after a share `done` of training: a short rise, level, then linear to zero over the last share `decay`."""
    return min(1.0, done / 0.01 + 0.02, (1.0 - done) / decay)


def most(done: float, grown: bool = False) -> int:
    """The curriculum: the largest K, 1 in the first 8 % of training, one more each 8 %, all six from 40 %; all at once if grown."""
    return arith.MAX_STEPS if grown else min(arith.MAX_STEPS, 1 + int(done / 0.08))


def slips(done: float) -> bool:
    """Whether solutions are written with slips: from 70 % of training on; before, facts are learnt as they are."""
    return done >= 0.7


def loss_of(model: Llama, b: data.Batch) -> Tensor:
    """Mean cross-entropy over the solutions' tokens, in nats."""
    logits = model.logits(model(b.ids, b.positions, b.mask()))
    return F.cross_entropy(logits.flatten(0, 1), b.targets.flatten(), ignore_index=-100)


def train(
    name: str,
    out: str | Path | None = None,
    seconds: float | None = None,
    resume: bool = True,
    progress: Progress | None = None,
    steps: int | None = None,
) -> Path:
    """Train a model of the zoo and save it to `out` (default: beside its checkpoints); returns the directory.

    seconds stops early with a checkpoint and what there is saved; the schedule is that of the whole run, so a later call goes on where this
    one stopped. resume=False starts anew. steps overrides the length of the run. progress gets {"step", "steps", "loss", "seconds"} every
    50 steps. Raises ValueError for an unknown name.
    """
    s = spec(name)
    if s.kind == "reward":
        from hasten.zoo import prm

        return prm.train(name, out=out, seconds=seconds, resume=resume, progress=progress, steps=steps)
    run = Run(name, s, steps or s.tokens // per_step(s))
    if resume:
        run.load()
    from hasten.zoo import layerskip, save

    where = Path(out) if out else cache(name) / "model"
    if s.kind == "text":
        words = python.tokenizer(path(s.start)) if s.start else python.build()
        tokens = python.stream(words, python.files("train"))
        run.go(seconds, progress, lambda step: python.loss_of(run.model, tokens, s.seed, step, step / run.steps))
        return save.policy(run.model, where, run.record() | {"text": python.record()}, python.fast(words), exit_layers=s.exit)

    def loss_at(step: int) -> Tensor:
        b = batch(s, step, step / run.steps)
        return layerskip.loss_of(run.model, b, step) if s.exit else loss_of(run.model, b)

    run.go(seconds, progress, loss_at)
    return save.policy(run.model, where, run.record(), exit_layers=s.exit)


def per_step(s: Spec) -> int:
    """Tokens of one step of training."""
    return python.BATCH if s.kind == "text" else ROWS * data.ROW


def batch(s: Spec, step: int, done: float) -> data.Batch:
    return data.batch(s.seed, step, ROWS, most(done, s.start is not None), slips(done))


def grow(model: Llama, small: Llama, front: bool = False) -> None:
    """Start from a smaller model of the same width: its layers are spread evenly (front: are the first), and the others begin by adding nothing.

    The grown model computes what the small one did (depth growth by identity layers, as in Chen et al. 2015, Net2Net, 1511.05641).
    """
    model.model.embed_tokens.load_state_dict(small.model.embed_tokens.state_dict())
    model.model.norm.load_state_dict(small.model.norm.state_dict())
    apart = 1 if front else len(model.model.layers) // len(small.model.layers)
    for i, layer in enumerate(model.model.layers):
        if i % apart == 0 and i // apart < len(small.model.layers):
            layer.load_state_dict(small.model.layers[i // apart].state_dict())
        else:
            torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
            torch.nn.init.zeros_(layer.mlp.down_proj.weight)


class Run:
    """One training run: model, optimizer, step and clocks, with a checkpoint on disk."""

    def __init__(self, name: str, s: Spec, steps: int) -> None:
        torch.manual_seed(s.seed)
        self.name, self.spec, self.steps, self.step = name, s, steps, 0
        self.seconds = self.cpu = 0.0
        self.model = Llama(size(s), s.seed)
        if s.kind == "text":
            python.shrink(self.model)
        if s.start:
            from hasten.zoo import sample

            grow(self.model, sample.load(s.start), front=s.exit > 0)
        self.optimizer = Muon(self.model, lr=s.rate, adam_lr=s.adam)
        self.file = cache(name) / "checkpoint.pt"

    def go(self, seconds: float | None, progress: Progress | None, loss_at: Callable[[int], Tensor]) -> None:
        start, wall, cpu = time.monotonic(), time.monotonic(), time.process_time()
        saved = start
        while self.step < self.steps and (seconds is None or time.monotonic() - start < seconds):
            loss = loss_at(self.step)
            loss.backward()
            self.optimizer.step(self.scale())
            self.model.zero_grad(set_to_none=True)
            self.step += 1
            now = time.monotonic()
            self.seconds, self.cpu = self.seconds + now - wall, self.cpu + time.process_time() - cpu
            wall, cpu = now, time.process_time()
            if progress and self.step % 50 == 0:
                progress({"step": self.step, "steps": self.steps, "loss": loss.item(), "seconds": self.seconds})
            if now - saved > CHECKPOINT_SECONDS:
                self.save()
                saved = now
        self.save()

    def scale(self) -> float:
        return scale(self.step / self.steps, self.spec.decay)

    def record(self) -> dict:
        """What the card says of the run."""
        tokens = self.step * per_step(self.spec)
        run = {"steps": self.step, "of": self.steps, "tokens": tokens, "seconds": self.seconds, "cpu": self.cpu}
        return {"name": self.name, "spec": asdict(self.spec)} | run

    def save(self) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        part = self.file.with_suffix(".part")
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state(), "run": json.dumps(self.record())}
        torch.save(state, part)
        part.rename(self.file)

    def load(self) -> None:
        """Go on from the checkpoint if there is one of the same run; another setting's is left alone and overwritten later."""
        if not self.file.is_file():
            return
        state = torch.load(self.file, weights_only=True)
        run = json.loads(state["run"])
        if run["spec"] != asdict(self.spec) or run["of"] != self.steps:
            return
        self.model.load_state_dict(state["model"])
        self.optimizer.load(state["optimizer"])
        self.step, self.seconds, self.cpu = run["steps"], run["seconds"], run["cpu"]


def main(names: list[str] | None = None) -> None:
    """`python -m hasten.zoo.train NAME...`: trains with one thread and prints progress to stderr."""
    import sys

    torch.set_num_threads(1)
    for name in names or sys.argv[1:] or list(NAMES):
        print(train(name, progress=lambda p: print(json.dumps(p), file=sys.stderr, flush=True)))


if __name__ == "__main__":
    main()
