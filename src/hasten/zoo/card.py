"""Model cards: what was measured, as README.md beside the weights. `python -m hasten.zoo.card NAME...` measures and writes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from hasten.zoo import NAMES, arith, path, sample, spec
from hasten.zoo.evaluate import evaluate
from hasten.zoo.model import Llama

TASK = """The task is chained arithmetic modulo 23 (`hasten.zoo.arith`): K = 1 to 6 steps, one distractor, all splits disjoint by structure.
Test problems: the fixed set of 2,000. The solutions that policies learn from contain slips: %.0f %% of the facts `x op y` are hard and come
out wrong %.0f %% of the time, always in the same way; the others come out wrong %.0f %% of the time, at random.
"""
TEXT = """The text is the Python standard library's own source (`hasten.zoo.python`), split by a hash of each file's path; byte-level BPE with 1,024
tokens. Measured on the test files in windows of 512 tokens, each on its own (`hasten.zoo.perplexity`); `slice` is what the tests measure again.
"""
EXITS = """`exit N` is what the first N layers are worth under the model's own last norm and head: greedy accuracy on 500 problems, and on 200 of
the model's answers how often it accepts their tokens, greedily and drawn from their law (1 - TV). `exit` (below): those `early_exit` drafts with.
"""


def write(name: str, directory: str | Path | None = None, n: int | None = None) -> Path:
    """Measure a model and write README.md and card.json into its directory; returns the directory."""
    folder = Path(directory or path(name))
    training = json.loads((folder / "training.json").read_text())
    n = n or (300 if spec(name).kind == "reward" else 2000)
    result = evaluate(name, n=n, directory=folder, reward=_reward() if spec(name).kind == "policy" else None)
    (folder / "card.json").write_text(json.dumps(result, indent=1) + "\n")
    (folder / "README.md").write_text(text(name, training, result))
    return folder


def _reward() -> Llama | None:
    try:
        return sample.load("arith-prm-s")
    except ValueError:
        return None


def text(name: str, training: dict, result: dict) -> str:
    """The card as Markdown."""
    s = NAMES[name]
    parameters = s.vocabulary * s.width + s.layers * (4 * s.width**2 + 3 * s.width * s.inner)
    origin = f"grown from {s.start} and trained" if s.start else "trained from scratch"
    origin = f"grown from {s.start} and trained with LayerSkip's loss (`hasten.zoo.layerskip`)" if s.exit else origin
    what = f"A Llama of {parameters:,} parameters ({s.layers} layers of {s.width}), {origin} on one CPU core."
    lines = [f"# {name}", "", what, ""]
    about = TEXT if s.kind == "text" else TASK % (100 * arith.HARD, 100 * arith.HARD_SLIPS, 100 * arith.SLIPS)
    about += EXITS if s.exit else ""
    lines += [about, "| measured on the test set | value |", "|---|---|"]
    lines += [f"| {k} | {v if isinstance(v, (int, float)) else json.dumps(v)} |" for k, v in result.items() if k != "name"]
    if s.kind == "reward":
        lines += ["", *worth()]
    lines += ["", "| training | value |", "|---|---|"]
    flat = training["spec"] | {k: v for k, v in training.items() if k not in ("name", "spec")}
    lines += [f"| {k} | {float(f'{v:.4g}') if isinstance(v, float) else json.dumps(v)} |" for k, v in flat.items()]
    how = f"hasten.zoo.train {name}` and `python -m hasten.zoo.card {name}"
    lines += ["", f"Again with `python -m {how}`. `seconds` is wall time on a shared machine, `cpu` is CPU seconds of one thread.", ""]
    return "\n".join(lines)


def worth() -> list[str]:
    """What choosing by the reward model gains over other ways to spend 16 samples, from the policies' cards; "weak" where it loses."""
    lines = ["| policy | greedy | one sample | vote@16 | best of 16 by this model | weighted vote |", "|---|---|---|---|---|---|"]
    weak = []
    for name in (n for n in NAMES if NAMES[n].kind == "policy"):
        file = path(name) / "card.json"
        card = json.loads(file.read_text()) if file.is_file() else {}
        if "best_of_16_last" in card:
            keys = ("greedy", "one_sample", "vote@16", "best_of_16_last", "weighted_vote@16")
            lines.append(f"| {name} | " + " | ".join(f"{100 * card[k]:.1f} %" for k in keys) + " |")
            if max(card["best_of_16_last"], card["weighted_vote@16"]) <= max(card["greedy"], card["vote@16"]):
                weak.append(name)
    if weak:
        lines += ["", f"**Weak on {', '.join(weak)}: neither use of it beats the better of greedy and the majority vote.**"]
    return lines if len(lines) > 2 else []


if __name__ == "__main__":
    torch.set_num_threads(1)
    for each in sys.argv[1:]:
        print(write(each))
