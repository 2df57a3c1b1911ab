"""hasten on a CPU against transformers, llama.cpp and OpenVINO: milliseconds a decode step, a prompt of 512, and seconds to a first answer.

    python bench/cpu.py [--llama-python PATH] [--openvino-python PATH] [--rounds 9] [--steps 6] [--threads 2] [--folder KEEP]

A random-weight Llama of SmolLM2-135M's shape. Every rival is a process of its own (`peers/serving.py` has the questions it answers), one
computes at a time, and idle ones sleep. First its logits after a few greedy steps must be those of transformers, up to its number format, so a
model wrongly converted is never a peer. Then rounds: each rival in turn does some steps (the first wakes it and does not count). Ratios are
taken within a round; what is reported is their median with its interval. A step is tokens in, next tokens out; hasten's is `TokenEngine.step`,
its pass alone stands beside it. Contexts grow by a token a step, alike for all, and are --context on average.

Ceilings are printed first: the bytes of the weights, and of cached keys and values at 16 bits, over the bandwidth measured; distances from
them use the bandwidth of the same round, as that of a shared machine changes. The last line of stdout is one JSON document. Peers that are not
installed are left out: `pip install 'hasten[peers]'` brings llama.cpp; OpenVINO's exporter wants an older transformers, so an environment with
`pip install optimum-intel[openvino]` is named by its interpreter. llama.cpp crashes on processors with AMX where GCC 12 or older built it (the
compiler drops half of the tiles' configuration).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median as middle
from typing import Any

import numpy as np
import torch
from engine import interval, make, say, show
from peers.process import Absent, Process

from hasten.flops import model_cost
from hasten.measure.machine import Watch, describe
from hasten.measure.roofline import Roofline, bandwidth, step_bytes

REFERENCE, OURS = "transformers fp32", ("hasten", "hasten native", "hasten bf16", "hasten int8", "hasten int4")
RIVALS = {  # name: script, kind, whether files are converted for it
    REFERENCE: ("transformers_peer.py", "fp32", False),
    "hasten": ("hasten_peer.py", "plain", False),
    "hasten native": ("hasten_peer.py", "native", False),
    "hasten bf16": ("hasten_peer.py", "bf16", False),
    "hasten int8": ("hasten_peer.py", "int8", False),
    "hasten int4": ("hasten_peer.py", "int4", False),
    "llama.cpp F32": ("llama_peer.py", "F32", True),
    "llama.cpp Q8_0": ("llama_peer.py", "Q8_0", True),
    "llama.cpp Q4_0": ("llama_peer.py", "Q4_0", True),
    "OpenVINO fp": ("openvino_peer.py", "fp", True),
    "OpenVINO int8": ("openvino_peer.py", "int8", True),
}
FIVE = 5 / 32  # layers at 4 bits with steps or scales, the output layer at 8
SHARES = {
    "fp32": 1.0,
    "f32": 1.0,
    "F32": 1.0,
    "bf16": 0.5,
    "f16": 0.5,
    "int8": 0.25,
    "Q8_0": 0.25,
    "int4": FIVE,
    "Q4_0": FIVE,
}  # of fp32's bytes
TOLERANCE = {1.0: 0.002, 0.5: 0.05, 0.25: 0.15, FIVE: 0.6}  # of logits, by share: root of mean square error over their standard deviation
PROMPT = 512


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    with kept(args.folder) as folder:
        roofs = ceilings(model_in(folder), args)
        watches: list[bool] = []
        rivals = started(folder, args, watches)
        try:
            document = measured(rivals, roofs, args, watches)
        finally:
            for rival in rivals.values():
                rival.close()
    print(json.dumps(document))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--llama-python", default=sys.executable, help="interpreter that has llama-cpp-python and gguf")
    parser.add_argument("--openvino-python", default=sys.executable, help="interpreter that has openvino and optimum-intel")
    parser.add_argument("--rounds", type=int, default=9, help="rounds a cell")
    parser.add_argument("--steps", type=int, default=6, help="steps that count, a rival and round")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--context", type=int, default=128, help="positions of a row, on average")
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8, 32])
    parser.add_argument("--rivals", nargs="+", default=list(RIVALS), choices=list(RIVALS))
    parser.add_argument("--folder", type=Path, help="keep the model and its conversions here (default: a temporary folder)")
    return parser.parse_args()


@contextmanager
def kept(folder: Path | None) -> Any:
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        return
    with tempfile.TemporaryDirectory() as temporary:
        yield Path(temporary)


def model_in(folder: Path) -> Any:
    """The model, saved. Queries and keys are larger than a fresh model's, so that what attends to what shows in the logits."""
    model = make("cpu")
    for layer in model.model.layers:
        for part in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            part.weight.data.mul_(3)
    if not (folder / "config.json").exists():
        model.save_pretrained(folder)
    return model


