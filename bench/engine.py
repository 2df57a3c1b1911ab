"""The token engine against the sum of its own forward passes, and against `transformers.generate` in the same run.

    python bench/engine.py [--tokens 24] [--repeats 5] [--threads 0] [--device auto]

A random-weight Llama of SmolLM2-135M's shape in fp32 (bf16 on a GPU). Prints the physical ceiling first; engine and generate run in turn,
so that a busy machine hits both; the last line of stdout is one JSON document with ratios and their intervals. Absolute times of one
machine are not the claim.

overhead: engine wall time / time inside the model's forward passes - 1, at batch 1 and 32 (bars: 0.10 and 0.05).
ledger: time spent on counting what requests cost / engine wall time (bar: 0.02), also on the small model of the zoo, where a pass is short.
speed-up: generate's wall time / the engine's, same prompts, same number of tokens, both greedy and eager (bar: 1.3 at batch 8).
  uniform: all rows have the same lengths, the hardest case for an engine that packs rows. ragged: 24 requests of mixed lengths, 8 at a
  time; generate takes them in batches of 8, padded on the left, and each batch lasts as long as its longest answer.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hasten import hf
from hasten.engine import run
from hasten.flops import model_cost
from hasten.lm.engine import TokenEngine
from hasten.measure.machine import Watch, describe
from hasten.measure.roofline import Roofline, bandwidth, step_bytes
from hasten.measure.stats import median
from hasten.values import Request, Sampling, UserError

SHAPE = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "max_position_embeddings": 2048, "tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
PROMPT = 32


def main() -> None:
    args = arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    theirs = make(args.device)
    ours = hf.prepare(copy.deepcopy(theirs))
    say(ceiling(theirs).card("batch 1"))
    cells: dict[Any, Any] = {}
    with Watch() as watch:
        for batch in args.batches:
            cells[batch] = cell(ours, theirs, batch, args.tokens, args.repeats)
            say(
                f"uniform, batch {batch:>2}: overhead {show(cells[batch]['overhead'])}, generate / engine {show(cells[batch]['speedup'])}"
                + also(cells[batch])
            )
        cells["zoo"] = zoo_cell(args.repeats)
        say(f"zoo:arith-m, 64 rows: ledger {show(cells['zoo']['ledger'])}")
        cells["ragged 8"] = ragged_cell(ours, theirs, max(2, args.repeats // 2))
        say(f"ragged, 8 at a time: overhead {show(cells['ragged 8']['overhead'])}, generate / engine {show(cells['ragged 8']['speedup'])}")
    document = {"bench": "engine", "cells": cells, "bars": bars(cells), "machine": describe(), "contended": watch.contended}
    print(json.dumps({**document, "settings": vars(args)}))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=48, help="new tokens a request")
    parser.add_argument("--repeats", type=int, default=7, help="interleaved pairs a cell")
    parser.add_argument("--threads", type=int, default=0, help="torch threads (0: all)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    return parser.parse_args()


def make(device: str) -> Any:
    torch.manual_seed(0)
    device = hf.best_device() if device == "auto" else device
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    return LlamaForCausalLM(LlamaConfig(**SHAPE)).to(device, dtype).eval()


def ceiling(model: Any) -> Roofline:
    """Of a step of one row with an empty cache."""
    nbytes = step_bytes(model_cost(model))
    return Roofline(nbytes, bandwidth(nbytes, model.device.type))


def cell(ours: Any, theirs: Any, batch: int, tokens: int, repeats: int) -> dict[str, Any]:
    """Interleaved runs of one batch size: overhead of the engine over its own passes, and generate's time over the engine's."""
    prompts = torch.randint(1, 49152, (batch, PROMPT), generator=torch.Generator().manual_seed(batch))
    overheads, ledgers, ratios, natives, same = [], [], [], [], 0
    fused = native(ours)
    for i in range(repeats + 1):
        seconds, inside, counting, answers = engine_run(ours, prompts.tolist(), tokens)
        other, wanted = generate_run(theirs, prompts, tokens)
        quick = engine_run(fused, prompts.tolist(), tokens)[0] if fused is not None else None
        if i:  # the first pair warms up
            overheads.append(seconds / inside - 1)
            ledgers.append(counting / seconds)
            ratios.append(other / seconds)
            natives += [other / quick] if quick else []
        same = sum(a == w for a, w in zip(answers, wanted, strict=True))
    found = {"overhead": interval(overheads), "ledger": interval(ledgers), "speedup": interval(ratios)}
    found |= {"speedup_native": interval(natives)} if natives else {}
    return found | {"identical_rows": same, "rows": batch}


def native(model: Any) -> Any:
    """The model with native steps; None where it takes none."""
    from hasten.lm.fused import Unfit, attach

    try:
        return attach(model)
    except (Unfit, RuntimeError, OSError) as error:
        say(f"without native steps: {error}")
        return None


def engine_run(model: Any, prompts: list[list[int]], tokens: int) -> tuple[float, float, float, list[list[int]]]:
    """Wall seconds, seconds inside forward passes and on the ledger, generated ids. A fresh engine, so that repeats share no prefix."""
    engine = Counting(model)
    sampling = Sampling(max_tokens=tokens, ignore_eos=True)
    requests = {i: Request(row, sampling) for i, row in enumerate(prompts)}
    began = time.perf_counter()
    done = run(engine, requests)
    return time.perf_counter() - began, engine.forward_seconds, engine.counting, [list(r.tokens) for r in done.values()]


class Counting(TokenEngine):
    """An engine that times its own ledger: what is entered at each pass, and what is summed up for a result."""

    counting = 0.0

    def _book(self, works: Any) -> None:
        began = time.perf_counter()
        super()._book(works)
        self.counting += time.perf_counter() - began

    def _result(self, row: Any) -> Any:
        began = time.perf_counter()
        row.cost()
        self.counting += time.perf_counter() - began
        return super()._result(row)


def zoo_cell(repeats: int) -> dict[str, Any]:
    """The ledger's share with the smallest passes there are: 64 rows of a zoo model, native steps where this machine has them."""
    from hasten.load import load

    try:
        model = load("zoo:arith-m +native").engines["target"].model
    except UserError:
        model = load("zoo:arith-m").engines["target"].model
    prompts = torch.randint(3, 46, (64, PROMPT), generator=torch.Generator().manual_seed(0)).tolist()
    runs = [engine_run(model, prompts, 48) for _ in range(repeats + 1)][1:]
    return {"ledger": interval([counting / seconds for seconds, _, counting, _ in runs]), "rows": 64}


