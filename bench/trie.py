"""The trie's build and step beside the layout that STATIC's authors released (made again: peers/released_trie.py) and beside transformers'
`prefix_allowed_tokens_fn`, in one run.

    python bench/trie.py [--items 1000000] [--repeats 31] [--large 0] [--no-compile]

A step goes from log-probabilities of all tokens to each request's best beams: 2 requests of 70 beams, one core. Rivals run in turn; the
last line of stdout is one JSON document with ratios and their intervals; absolute times of one machine are not the claim. The released step is
taken as it is and compiled by torch (mode default); the ratio is against the quicker of the two.

worst case: every beam stands on a node with exactly 4, 64 or 256 children (bars: 0.8, 0.5 and 0.5 of the released step's time).
levels: uniform and Zipf-distributed catalogues; beams stand on prefixes of items drawn at random, of each length.
build: seconds and peak memory beyond the input, which is int32 [N, 8] in random order. bytes: of an item, the numbers of unsorted items included.
large: a build of so many items (10000000, say) and one search, with the process's peak memory.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.append(str(Path(__file__).parent / "peers"))
import released_trie as released

from hasten.lm.constrain import trie as tries
from hasten.lm.constrain.trie_step import Beams, begin, step, walk
from hasten.measure.machine import Watch, describe
from hasten.measure.stats import median, median_ratio

VOCABULARY, LENGTH, REQUESTS, BEAMS = 2048, 8, 2, 70
DRAWS, CALLS = 16, 4  # sets of states that are used by turns; calls of each in one measurement


def main() -> None:
    args = arguments()
    torch.set_num_threads(1)
    if args.peak:
        print(json.dumps(own_peak(args.peak[0], args.items, args.peak[1])))
        return
    if args.only_large:
        print(json.dumps(large(args.only_large)))
        return
    cells: dict[str, Any] = {"build": {}, "worst case": {}, "levels": {}}
    with Watch() as watch:
        for name in ("uniform", "zipf"):
            items = catalogue(name, args.items)
            cells["build"][name], ours, theirs = building(items)
            peaks = {"peak_over_input": peak(name, args.items, "ours"), "released_peak_over_input": peak(name, args.items, "released")}
            cells["build"][name] |= peaks
            say(f"{name}: {summary(cells['build'][name])}")
            cells["levels"][name] = {}
            for depth in range(2, LENGTH):
                found = cell(ours, theirs, items, depth, args, compiled=False)
                cells["levels"][name][depth] = found
                say(f"{name}, token {depth + 1}, branch limit {found['limit']}: {steps(found)}")
            if name == "uniform":
                cells["prefix_allowed_tokens_fn"] = foreign(items, ours, args.repeats)
                say(f"transformers' prefix_allowed_tokens_fn, 140 rows: {show(cells['prefix_allowed_tokens_fn']['ms'])} ms a step")
        for limit in (4, 64, 256):
            items = bushy(args.items, limit)
            _, ours, theirs = building(items)
            cells["worst case"][limit] = found = cell(ours, theirs, items, 2, args, compiled=args.compile)
            say(f"every node with {limit} children: {steps(found)}")
        if args.large:
            command = [sys.executable, __file__, "--only-large", str(args.large)]  # a process of its own: its peak is the set's
            cells["large"] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
            say(f"{args.large} items: {cells['large']}")
    document = {"bench": "trie", "cells": cells, "bars": bars(cells), "machine": describe(), "contended": watch.contended}
    for name, bar in document["bars"].items():
        say(f"{'met   ' if bar['met'] else 'missed'} {name}: {bar['measured']:.3g}")
    print(json.dumps({**document, "settings": vars(args)}))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=31, help="interleaved measurements a cell")
    parser.add_argument("--large", type=int, default=0, help="items of one more set, built and searched once")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="the released step as it is only")
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--only-large", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args()


def catalogue(name: str, n: int) -> np.ndarray:
    """int32 [n, 8]. zipf: each token's rank has probability ~ rank^-1.3, folded into the vocabulary."""
    draw = np.random.default_rng(0)
    if name == "uniform":
        return draw.integers(0, VOCABULARY, (n, LENGTH), dtype=np.int32)
    return ((draw.zipf(1.3, (n, LENGTH)) - 1) % VOCABULARY).astype(np.int32)