def ceilings(model: Any, args: argparse.Namespace) -> dict[tuple[float, int], Roofline]:
    """Of each share of fp32's weight bytes and batch size; printed."""
    cost, roofs = model_cost(model), {}
    for share, name in ((1.0, "fp32"), (0.5, "16 bits"), (0.25, "int8"), (FIVE, "int4")):
        speed = bandwidth(share * cost.weight_bytes)
        for batch in args.batches:
            roof = roofs[share, batch] = Roofline(step_bytes(cost, batch, args.context, weights=share, cache=0.5), speed)
            say(roof.card(f"{name}, batch {batch}"))
    return roofs


# --- rivals -----------------------------------------------------------------------------------------------------------------------


def started(folder: Path, args: argparse.Namespace, watches: list[bool]) -> dict[str, Process]:
    """Rivals that are there and compute the right thing, started one after the other; the reference is always among them."""
    rivals: dict[str, Process] = {}
    pythons = {"llama_peer.py": args.llama_python, "openvino_peer.py": args.openvino_python}
    for name in dict.fromkeys([REFERENCE, *args.rivals]):
        script, kind, converts = RIVALS[name]
        try:
            with Watch(children=lambda: used(rivals)) as watch:
                rivals[name] = rival = Process(pythons.get(script, sys.executable), script, kind, folder, args.threads, converts)
        except Absent as why:
            say(f"{name}: left out ({why})")
            continue
        watches.append(watch.contended)
        off, same = agreement(rival, rivals[REFERENCE])
        rival.facts |= {"logits_off": off, "same_choice": same}
        wrong = off > TOLERANCE[share(rival)]
        if rival.facts.get("fused") is False and name != "hasten":
            say(f"{name}: its steps are NOT fused, for the fused step was refused")
        say(f"{name}: {rival.cold:.1f} s to a first answer; logits {off:.2%} off, same choice in {same:.0%}{'; WRONG, left out' * wrong}")
        if wrong:
            rivals.pop(name).close()
    return rivals


def used(rivals: dict[str, Process]) -> float:
    """Processor-seconds of all rivals, of what was converted for them, and of those that were closed."""
    ended = os.times()
    return ended.children_user + ended.children_system + sum(rival.seconds() for rival in rivals.values())


def agreement(rival: Process, reference: Process) -> tuple[float, float]:
    """Of three rows after three greedy steps: error of the logits in standard deviations, and share of rows with the same choice."""
    prompts = np.random.default_rng(0).integers(1, 900, (3, 24)).tolist()
    said = rival.ask(greedy=prompts, steps=3)
    whole = [prompt + tokens for prompt, tokens in zip(prompts, said["tokens"], strict=True)]
    mine, theirs = np.array(said["logits"]), np.array(reference.ask(greedy=whole, steps=0)["logits"])
    return float(np.sqrt(((mine - theirs) ** 2).mean()) / theirs.std()), float((mine.argmax(-1) == theirs.argmax(-1)).mean())


def share(rival: Process) -> float:
    return SHARES[rival.facts["weights"]]


# --- measuring --------------------------------------------------------------------------------------------------------------------


def measured(
    rivals: dict[str, Process], roofs: dict[tuple[float, int], Roofline], args: argparse.Namespace, watches: list[bool]
) -> dict[str, Any]:
    cells: dict[str, Any] = {"cold start": {name: rival.cold for name, rival in rivals.items()}}
    for batch in args.batches:
        times, floors = decode_rounds(rivals, roofs, batch, args, watches)
        cells[f"batch {batch}"] = cell(times, floors)
        report(f"batch {batch}, ms a step", cells[f"batch {batch}"], cells["cold start"])
    cells[f"prefill {PROMPT}"] = cell(prefill_rounds(rivals, args, watches), {})
    report(f"prompt of {PROMPT} tokens, ms", cells[f"prefill {PROMPT}"], cells["cold start"])
    document = {"bench": "cpu", "cells": cells, "bars": bars(cells), "machine": describe("cpu", args.threads), "contended": any(watches)}
    for name, bar in document["bars"].items():
        say(f"{name}: {bar['measured']} -> {'not measured' if bar['met'] is None else 'met' if bar['met'] else 'NOT MET'}")
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    settings |= {"contended_stretches": [sum(watches), len(watches)], "rivals": {name: rival.facts for name, rival in rivals.items()}}
    return {**document, "settings": settings}


