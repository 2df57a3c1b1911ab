"""Beam search over a set of items: forced tokens in one pass against one token a pass, same results, interleaved in one run.

    python bench/beam.py [--items 1000000] [--beams 10 70] [--repeats 5] [--threads 0] [--native]

A random-weight Llama of SmolLM2-135M's shape in fp32, items of 8 uniform tokens out of 2048 of its vocabulary, one request of 64 prompt tokens. The
last line of stdout is one JSON document with the ratio of wall times, step by step over forced, and its interval (bars: 1.6 at 10 beams, 1.2
at 70). Without a set the same engine searches the whole vocabulary, which is shown beside them.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

import numpy as np
import torch
from engine import SHAPE
from transformers import LlamaConfig, LlamaForCausalLM

from hasten import hf
from hasten.engine import run
from hasten.lm.beam import BeamEngine
from hasten.lm.constrain import trie as tries
from hasten.lm.constrain.items import Items
from hasten.lm.decode.beam import Beam, Options
from hasten.measure.machine import Watch, describe
from hasten.measure.stats import median, median_ratio
from hasten.values import Request, Result, Sampling

BARS = {10: 1.6, 70: 1.2}
PROMPT, LENGTH, TOKENS, FIRST = 64, 8, 2048, 1000  # items are of TOKENS ids from FIRST on


def main() -> None:
    args = arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = hf.prepare(LlamaForCausalLM(LlamaConfig(**SHAPE)))
    if args.native:
        from hasten.lm.fused import attach

        model = attach(model)
    items = np.random.default_rng(0).integers(FIRST, FIRST + TOKENS, (args.items, LENGTH), dtype=np.int32)
    trie = tries.build(items, SHAPE["vocab_size"])
    cells = {}
    with Watch() as watch:
        for beams in args.beams:
            cells[beams] = cell(model, trie, beams, args.repeats)
            say(f"{beams} beams: {show(cells[beams])}")
    bars = {
        f"{n} beams >= {bar}": {"measured": cells[n]["ratio"]["median"], "met": cells[n]["ratio"]["median"] >= bar}
        for n, bar in BARS.items()
        if n in cells
    }
    print(
        json.dumps(
            {"bench": "beam", "cells": cells, "bars": bars, "machine": describe(), "contended": watch.contended, "settings": vars(args)}
        )
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--beams", type=int, nargs="+", default=[10, 70])
    parser.add_argument("--repeats", type=int, default=5, help="interleaved rounds")
    parser.add_argument("--threads", type=int, default=0, help="torch threads (0: all)")
    parser.add_argument("--native", action="store_true", help="small steps in C++ (technique `native`)")
    return parser.parse_args()


def cell(model: Any, trie: tries.Trie, beams: int, repeats: int) -> dict[str, Any]:
    seconds: dict[str, list[float]] = {"forced": [], "step by step": [], "no set": []}
    rand = torch.Generator().manual_seed(beams)
    same = 0
    for turn in range(repeats + 1):
        prompt = torch.randint(1, 49152, (PROMPT,), generator=rand).tolist()
        found: dict[str, Result] = {}
        for kind in seconds:
            engine = BeamEngine(
                model,
                decode=Beam(Options(width=beams, forced=kind == "forced")),
                constraint=None if kind == "no set" else Items(trie, [0]),
                share=False,
            )
            request = Request(prompt, Sampling(n=beams, max_tokens=LENGTH, ignore_eos=True))
            began = time.perf_counter()
            found[kind] = run(engine, {0: request})[0]
            if turn:
                seconds[kind].append(time.perf_counter() - began)
        same += equal(found["forced"], found["step by step"])
    costs = {kind: result.usage.total for kind, result in found.items()}
    return {
        "ratio": interval(median_ratio(seconds["step by step"], seconds["forced"])), "seconds": {k: median(s).value for k, s in seconds.items()},
        "passes": {k: c.forwards for k, c in costs.items()}, "saved": costs["forced"].saved, "same": same, "rounds": repeats + 1,
    }  # fmt: skip


def equal(a: Result, b: Result) -> bool:
    """The same items in the same order; scores to rounding, for a pass of more positions adds in another order."""
    one, two = ([(r.tokens, r.trace["logprob"]) for r in (x, *x.others)] for x in (a, b))
    return all(p == q and abs(s - t) < 1e-3 for (p, s), (q, t) in zip(one, two, strict=True))


def interval(x: Any) -> dict[str, Any]:
    return {"median": x.value, "ci": [x.low, x.high], "n": x.n}


def show(x: dict[str, Any]) -> str:
    ratio, times = x["ratio"], ", ".join(f"{k} {s:.3f}" for k, s in x["seconds"].items())
    return (
        f"{times} s; step by step / forced {ratio['median']:.2f} [{ratio['ci'][0]:.2f}, {ratio['ci'][1]:.2f}], "
        f"passes {x['passes']['step by step']} -> {x['passes']['forced']}, same results {x['same']} of {x['rounds']}"
    )


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
