"""Speculative decoding against plain decoding in the same engine, and against transformers' assisted generation, in one run.

    python bench/speculation.py [--models python 135m] [--texts edit source] [--batches 1 4 16] [--pairs 15] [--tokens 256] [--threads 0]

python: the zoo's python-m with python-s as its draft, native steps for both. edit: prompts that hold a held-out file and ask for it again,
greedy; source: held-out files, greedy; sampled: the same at temperature 1 (text that repeats itself little). python-m grew out of
a model of one layer and drafts for itself through its first (`early_exit`); `kept` is what that would be worth if checking went on from the
exit's states, so that no layer ran twice: seconds of a round as it is over one without the first layers' share of the check.
135m: random weights of
SmolLM2-135M's shape with a random draft of two layers, which agrees with it by chance only; greedy text of random weights repeats itself.

A pair is plain and a technique on the same prompts, in turn; what counts is the ratio of wall seconds, prompts included, so a draft pays for
reading the prompt. Output must be identical, which is checked. Every technique runs with its defaults (the goodput controller).

bars: python-m takes at least 5 times python-s's seconds a step; `suffix` or `ngram` >= 2 on edit at batch 1; `draft` >= 1.4 on source at batch
1; the lower bound of every cell >= 0.97; faster than transformers' assisted generation at batch 1 in every cell.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hasten import hf
from hasten.engine import run
from hasten.lm.attention import Plan, Span
from hasten.lm.decode import Decode, draft, early_exit, ngram, suffix
from hasten.lm.engine import TokenEngine
from hasten.lm.fused import Unfit, attach
from hasten.measure.machine import Watch, describe
from hasten.measure.stats import median
from hasten.values import Request, Sampling, UserError

SHAPE = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3,
    "max_position_embeddings": 2048, "tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
TECHNIQUES = ("ngram", "suffix", "draft", "early_exit")
PEERS = {"ngram": "prompt lookup", "suffix": "prompt lookup", "draft": "assistant", "early_exit": "early exit"}  # of transformers
PROMPT, EDIT = (
    128,
    320,
)  # tokens of a prompt; of the file in an edit prompt: more than are asked for, so that the answer can be a copy to its end
Prompts = list[list[int]]


class Pair:
    """A target and its draft, for the engine and for transformers."""

    def __init__(self, target: Any, small: Any, exit_layers: int = 0) -> None:
        self.theirs, self.small, self.exit_layers = target, small, exit_layers
        self.target, self.draft = (native(copied(m)) for m in (target, small))
        self.words = draft.Vocabulary(target.config.vocab_size)
        self.exit = native(hf.cut(self.target, exit_layers)) if exit_layers else None

    def technique(self, name: str) -> Decode | None:
        makers: dict[str, Callable[[], Decode]] = {
            "ngram": lambda: ngram.build(ngram.Options()),
            "suffix": lambda: suffix.build(suffix.Options()),
            "draft": lambda: draft.Draft(draft.Options(model="draft"), self.draft, self.words),
            "early_exit": lambda: early_exit.EarlyExit(early_exit.Options(), self.exit, self.words),
        }
        return makers[name]() if name != "plain" else None


def main() -> None:
    args = arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    cells: list[dict[str, Any]] = []
    ratios = {}
    kept = {}
    with Watch() as watch:
        for model in args.models:
            pair = PAIRS[model]()
            ratios[model] = step_ratio(pair)
            say(f"{model}: a step of the target takes {ratios[model]['median']:.1f} times the draft's")
            if pair.exit_layers:
                kept[model] = kept_states(pair)
                say(f"{model}: a round that kept the exit's states would be {kept[model]['median']:.3f} times as fast")
            for text in [t for t in TEXTS[model] if not args.texts or t in args.texts]:
                for batch in args.batches:
                    cells += cell(model, pair, text, batch, args)
    document = {"bench": "speculation", "cells": cells, "ratios": ratios, "kept": kept, "bars": bars(cells, ratios)}
    print(json.dumps({**document, "machine": describe(), "contended": watch.contended, "settings": vars(args)}))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", default=["python", "135m"], choices=[*PAIRS])
    parser.add_argument("--texts", nargs="+", default=[], help="these alone (default: all of a model)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--techniques", nargs="+", default=list(TECHNIQUES), choices=TECHNIQUES)
    return parser.parse_args()


# --- models and texts --------------------------------------------------------------------------------------------------------------------


def python() -> Pair:
    from hasten import zoo

    hf.quiet()
    return Pair(
        *(LlamaForCausalLM.from_pretrained(zoo.path(n), dtype=torch.float32).eval() for n in ("python-m", "python-s")), exit_layers=1
    )


def random_pair() -> Pair:
    torch.manual_seed(0)
    return Pair(*(LlamaForCausalLM(LlamaConfig(**SHAPE, num_hidden_layers=n)).eval() for n in (30, 2)))


PAIRS: dict[str, Callable[[], Pair]] = {"python": python, "135m": random_pair}
TEXTS = {"python": ("edit", "source", "sampled"), "135m": ("greedy", "sampled")}


def prompts(model: str, text: str, batch: int, index: int) -> Prompts:
    """The prompts of pair `index`: none is used twice."""
    start = index * batch
    if model == "135m":
        rand = torch.Generator().manual_seed(start)
        return torch.randint(1, 49152, (batch, PROMPT), generator=rand).tolist()
    from hasten.zoo import python as source

    size, words = EDIT if text == "edit" else PROMPT, source.tokenizer()
    found = [words.encode(p).ids for p in source.prompts("test", (start + batch) % 200 + batch, size)[-batch:]]
    return [[*p, *p[1 : 1 + size // 8]] for p in found] if text == "edit" else found


def copied(model: Any) -> Any:
    import copy

    return hf.prepare(copy.deepcopy(model))


def native(model: Any) -> Any:
    try:
        return attach(model)
    except (Unfit, RuntimeError, UserError) as error:
        say(f"without native steps: {error}")
        return model


# --- measuring ---------------------------------------------------------------------------------------------------------------------------


def cell(model: str, pair: Pair, text: str, batch: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row of the table for each technique."""
    techniques = [name for name in args.techniques if name != "early_exit" or pair.exit_layers]
    times: dict[str, list[float]] = {name: [] for name in ("plain", *techniques)}
    peers: dict[str, list[float]] = {}
    differing = 0
    for i in range(args.pairs + 1):
        asked = prompts(model, text, batch, i)
        sampling = Sampling(max_tokens=args.tokens, ignore_eos=True, temperature=1.0 if text == "sampled" else 0.0, seed=i)
        answers = {}
        for name in times if i % 2 else reversed(times):
            seconds, answers[name] = timed(pair, name, asked, sampling)
            if i:
                times[name].append(seconds)
        differing += sum(a != b for name in techniques for a, b in zip(answers[name], answers["plain"], strict=True))
        if batch == 1 and i and i <= max(3, args.pairs // 3):
            for name, seconds in assisted(pair, asked, sampling).items():
                peers.setdefault(name, []).append(seconds)
    rows = []
    for name in techniques:
        row = {"model": model, "text": text, "batch": batch, "technique": name, "speedup": interval(ratios(times["plain"], times[name]))}
        row["differing"] = differing
        if peers:
            rival = peers[PEERS[name]]
            row["assisted"] = interval(ratios(rival, times[name][: len(rival)]))
        rows.append(row)
        say(
            f"{model:7s} {text:8s} batch {batch:2d} {name:7s} {show(row['speedup'])}"
            + (f"  assisted / ours {show(row['assisted'])}" if peers else "")
        )
    return rows


def timed(pair: Pair, name: str, asked: Prompts, sampling: Sampling) -> tuple[float, list[tuple[int, ...]]]:
    """Wall seconds and answers of a fresh engine."""
    engine = TokenEngine(pair.target, decode=pair.technique(name))
    began = time.perf_counter()
    done = run(engine, {i: Request(p, sampling) for i, p in enumerate(asked)})
    return time.perf_counter() - began, [r.tokens for r in done.values()]


@torch.inference_mode()
def assisted(pair: Pair, asked: Prompts, sampling: Sampling) -> dict[str, float]:
    """Seconds of transformers' assisted generation with its own defaults."""
    out = {}
    ids = torch.tensor(asked)
    common = {"attention_mask": torch.ones_like(ids), "max_new_tokens": sampling.max_tokens, "min_new_tokens": sampling.max_tokens}
    common |= {"do_sample": sampling.temperature > 0, "top_k": 0}
    rivals: dict[str, dict[str, Any]] = {"prompt lookup": {"prompt_lookup_num_tokens": 10}, "assistant": {"assistant_model": pair.small}}
    if pair.exit_layers:
        rivals["early exit"] = {"assistant_early_exit": pair.exit_layers}
    for name, extra in rivals.items():
        began = time.perf_counter()
        pair.theirs.generate(ids, **common, **extra)
        out[name] = time.perf_counter() - began
    return out


def step_ratio(pair: Pair, steps: int = 40, repeats: int = 7) -> dict[str, Any]:
    """How many times the draft's seconds a step of the target takes, one row."""

    def seconds(model: Any) -> float:
        engine = TokenEngine(model)
        run(engine, {0: Request(list(range(1, 65)), Sampling(max_tokens=steps, ignore_eos=True))})
        return engine.forward_seconds

    pairs = [(seconds(pair.target), seconds(pair.draft)) for _ in range(repeats + 1)][1:]
    return interval([a / b for a, b in pairs])


def kept_states(pair: Pair, tokens: int = 4, context: int = 128, repeats: int = 60) -> dict[str, Any]:
    """Seconds of a round that commits `tokens` at most, as it is done over how it would be done with the exit's states kept.

    As it is: tokens - 1 exits and a pass of all layers over `tokens` positions. Kept: one exit more, in place of the first layers' share of
    that pass, for as many tokens. The share is the exit's own pass over as many positions, so nothing is charged for going on half way.
    """
    step = Steps(pair, context)
    found = []
    for _ in range(repeats):
        whole, share, one = step(pair.target, tokens), step(pair.exit, tokens), step(pair.exit, 1)
        found.append(((tokens - 1) * one + whole) / (tokens * one + whole - share))
    return interval(found[repeats // 6 :])


class Steps:
    """Seconds of one pass over some positions of a row after a context."""

    def __init__(self, pair: Pair, context: int) -> None:
        engine = TokenEngine(pair.target)
        run(engine, {0: Request(list(range(1, context + 1)), Sampling(max_tokens=16, ignore_eos=True))})
        self.cache, self.context = engine.cache, context

    def __call__(self, model: Any, positions: int) -> float:
        ids, at = torch.arange(positions), torch.arange(positions) + self.context
        began = time.perf_counter()
        hf.forward(model, ids, at, None, Plan(self.cache, [Span(0, self.context, positions, 0)]))
        return time.perf_counter() - began


def ratios(a: list[float], b: list[float]) -> list[float]:
    return [x / y for x, y in zip(a, b, strict=True)]


def interval(values: list[float]) -> dict[str, Any]:
    x = median(values)
    return {"median": x.value, "ci": [x.low, x.high], "n": x.n}


def show(x: dict[str, Any]) -> str:
    return f"{x['median']:.2f} [{x['ci'][0]:.2f}, {x['ci'][1]:.2f}]"


def bars(cells: list[dict[str, Any]], found: dict[str, Any]) -> dict[str, Any]:
    """Each bar with its figure; a bar whose cells were not measured is left out."""
    out: dict[str, Any] = {}

    def bar(name: str, values: list[float], least: float) -> None:
        if values:
            out[name] = {"measured": min(values), "met": min(values) >= least}

    def at(text: str, names: tuple[str, ...]) -> list[float]:
        return [
            c["speedup"]["median"] for c in cells if (c["model"], c["text"], c["batch"]) == ("python", text, 1) and c["technique"] in names
        ]

    bar("python-m's step / python-s's >= 5", [found["python"]["median"]] if "python" in found else [], 5)
    bar("suffix or ngram on edit at batch 1 >= 2", [max(x)] if (x := at("edit", ("ngram", "suffix"))) else [], 2)
    bar("draft on source at batch 1 >= 1.4", at("source", ("draft",)), 1.4)
    bar("lower bound of every cell >= 0.97", [c["speedup"]["ci"][0] for c in cells], 0.97)
    bar("transformers' assisted generation / ours at batch 1 > 1", [c["assisted"]["median"] for c in cells if "assisted" in c], 1.0)
    bar("answers that differ from plain decoding (none; near-ties apart)", [-float(c["differing"]) for c in cells], 0.0)
    return out


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
