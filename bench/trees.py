"""Does a tree of proposals gain over a chain, and does Lookahead decoding gain over plain decoding? Each against plain decoding, in one run.

    python bench/trees.py [--models python-m arith-s] [--steps native torch] [--batches 1 4] [--pairs 9] [--tokens 128]

edit: prompts that hold a held-out file and ask for it again, greedy; source: held-out files, greedy; sampled: the same at temperature 1;
problems: arithmetic, greedy. steps: what does them, one C++ call (which leaves trees to torch) or torch alone.

A pair is plain and a technique on the same prompts, in turn, with fresh engines: what a controller learns it learns in the run. speed-up:
plain's wall seconds over the technique's. tokens: committed a pass and row, which says what a tree is worth where passes cost nothing more.
Output must be identical; answers that differ are counted. `schedule=constant` proposes always, otherwise the goodput controller decides. First
comes what passes of several positions cost: the ceiling of a technique is its tokens a pass over that.

bars: the controller's lower bound >= 0.97 in every cell; output identical.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

from hasten import hf, techniques
from hasten.engine import run
from hasten.lm.decode import Decode
from hasten.lm.engine import TokenEngine
from hasten.lm.fused import attach
from hasten.measure.machine import Watch, describe
from hasten.measure.stats import median
from hasten.recipe import Recipe
from hasten.values import Request, Sampling

RIVALS = (
    "ngram", "ngram(branches=3)", "suffix", "suffix(branches=3)", "lookahead", "ngram(schedule=constant)",
    "ngram(schedule=constant,branches=3)", "suffix(schedule=constant)", "suffix(schedule=constant,branches=3)", "lookahead(schedule=constant)",
)  # fmt: skip
TEXTS = {"python-m": ("edit", "source", "sampled"), "arith-s": ("problems",)}
PROMPT, EDIT = 128, 200  # tokens of a prompt; of the file in an edit prompt


def main() -> None:
    args = arguments()
    cells: list[dict[str, Any]] = []
    costs: dict[str, Any] = {}
    with Watch() as watch:
        for name in args.models:
            plain = hf.load_model(hf.resolve(f"zoo:{name}"), dtype="fp32")
            for steps in args.steps:
                model = attach(plain) if steps == "native" else plain
                costs[f"{name} {steps}"] = cost(model)
                say(f"{name} {steps}: a pass of 1, 4, 8, 16, 32 positions: " + ", ".join(f"{x:.2f}" for x in costs[f"{name} {steps}"]))
                for text in TEXTS[name]:
                    for batch in args.batches:
                        cells += cell(name, steps, model, text, batch, args)
    document = {"bench": "trees", "cells": cells, "pass_cost": costs, "gains": gains(cells), "bars": bars(cells)}
    print(json.dumps({**document, "machine": describe(), "contended": watch.contended, "settings": vars(args)}))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", default=list(TEXTS), choices=list(TEXTS))
    parser.add_argument("--steps", nargs="+", default=["native", "torch"], choices=["native", "torch"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--techniques", nargs="+", default=list(RIVALS))
    return parser.parse_args()


def prompts(text: str, batch: int, index: int) -> list[list[int]]:
    """The prompts of pair `index`: none is used twice."""
    if text == "problems":
        from hasten.zoo import arith, path

        words = hf.load_tokenizer(str(path("arith-s")))
        return [words(p.prompt)["input_ids"] for p in arith.problems("test", batch, start=index * batch)]
    from hasten.zoo import python

    size = EDIT if text == "edit" else PROMPT
    words = python.tokenizer()
    found = [words.encode(p, add_special_tokens=False).ids[:size] for p in python.prompts("test", (index + 1) * batch, size)[-batch:]]
    return [[*p, *p[: EDIT // 8]] for p in found] if text == "edit" else found


def cost(model: Any, repeats: int = 15) -> list[float]:
    """Seconds of a pass of so many positions of one row over those of a pass of one."""

    class Fixed(Decode):
        def __init__(self, n: int) -> None:
            self.n = n

        def propose(self, rows: Any, room: Any) -> list[list[int]]:
            return [[1] * self.n for _ in rows]

        def accept(self, row: Any, proposal: Any, chosen: Any, logits: Any) -> list[int]:
            return list(chosen[:1])

    def seconds(n: int) -> float:
        engine = TokenEngine(model, decode=Fixed(n - 1))
        run(engine, {0: Request(list(range(1, 30)), Sampling(max_tokens=24, ignore_eos=True))})
        return engine.forward_seconds

    rounds = [[seconds(n) for n in (1, 4, 8, 16, 32)] for _ in range(repeats)]
    return [median([r[i] / r[0] for r in rounds]).value for i in range(5)]


def cell(name: str, steps: str, model: Any, text: str, batch: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row of the table for each technique."""
    times: dict[str, list[float]] = {n: [] for n in ("plain", *args.techniques)}
    tokens: dict[str, list[float]] = {n: [] for n in times}
    differing = dict.fromkeys(times, 0)
    for i in range(args.pairs + 1):
        asked = prompts(text, batch, i)
        sampling = Sampling(max_tokens=args.tokens, ignore_eos=text != "problems", temperature=float(text == "sampled"), seed=i)
        answers = {}
        for n in times if i % 2 else reversed(times):
            seconds, answers[n], a_pass = timed(model, n, asked, sampling)
            if i:
                times[n].append(seconds)
                tokens[n].append(a_pass)
        for n in times:
            differing[n] += sum(a != b for a, b in zip(answers[n], answers["plain"], strict=True))
    rows = []
    for n in args.techniques:
        row = {"model": name, "steps": steps, "text": text, "batch": batch, "technique": n, "differing": differing[n]}
        row |= {"speedup": ratio(times["plain"], times[n]), "tokens": median(tokens[n]).value}
        rows.append(row)
        say(f"{name:8s} {steps:6s} {text:8s} batch {batch:2d} {n:38s} {show(row['speedup'])}  tokens a pass {row['tokens']:.2f}")
        chain = n.replace(",branches=3", "").replace("(branches=3)", "")
        if chain != n and chain in times:
            row["over_chain"] = ratio(times[chain], times[n])
    return rows


