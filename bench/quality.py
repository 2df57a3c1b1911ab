"""What a transform costs in quality, for every model of the zoo: KL, perplexity and accuracy against the fp32 model.

    python bench/quality.py [--with int8] [--items 2000] [--models arith-s ...]

Accuracy is of greedy answers on the fixed test set, the difference paired over items; KL(fp32 || transformed) is per token, on continuations
drawn from the fp32 model; perplexity is of held-out text (true solutions of test problems; source code that was not trained on). For a reward
model: the largest change of a reward. The last line of stdout is one JSON document; --markdown prints the table of the documentation.

bars, a model: accuracy falls by less than 0.5 points, perplexity rises by less than 1 %.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from hasten import zoo
from hasten.load import Loaded, load
from hasten.measure import quality, stats
from hasten.measure.machine import describe
from hasten.measure.tasks import Task, load_task
from hasten.measure.trial import closed_loop
from hasten.values import UserError

LEAST_POINTS, MOST_RATIO = -0.005, 1.01


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--with", dest="transform", default="int8", help="transform, as in a recipe")
    parser.add_argument("--items", type=int, default=2000, help="test problems for accuracy")
    parser.add_argument("--texts", type=int, default=100, help="texts for KL and perplexity")
    parser.add_argument("--models", nargs="*", default=None)
    parser.add_argument("--markdown", action="store_true")
    args = parser.parse_args()
    rows = [row for name in args.models or zoo.NAMES if (row := measured(name, args)) is not None]
    if args.markdown:
        print(markdown(rows, args.transform))
    print(json.dumps({"bench": "quality", "transform": args.transform, "models": rows, "machine": describe(), "settings": vars(args)}))


def measured(name: str, args: argparse.Namespace) -> dict[str, Any] | None:
    """One model's row; None (and a line on stderr) where it is not installed or the transform does not apply."""
    try:
        plain, changed = load(f"zoo:{name}"), load(f"zoo:{name} +{args.transform}")
    except UserError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return None
    kinds = {"policy": policy, "text": text, "reward": reward}
    row = {"model": name, **kinds[zoo.NAMES[name].kind](plain, changed, args)}
    row["holds"] = (
        row.get("difference", {"value": 0})["value"] > LEAST_POINTS and row.get("perplexity_ratio", {"value": 1})["value"] < MOST_RATIO
    )
    print(json.dumps(row), file=sys.stderr, flush=True)
    return row


def policy(plain: Loaded, changed: Loaded, args: argparse.Namespace) -> dict[str, Any]:
    task = load_task("arith")
    items = task.items["test"]
    right = [answered(loaded, task, args.items) for loaded in (plain, changed)]
    drift = stats.mean(quality.divergence(plain, changed, task, items[: args.texts]))
    from hasten.zoo import arith

    solutions = [(f"{p.prompt} ", f"{p.prompt} {p.solution}") for p in arith.problems("test", args.texts)]
    return {
        "fp32": float(np.mean(right[0])), "transformed": float(np.mean(right[1])),
        "difference": shown(stats.paired_difference(right[1], right[0])), "kl": shown(drift), **perplexities(plain, changed, solutions),
    }  # fmt: skip


def text(plain: Loaded, changed: Loaded, args: argparse.Namespace) -> dict[str, Any]:
    task = load_task("python")
    drift = stats.mean(quality.divergence(plain, changed, task, task.items["test"][: args.texts]))
    from hasten.zoo import python

    return {"kl": shown(drift), **perplexities(plain, changed, [("", t) for t in python.prompts("test", args.texts, 256)])}


def reward(plain: Loaded, changed: Loaded, args: argparse.Namespace) -> dict[str, Any]:
    from hasten.zoo import arith

    prompts = [f"{p.prompt} {p.solution}" for p in arith.problems("test", args.texts)]
    pairs = [zip(a.scores or (), b.scores or (), strict=True) for a, b in zip(plain.score(prompts), changed.score(prompts), strict=True)]
    changes = [abs(a - b) for pair in pairs for a, b in pair]
    return {"reward_change": {"mean": float(np.mean(changes)), "most": max(changes)}}


def answered(loaded: Loaded, task: Task, n: int) -> np.ndarray:
    """1.0 for each of the first n test items that greedy decoding gets right."""
    items = {item.id: item for item in task.items["test"][:n]}
    found = closed_loop(loaded.engine, ((i, task.request(item, item.prompt)) for i, item in items.items()), 64)
    grades = {key: quality.grade(items[str(key)], result, task) for key, result in found}
    return np.array([grades[i] for i in items])


def perplexities(plain: Loaded, changed: Loaded, texts: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Perplexity of (given, whole) texts, what is given not counted; the ratio with its interval, over texts."""
    means = []
    for loaded in (plain, changed):
        starts = [len(loaded.tokenizer(given)["input_ids"]) if given else 1 for given, _ in texts]
        results = [loaded.score([whole], score_from=start)[0] for start, (_, whole) in zip(starts, texts, strict=True)]
        means.append(np.array([-np.mean(r.scores) for r in results]))
    ratio = stats.mean(means[1] - means[0])
    between = {"value": math.exp(ratio.value), "ci": [math.exp(ratio.low), math.exp(ratio.high)], "n": ratio.n}
    return {"perplexity": math.exp(means[0].mean()), "perplexity_transformed": math.exp(means[1].mean()), "perplexity_ratio": between}


def shown(x: stats.Estimate) -> dict[str, Any]:
    return {"value": x.value, "ci": [x.low, x.high], "n": x.n}


def markdown(rows: Sequence[dict[str, Any]], transform: str) -> str:
    lines = [f"| model | accuracy fp32 | with {transform} | KL, nats a token | perplexity, fp32 | ratio |", "|---|---|---|---|---|---|"]
    for r in rows:
        if "reward_change" in r:
            lines.append(
                f"| {r['model']} | – | – | – | – | rewards change by {r['reward_change']['mean']:.4f}, at most {r['reward_change']['most']:.3f} |"
            )
            continue
        points = f"{100 * r['fp32']:.1f} % | {100 * r['transformed']:.1f} %" if "fp32" in r else "– | –"
        low, high = r["perplexity_ratio"]["ci"]
        ratio = f"{r['perplexity_ratio']['value']:.4f} [{low:.4f}, {high:.4f}]"
        lines.append(f"| {r['model']} | {points} | {r['kl']['value']:.1e} | {r['perplexity']:.3f} | {ratio} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
