"""Search over the engine against the loop that libraries of search run, in one process.

    python bench/search.py [--policy arith-m] [--width 16] [--searches 64] [--loop 4] [--pairs 5] [--threads 0]

Ours: `--searches` REBASE searches at once (`strategies/rebase.py`), steps in torch or native, caches of policy and reward model forked. Theirs: one
problem after the other, every step of its branches one `transformers.generate` over their whole texts, left-padded, and one pass of the
reward model over whole texts (what search-and-learn does), with the same rule of allocation; `--loop` problems of the same set a round, as it
takes so long. Ratios are of seconds a problem. Then plain sampling at batch sizes: tokens a second, and time above the engine's own passes.

bars: 8 times the loop's speed; engine time at most 1.2 times the sum of its own passes. The last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

import torch
from transformers import AutoModelForTokenClassification, LlamaForCausalLM

import hasten
from hasten import hf, zoo
from hasten.engine import run
from hasten.measure.machine import Watch, describe
from hasten.measure.stats import median
from hasten.measure.tasks import load_task
from hasten.strategies.allocate import largest_remainder
from hasten.strategies.rebase import MAX_STEPS
from hasten.values import Request, Sampling
from hasten.zoo.tokenizer import EOS, PAD, STEP_END

JUDGE, BALANCE, TOKENS = "arith-prm-s", 0.1, 160
BATCHES = (16, 256, 1024)


def main() -> None:
    args = arguments()
    threads = args.threads or "auto"
    prompts = [item.prompt for item in load_task("arith").items["calibration"]]
    recipe = f"zoo:{args.policy}%s +rebase(width={args.width},reward=zoo:{JUDGE})"
    ours = {name: hasten.load(recipe % with_, threads=threads) for name, with_ in (("ours", ""), ("ours, native", " +native"))}
    loop = Loop(args.policy, args.width)
    times: dict[str, list[float]] = {name: [] for name in [*ours, "loop"]}
    passes: dict[str, list[float]] = {name: [] for name in ours}
    with Watch() as watch:
        for i in range(args.pairs + 1):
            part = prompts[i * args.searches : (i + 1) * args.searches]
            for name, loaded in ours.items():
                seconds, inside, reused = searched(loaded, part, i)
                if i:
                    times[name].append(seconds / len(part))
                    passes[name].append(seconds / inside)
            began = time.perf_counter()
            for prompt in part[: args.loop]:
                loop(ours["ours"].tokenizer(prompt)["input_ids"])
            if i:
                times["loop"].append((time.perf_counter() - began) / args.loop)
        ratios = {name: interval([b / a for a, b in zip(times[name], times["loop"], strict=True)]) for name in ours}
        over = {name: interval(passes[name]) for name in ours}
        for name in ours:
            say(
                f"{name}: {show(ratios[name])} times the loop's speed; {show(over[name])} times its own passes; {reused:.0%} of tokens reused"
            )
        rows = [sampled(ours["ours, native"], prompts, batch) for batch in BATCHES]
    document = {"bench": "search", "ratios": ratios, "over_passes": over, "sampling": rows, "bars": bars(ratios, over, rows)}
    print(json.dumps({**document, "machine": describe(), "contended": watch.contended, "settings": vars(args)}))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--policy", default="arith-m")
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--searches", type=int, default=64, help="at once, ours")
    parser.add_argument("--loop", type=int, default=4, help="problems of the loop in a round")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0)
    return parser.parse_args()


def searched(loaded: Any, prompts: list[Any], seed: int) -> tuple[float, float, float]:
    """Wall seconds, those inside passes of either model, and the share of prompt tokens that came from caches."""
    loaded.forget()
    before = sum(e.forward_seconds for e in loaded.engines.values())
    began = time.perf_counter()
    found = run(loaded.engine, {i: Request(p, Sampling(max_tokens=TOKENS, seed=seed)) for i, p in enumerate(prompts)})
    seconds = time.perf_counter() - began
    costs = [cost for r in found.values() for cost in r.usage.by_role.values()]
    share = sum(c.reused for c in costs) / sum(c.prompt for c in costs)
    return seconds, sum(e.forward_seconds for e in loaded.engines.values()) - before, share


class Loop:
    """One search after the other over transformers, as its libraries do it: whole texts each step."""

    def __init__(self, policy: str, width: int) -> None:
        hf.quiet()
        self.policy = LlamaForCausalLM.from_pretrained(zoo.path(policy), dtype=torch.float32).eval()
        self.judge = AutoModelForTokenClassification.from_pretrained(zoo.path(JUDGE), dtype=torch.float32).eval()
        self.width = width

    @torch.inference_mode()
    def __call__(self, prompt: list[int]) -> int:
        """Solutions found."""
        branches, left = [list(prompt)] * self.width, self.width
        for _ in range(MAX_STEPS):
            ids, mask = padded(branches, left=True)
            new = self.policy.generate(
                ids, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0, max_new_tokens=TOKENS - ids.shape[1] + len(prompt),
                eos_token_id=[EOS, STEP_END], pad_token_id=PAD,
            )[:, ids.shape[1] :].tolist()  # fmt: skip
            branches = [[*b, *(t for t in tail if t != PAD)] for b, tail in zip(branches, new, strict=True)]
            rewards = self.scored(branches)
            live = [i for i, b in enumerate(branches) if b[-1] == STEP_END and len(b) < len(prompt) + TOKENS]
            left -= len(branches) - len(live)
            if not live or left <= 0:
                break
            counts = largest_remainder([rewards[i] for i in live], left, BALANCE)
            branches = [branches[i] for i, n in zip(live, counts, strict=True) for _ in range(n)]
        return self.width - max(left, 0)

    def scored(self, branches: list[list[int]]) -> list[float]:
        ids, mask = padded(branches, left=False)
        logits = self.judge(ids, attention_mask=mask).logits[:, :, 0]
        return torch.sigmoid(logits[torch.arange(len(branches)), mask.sum(1) - 1]).tolist()


def padded(rows: list[list[int]], left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    most = max(map(len, rows))
    pads = [[PAD] * (most - len(r)) for r in rows]
    ids = torch.tensor([[*p, *r] if left else [*r, *p] for p, r in zip(pads, rows, strict=True)])
    ones = torch.tensor([[0] * len(p) + [1] * len(r) if left else [1] * len(r) + [0] * len(p) for p, r in zip(pads, rows, strict=True)])
    return ids, ones


def sampled(loaded: Any, prompts: list[Any], batch: int) -> dict[str, Any]:
    """Samples of one model at a batch size: tokens a second, and wall time over that of its passes."""
    engine = loaded.engines["target"]
    engine.cache.forget()
    before, began = engine.forward_seconds, time.perf_counter()
    found = run(engine, {i: Request(p, Sampling(max_tokens=TOKENS, temperature=1.0, seed=i)) for i, p in enumerate(prompts[:batch])})
    seconds = time.perf_counter() - began
    row = {"batch": batch, "tokens_per_second": sum(len(r.tokens) for r in found.values()) / seconds}
    row["over_passes"] = seconds / (engine.forward_seconds - before)
    say(f"samples, batch {batch}: {row['tokens_per_second']:.0f} tokens a second, {row['over_passes']:.2f} times its own passes")
    return row


def interval(values: list[float]) -> dict[str, float]:
    found = median(values)
    return {"median": found.value, "low": found.low, "high": found.high, "n": len(values)}


def show(found: dict[str, float]) -> str:
    return f"{found['median']:.2f} [{found['low']:.2f}, {found['high']:.2f}]"


def bars(ratios: dict[str, Any], over: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    worst = max(row["over_passes"] for row in rows)
    return {
        ">= 8 times the loop, torch steps": {"measured": ratios["ours"]["median"], "met": ratios["ours"]["median"] >= 8},
        ">= 8 times the loop, native steps": {"measured": ratios["ours, native"]["median"], "met": ratios["ours, native"]["median"] >= 8},
        "search <= 1.2 times its passes, torch steps": {"measured": over["ours"]["median"], "met": over["ours"]["median"] <= 1.2},
        "samples <= 1.2 times their passes": {"measured": worst, "met": worst <= 1.2},
    }


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