def ragged_cell(ours: Any, theirs: Any, repeats: int) -> dict[str, Any]:
    """24 requests with prompts and answers of 8 to 96 tokens, 8 at a time."""
    rand = torch.Generator().manual_seed(0)
    lengths = torch.randint(8, 97, (24, 2), generator=rand).tolist()
    prompts = [torch.randint(1, 49152, (n,), generator=rand).tolist() for n, _ in lengths]
    overheads, ratios = [], []
    for i in range(repeats + 1):
        engine = TokenEngine(ours, max_rows=8)
        asked = {j: Request(p, Sampling(max_tokens=m, ignore_eos=True)) for j, (p, (_, m)) in enumerate(zip(prompts, lengths, strict=True))}
        began = time.perf_counter()
        run(engine, asked)
        seconds = time.perf_counter() - began
        other = sum(generate_padded(theirs, prompts[j : j + 8], max(m for _, m in lengths[j : j + 8])) for j in range(0, 24, 8))
        if i:
            overheads.append(seconds / engine.forward_seconds - 1)
            ratios.append(other / seconds)
    return {"overhead": interval(overheads), "speedup": interval(ratios), "requests": 24, "rows": 8}


def generate_padded(model: Any, prompts: list[list[int]], tokens: int) -> float:
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    began = time.perf_counter()
    with torch.inference_mode():
        model.generate(ids, attention_mask=mask, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
    return time.perf_counter() - began


def generate_run(model: Any, prompts: torch.Tensor, tokens: int) -> tuple[float, list[list[int]]]:
    ids = prompts.to(model.device)
    began = time.perf_counter()
    with torch.inference_mode():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
    out = out[:, PROMPT:].tolist()
    return time.perf_counter() - began, out


def interval(values: list[float]) -> dict[str, Any]:
    """Median with its distribution-free interval."""
    x = median(values)
    return {"median": x.value, "ci": [x.low, x.high], "n": x.n}


def also(cell: dict[str, Any]) -> str:
    return f", with native steps {show(cell['speedup_native'])}" if "speedup_native" in cell else ""


def show(x: dict[str, Any]) -> str:
    return f"{x['median']:.3f} [{x['ci'][0]:.3f}, {x['ci'][1]:.3f}]"


def bars(cells: dict[Any, Any]) -> dict[str, Any]:
    """Each bar with its figure; met only where the measured median is on the right side."""
    wanted = {"overhead at batch 1 <= 0.10": (1, "overhead", 0.10), "overhead at batch 32 <= 0.05": (32, "overhead", 0.05)}
    most = max(cell["ledger"]["median"] for cell in cells.values() if "ledger" in cell)
    out: dict[str, Any] = {"ledger <= 0.02 of wall time": {"measured": most, "met": most <= 0.02}}
    for name, (batch, what, most) in wanted.items():
        if batch in cells:
            out[name] = {"measured": cells[batch][what]["median"], "met": cells[batch][what]["median"] <= most}
    if 8 in cells:
        out["generate / engine, uniform, batch 8 >= 1.3"] = {
            "measured": cells[8]["speedup"]["median"],
            "met": cells[8]["speedup"]["median"] >= 1.3,
        }
        if "speedup_native" in cells[8]:
            fast = cells[8]["speedup_native"]["median"]
            out["the same with native steps >= 1.3"] = {"measured": fast, "met": fast >= 1.3}
    return out


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