def timed(model: Any, name: str, asked: list[list[int]], sampling: Sampling) -> tuple[float, list[tuple[int, ...]], float]:
    """Wall seconds, answers and tokens a pass and row of a fresh engine."""
    use = Recipe.parse(f"model +{name}").uses[0]
    engine = TokenEngine(model, decode=techniques.module_of(use.name).build(techniques.options_for(use), None))
    began = time.perf_counter()
    done = run(engine, {i: Request(p, sampling) for i, p in enumerate(asked)})
    costs = [r.usage.by_role["target"] for r in done.values()]
    return time.perf_counter() - began, [r.tokens for r in done.values()], sum(c.generated for c in costs) / sum(c.forwards for c in costs)


def ratio(a: list[float], b: list[float]) -> dict[str, Any]:
    x = median([s / t for s, t in zip(a, b, strict=True)])
    return {"median": x.value, "ci": [x.low, x.high], "n": x.n}


def show(x: dict[str, Any]) -> str:
    return f"{x['median']:.2f} [{x['ci'][0]:.2f}, {x['ci'][1]:.2f}]"


def gains(cells: list[dict[str, Any]]) -> dict[str, list[str]]:
    """Cells in which a tree is certainly faster than its chain, and in which lookahead is certainly faster than plain decoding."""
    names = [f"{c['model']} {c['steps']} {c['text']} batch {c['batch']} {c['technique']}" for c in cells]
    return {
        "tree over chain": [n for n, c in zip(names, cells, strict=True) if "over_chain" in c and c["over_chain"]["ci"][0] > 1],
        "lookahead over plain": [n for n, c in zip(names, cells, strict=True) if "lookahead" in n and c["speedup"]["ci"][0] > 1],
    }


def bars(cells: list[dict[str, Any]]) -> dict[str, Any]:
    least = min((c["speedup"]["ci"][0] for c in cells if "constant" not in c["technique"]), default=1.0)
    differing = sum(c["differing"] for c in cells)
    return {
        "lower bound of every cell with the controller >= 0.97": {"measured": least, "met": least >= 0.97},
        "answers that differ from plain decoding (none; near-ties apart)": {"measured": differing, "met": differing == 0},
    }


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