def bushy(n: int, children: int) -> np.ndarray:
    """Items whose prefixes of two tokens have exactly so many children each, all with two items at least below."""
    draw = np.random.default_rng(children)
    prefixes = draw.choice(VOCABULARY * VOCABULARY, n // children // 2, replace=False)
    third = np.argsort(draw.random((len(prefixes), VOCABULARY), dtype=np.float32), 1)[:, :children].astype(np.int32)
    heads = np.stack([np.repeat(prefixes // VOCABULARY, children), np.repeat(prefixes % VOCABULARY, children), third.ravel()], 1)
    items = np.concatenate([np.repeat(heads, 2, 0), draw.integers(0, VOCABULARY, (2 * len(heads), LENGTH - 3))], 1).astype(np.int32)
    return items[draw.permutation(len(items))]


# --- building -----------------------------------------------------------------------------------------------------------------------


def building(items: np.ndarray) -> tuple[dict[str, Any], tries.Trie, released.Layout]:
    tries.build(items[:100], VOCABULARY).arrays.native  # noqa: B018  compiles the kernel where that was not done
    seconds: list[list[float]] = [[], []]
    for _ in range(3):
        ours = theirs = None
        ours, s = measured(lambda: tries.build(items, VOCABULARY))
        theirs, other = measured(lambda: released.build(items, VOCABULARY))
        seconds[0].append(s)
        seconds[1].append(other)
    mega = len(items) / 1e6
    found = {
        "seconds_per_million": median(seconds[0]).value / mega, "released_seconds_per_million": median(seconds[1]).value / mega,
        "ratio": interval(median_ratio(*seconds)), "bytes": ours.nbytes / len(items), "released_bytes": theirs.nbytes / len(items),
        "nodes": ours.nodes, "branch": list(ours.branch), "input_bytes": items.nbytes,
    }  # fmt: skip
    return found, ours, theirs


def measured(make: Callable[[], Any]) -> tuple[Any, float]:
    began = time.perf_counter()
    out = make()
    return out, time.perf_counter() - began


def peak(name: str, n: int, which: str) -> float | None:
    """The most memory that a process of its own held while it built a set, beyond what it held before, result included; over the input's."""
    command = [sys.executable, __file__, "--items", str(n), "--peak", name, which]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def own_peak(name: str, n: int, which: str) -> float | None:
    """`peak`, in the process that it starts; None where Linux does not say."""
    items = catalogue(name, n)
    build: Callable[..., Any] = tries.build if which == "ours" else released.build
    build(items[:1000], VOCABULARY)  # what is loaded at the first call
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the highest so far is now
        before = status("VmRSS")
    except OSError:
        return None
    built = build(items, VOCABULARY)
    return (status("VmHWM") - before) / items.nbytes if built else None


def status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(field)))


# --- steps --------------------------------------------------------------------------------------------------------------------------


def cell(
    ours: tries.Trie, theirs: released.Layout, items: np.ndarray, depth: int, args: argparse.Namespace, compiled: bool
) -> dict[str, Any]:
    """One depth: seconds of a step by either and their ratio; results must be the same."""
    draw = np.random.default_rng(depth)
    limit = theirs.branch[depth]
    logp = torch.log_softmax(torch.from_numpy(draw.standard_normal((REQUESTS * BEAMS, VOCABULARY), dtype=np.float32)), -1)
    sums = (
        torch.from_numpy(draw.standard_normal((REQUESTS, BEAMS), dtype=np.float32)).sort(1, descending=True).values
    )  # as a step leaves them
    depths = torch.full((REQUESTS,), depth, dtype=torch.int32)
    pairs, pointers = theirs.pairs.long(), theirs.pointers.long()  # as the released tests cast them: indices need no conversion then
    beams, states = [], []
    for _ in range(DRAWS):
        prefixes = items[draw.choice(len(items), REQUESTS * BEAMS, replace=False), :depth]
        at = walk(ours.arrays, torch.zeros(len(prefixes), dtype=torch.int32), torch.from_numpy(prefixes.astype(np.int64)), max(ours.branch))
        beams.append(Beams(at.view(REQUESTS, BEAMS), depths, sums))
        states.append(released.walk(theirs, prefixes).view(REQUESTS, BEAMS))
    kinds: dict[str, Callable[[int], Any]] = {
        "ours": lambda i: step(ours.arrays, logp, beams[i], BEAMS, limit),
        "released": lambda i: released.step(logp, states[i], sums, pairs, pointers, limit),
        "released candidates only": lambda i: released.candidates(logp, states[i].flatten(), pairs, pointers, limit),
    }
    if compiled:
        torch._dynamo.reset()
        quick = torch.compile(released.step, dynamic=False)
        kinds["released, compiled"] = lambda i: quick(logp, states[i], sums, pairs, pointers, limit)
    for i in range(DRAWS):
        same(kinds["ours"](i), kinds["released"](i))
    seconds = interleaved(kinds, args.repeats)
    strongest = min((k for k in kinds if k in ("released", "released, compiled")), key=lambda k: median(seconds[k]).value)
    return {
        "limit": limit, "us": {k: 1e6 * median(s).value for k, s in seconds.items()}, "strongest": strongest,
        "ratio": interval(median_ratio(seconds["ours"], seconds[strongest])), "repeats": args.repeats,
    }  # fmt: skip


def same(ours: Any, theirs: Any) -> None:
    """Scores to the last bit; the rest too, where no two are equal."""
    scores, parents, tokens, _ = theirs
    live = scores > float("-inf")
    assert torch.equal(ours.beams.scores, scores), "the two steps disagree"
    distinct = bool((scores[:, 1:] != scores[:, :-1])[live[:, 1:]].all())
    assert not distinct or (torch.equal(ours.parents[live], parents[live]) and torch.equal(ours.tokens[live], tokens[live])), (
        "the two steps disagree"
    )


def interleaved(kinds: dict[str, Callable[[int], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds a call of each kind, by turns, over all sets of states."""
    out: dict[str, list[float]] = {k: [] for k in kinds}
    for turn in range(repeats + 1):
        for kind, call in kinds.items():
            began = time.perf_counter()
            for i in range(DRAWS):
                for _ in range(CALLS):
                    call(i)
            if turn:  # the first turn warms up
                out[kind].append((time.perf_counter() - began) / DRAWS / CALLS)
    return out


def foreign(items: np.ndarray, ours: tries.Trie, repeats: int) -> dict[str, Any]:
    """transformers' own processor over nested dictionaries of a part of the set: its time does not depend on the size."""
    from transformers.generation.logits_process import PrefixConstrainedLogitsProcessor

    root: dict[int, Any] = {}
    for item in items[:50_000].tolist():
        node = root
        for token in item:
            node = node.setdefault(token, {})

    def allowed(_: int, ids: torch.Tensor) -> list[int]:
        node = root
        for token in ids.tolist():
            node = node[token]
        return list(node)

    processor = PrefixConstrainedLogitsProcessor(allowed, BEAMS)
    logp = torch.log_softmax(torch.randn(REQUESTS * BEAMS, VOCABULARY), -1)
    prefixes = torch.from_numpy(items[: REQUESTS * BEAMS, :2].astype(np.int64))
    states = walk(ours.arrays, torch.zeros(len(prefixes), dtype=torch.int32), prefixes, max(ours.branch)).view(REQUESTS, BEAMS)
    beams = Beams(states, torch.full((REQUESTS,), 2, dtype=torch.int32), torch.zeros(REQUESTS, BEAMS))

    def theirs(_: int) -> Any:
        scores = processor(prefixes, logp).view(REQUESTS, -1)
        return scores.topk(BEAMS)

    seconds = interleaved(
        {"theirs": theirs, "ours": lambda _: step(ours.arrays, logp, beams, BEAMS, max(ours.branch))}, max(3, repeats // 8)
    )
    return {
        "ms": interval(median([1e3 * s for s in seconds["theirs"]])),
        "ratio": interval(median_ratio(seconds["ours"], seconds["theirs"])),
    }


def large(n: int) -> dict[str, Any]:
    """One build of a large uniform set, and one search over it."""
    items = np.empty((n, LENGTH), np.int32)
    for i in range(0, n, 1_000_000):
        items[i : i + 1_000_000] = np.random.default_rng(i).integers(0, VOCABULARY, (min(1_000_000, n - i), LENGTH), dtype=np.int32)
    trie, seconds = measured(lambda: tries.build(items, VOCABULARY))
    beams = begin([trie, trie])
    for depth in range(LENGTH):
        logp = torch.log_softmax(torch.randn(beams.states.numel(), VOCABULARY, generator=torch.Generator().manual_seed(depth)), -1)
        beams = step(trie.arrays, logp, beams, BEAMS, trie.branch[depth]).beams
    assert bool(beams.alive.all())
    return {
        "items": n,
        "seconds": seconds,
        "bytes": trie.nbytes / n,
        "process_peak_bytes": status("VmHWM") if Path("/proc/self/status").is_file() else None,
    }


# --- reporting ----------------------------------------------------------------------------------------------------------------------


def bars(cells: dict[str, Any]) -> dict[str, Any]:
    """Each bar with its figure; met only where the measured median is on the right side."""
    wanted: dict[str, tuple[float | None, float]] = {}
    for name, x in cells["build"].items():
        wanted[f"{name}: seconds a million items <= 1.5"] = (x["seconds_per_million"], 1.5)
        wanted[f"{name}: bytes an item <= 40"] = (x["bytes"], 40)
        wanted[f"{name}: peak memory over the input's < 3"] = (x["peak_over_input"], 3)
        for depth, found in cells["levels"][name].items():
            wanted[f"{name}, token {depth + 1}: step / released"] = (found["ratio"]["median"], 0.8 if found["limit"] < 64 else 0.5)
    for limit, found in cells["worst case"].items():
        wanted[f"{limit} children everywhere: step / released"] = (found["ratio"]["median"], 0.8 if limit < 64 else 0.5)
    return {f"{name} (bar {most})": {"measured": x, "met": x <= most} for name, (x, most) in wanted.items() if x is not None}


def interval(x: Any) -> dict[str, Any]:
    return {"median": x.value, "ci": [x.low, x.high], "n": x.n}


def show(x: dict[str, Any]) -> str:
    return f"{x['median']:.3f} [{x['ci'][0]:.3f}, {x['ci'][1]:.3f}]"


def steps(x: dict[str, Any]) -> str:
    times = ", ".join(f"{k} {us:.0f}" for k, us in x["us"].items())
    return f"{times} us; ours / {x['strongest']} {show(x['ratio'])}"


def summary(x: dict[str, Any]) -> str:
    peaks = (
        ""
        if x["peak_over_input"] is None
        else f", peak {x['peak_over_input']:.2f} x the input (released {x['released_peak_over_input']:.2f})"
    )
    return (
        f"built in {x['seconds_per_million']:.2f} s a million (released {x['released_seconds_per_million']:.2f}, ratio {show(x['ratio'])}), "
        f"{x['bytes']:.1f} bytes an item (released {x['released_bytes']:.1f}){peaks}"
    )


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