def decode_rounds(
    rivals: dict[str, Process], roofs: dict[tuple[float, int], Roofline], batch: int, args: argparse.Namespace, watches: list[bool]
) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """name -> [(seconds a step, of which in the pass)] of each round, and name -> seconds that the round's own ceiling allows."""
    n = args.steps + 1
    for rival in rivals.values():
        rival.ask(fill=[batch, max(1, args.context - args.rounds * n // 2)])
    times: dict[str, Any] = {name: [] for name in rivals}
    floors: dict[str, list[float]] = {name: [] for name in rivals}
    for names in watched(rivals, args.rounds, watches):
        speeds = {part: bandwidth(roofs[part, batch].nbytes, repeats=5) for part in {share(rival) for rival in rivals.values()}}
        for name in names:
            said = rivals[name].ask(steps=n)
            times[name].append((middle(said["seconds"][1:]), middle(said["passes"][1:])))
            floors[name].append(roofs[share(rivals[name]), batch].nbytes / speeds[share(rivals[name])])
    return times, floors


def prefill_rounds(rivals: dict[str, Process], args: argparse.Namespace, watches: list[bool]) -> dict[str, Any]:
    for rival in rivals.values():
        rival.ask(prefill=PROMPT)
    times: dict[str, Any] = {name: [] for name in rivals}
    for names in watched(rivals, args.rounds, watches):
        for name in names:
            seconds = rivals[name].ask(prefill=PROMPT)["seconds"]
            times[name].append((seconds, seconds))
    return times


def watched(rivals: dict[str, Process], rounds: int, watches: list[bool]) -> Any:
    """Rounds: each with the rivals in another order, and whether other programs ran meanwhile noted at its end."""
    names = list(rivals)
    for i in range(rounds):
        with Watch(children=lambda: used(rivals)) as watch:
            yield names[i % len(names) :] + names[: i % len(names)]
        watches.append(watch.contended)


def cell(times: dict[str, list[tuple[float, float]]], floors: dict[str, list[float]]) -> dict[str, Any]:
    """Milliseconds and distance from the ceiling of each rival, and seconds of ours over each other's, round by round."""
    rows = {}
    for name, pairs in times.items():
        whole, inside = zip(*pairs, strict=True)
        rows[name] = {"ms": interval([1e3 * s for s in whole]), "pass_ms": 1e3 * middle(inside)}
        if name in floors:
            over = [s / floor for s, floor in zip(whole, floors[name], strict=True)]
            rows[name] |= {"ceiling_ms": 1e3 * middle(floors[name]), "over_ceiling": interval(over)}
    ratios = {f"{a} / {b}": ratio(times[a], times[b]) for a in OURS if a in times for b in times if a != b}
    return {"rivals": rows, "ratios": ratios}


def ratio(mine: Sequence[tuple[float, float]], theirs: Sequence[tuple[float, float]]) -> dict[str, Any]:
    return interval([a / b for (a, _), (b, _) in zip(mine, theirs, strict=True)])


def report(title: str, cell: dict[str, Any], cold: dict[str, float]) -> None:
    ours = [name for name in OURS[1:] if name in cell["rivals"]]
    heads = "".join(f"{name.removeprefix('hasten ') + ' /':>9}" for name in ours)
    say(f"\n{title:<28} {'median and interval':>28} {'pass':>9} {'x ceiling':>10} {'start, s':>9}{heads}")
    for name, row in cell["rivals"].items():
        ratios = [cell["ratios"].get(f"{our} / {name}", {}).get("median") for our in ours]
        shown = "".join(f"{'-' if r is None else format(r, '.2f'):>9}" for r in ratios)
        over = f"{row['over_ceiling']['median']:.2f}" if "over_ceiling" in row else "-"
        say(f"  {name:<26} {show(row['ms']):>28} {row['pass_ms']:>9.2f} {over:>10} {cold[name]:>9.1f}{shown}")


# --- bars -------------------------------------------------------------------------------------------------------------------------


def bars(cells: dict[str, Any]) -> dict[str, Any]:
    """What must hold, each with its figure; met where the median is on the right side, None where a rival was not there."""
    out = {}
    for batch in (1, 8):
        out[f"native / llama.cpp F32, batch {batch} <= 1.15"] = bar(cells, f"batch {batch}", "hasten native / llama.cpp F32", 1.15)
    for ours, other in (("int8", "llama.cpp Q8_0"), ("int8", "OpenVINO int8"), ("int4", "llama.cpp Q4_0"), ("bf16", "OpenVINO fp")):
        for where in ("batch 1", "batch 8", "batch 32", f"prefill {PROMPT}"):
            out[f"{ours} / {other}, {where} <= 1"] = bar(cells, where, f"hasten {ours} / {other}", 1.0)
    over = cells.get("batch 1", {}).get("rivals", {}).get("hasten int8", {}).get("over_ceiling")
    out["int8 / ceiling, batch 1 <= 1.4"] = verdict(over, 1.4)
    if over and over["median"] < 0.95:  # a ceiling that is broken through was measured while something else used the memory
        out["int8 / ceiling, batch 1 <= 1.4"]["met"] = None
    for name in OURS[1:]:
        seconds = cells["cold start"].get(name)
        out[f"{name}, seconds to a first answer < 15"] = {"measured": seconds, "met": None if seconds is None else seconds < 15}
    return out


def bar(cells: dict[str, Any], where: str, which: str, most: float) -> dict[str, Any]:
    return verdict(cells.get(where, {}).get("ratios", {}).get(which), most)


def verdict(x: dict[str, Any] | None, most: float) -> dict[str, Any]:
    return {"measured": None, "met": None} if not x else {"measured": x["median"], "ci": x["ci"], "met": x["median"] <= most}


if __name__ == "__main__":
    main()
