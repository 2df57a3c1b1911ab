"""The token engine against the sum of its own forward passes, and against `transformers.generate` in the same run.

    python bench/engine.py [--tokens 24] [--repeats 5] [--threads 0] [--device auto]

A random-weight Llama of SmolLM2-135M's shape in fp32 (bf16 on a GPU). Prints the physical ceiling first; engine and generate run in turn,
so that a busy machine hits both; the last line of stdout is one JSON document with ratios and their intervals. Absolute times of one
machine are not the claim.

overhead: engine wall time / time inside the model's forward passes - 1, at batch 1 and 32 (bars: 0.10 and 0.05).
speed-up: generate's wall time / the engine's, same prompts, same number of tokens, both greedy and eager (bar: 1.3 at batch 8).
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hasten import hf
from hasten.engine import run
from hasten.lm.engine import TokenEngine
from hasten.measure.machine import contended, describe
from hasten.measure.stats import bootstrap
from hasten.values import Request, Sampling

SHAPE = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "max_position_embeddings": 2048, "tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
PROMPT = 64


def main() -> None:
    args = arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    theirs = make(args.device)
    ours = hf.prepare(copy.deepcopy(theirs))
    if not args.plain_linears:
        ours = hf.fast_linears(ours)
    say(ceiling(theirs))
    cells = {}
    for batch in args.batches:
        cells[batch] = cell(ours, theirs, batch, args.tokens, args.repeats)
        say(f"batch {batch:>2}: engine overhead {show(cells[batch]['overhead'])}, generate / engine {show(cells[batch]['speedup'])}")
    print(json.dumps({"bench": "engine", "cells": cells, "bars": bars(cells), "machine": describe(), "contended": contended(), "settings": vars(args)}))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=24, help="new tokens a request")
    parser.add_argument("--repeats", type=int, default=7, help="interleaved pairs a cell")
    parser.add_argument("--threads", type=int, default=0, help="torch threads (0: all)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--plain-linears", action="store_true", help="without packed weights")
    return parser.parse_args()


def make(device: str) -> Any:
    torch.manual_seed(0)
    device = hf.best_device() if device == "auto" else device
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    return LlamaForCausalLM(LlamaConfig(**SHAPE)).to(device, dtype).eval()


def ceiling(model: Any) -> str:
    """Bytes a decode step must move and the bandwidth there is: what no engine can beat."""
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    block = torch.ones(64 << 20, device=model.device)
    speeds = []
    for _ in range(5):
        began = time.perf_counter()
        block.sum().item()
        speeds.append(block.numel() * block.element_size() / (time.perf_counter() - began))
    best = max(speeds)
    return f"ceiling: {weights / 1e6:.0f} MB of weights a step at {best / 1e9:.1f} GB/s measured = {weights / best * 1e3:.1f} ms a step at batch 1"


def cell(ours: Any, theirs: Any, batch: int, tokens: int, repeats: int) -> dict[str, Any]:
    """Interleaved runs of one batch size: overhead of the engine over its own passes, and generate's time over the engine's."""
    prompts = torch.randint(1, 49152, (batch, PROMPT), generator=torch.Generator().manual_seed(batch))
    overheads, ratios, same = [], [], 0
    for i in range(repeats + 1):
        seconds, inside, answers = engine_run(ours, prompts, tokens)
        other, wanted = generate_run(theirs, prompts, tokens)
        if i:  # the first pair warms up
            overheads.append(seconds / inside - 1)
            ratios.append(other / seconds)
        same = sum(a == w for a, w in zip(answers, wanted, strict=True))
    return {"overhead": interval(overheads), "speedup": interval(ratios), "identical_rows": same, "rows": batch}


def engine_run(model: Any, prompts: torch.Tensor, tokens: int) -> tuple[float, float, list[list[int]]]:
    """Wall seconds, seconds inside forward passes, generated ids. A fresh engine, so that no prefix is reused between repeats."""
    engine = TokenEngine(model)
    sampling = Sampling(max_tokens=tokens, ignore_eos=True)
    requests = {i: Request(row, sampling) for i, row in enumerate(prompts.tolist())}
    began = time.perf_counter()
    done = run(engine, requests)
    return time.perf_counter() - began, engine.forward_seconds, [list(r.tokens) for r in done.values()]


def generate_run(model: Any, prompts: torch.Tensor, tokens: int) -> tuple[float, list[list[int]]]:
    ids = prompts.to(model.device)
    began = time.perf_counter()
    with torch.inference_mode():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
    out = out[:, PROMPT:].tolist()
    return time.perf_counter() - began, out


def interval(values: list[float]) -> dict[str, Any]:
    """Median with a bootstrap interval of it."""
    low, high = bootstrap(np.array(values), statistic=np.median)
    return {"median": float(np.median(values)), "ci": [float(low), float(high)], "n": len(values)}


def show(x: dict[str, Any]) -> str:
    return f"{x['median']:.3f} [{x['ci'][0]:.3f}, {x['ci'][1]:.3f}]"


def bars(cells: dict[int, Any]) -> dict[str, Any]:
    """Each bar with its figure; met only where the measured median is on the right side."""
    wanted = {"overhead at batch 1 <= 0.10": (1, "overhead", 0.10), "overhead at batch 32 <= 0.05": (32, "overhead", 0.05)}
    out: dict[str, Any] = {}
    for name, (batch, what, most) in wanted.items():
        if batch in cells:
            out[name] = {"measured": cells[batch][what]["median"], "met": cells[batch][what]["median"] <= most}
    if 8 in cells:
        out["generate / engine at batch 8 >= 1.3"] = {"measured": cells[8]["speedup"]["median"], "met": cells[8]["speedup"]["median"] >= 1.3}
    return out


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
