"""Ditto, Jithin and Adarsh (2024), "Inference Acceleration for Large Language Models on CPUs", arXiv:2406.07553.

The paper keeps the key-value cache in tiles of main memory, batches all requests that fit, and runs one worker process for each NUMA node.
It publishes generated tokens a second of nine models, no code, no latencies and no meter readings. What is measured here is the ratio that
each claim is about, with our engine in the place of theirs and random weights of a small Llama in the place of their models.

Evidence: in each repeat every arm runs once, one after the other, in an order that is turned round from repeat to repeat. A line holds
`rate` (generated tokens a second of all its workers), and `joules` (of 1,000 tokens, for a billion parameters) or `no_meter`, the reason why not.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median as middle
from typing import Any

from hasten.cpu import topology
from hasten.measure.stats import Estimate
from hasten.papers.paper import Absent, Claim, Line, Paper, Run, Settings, exact, median, ratio, values
from hasten.papers.worker import Job, Worker

# Published figures, generated tokens a second unless said otherwise.
STOCK, BATCHED = 9.31, 167.58  # table 1, starcoderbase-3b, 100 requests, 32 vCPU; CodeLlama-7b: 4.36, 93.69
FOUR_WORKERS = 670.32  # figure 1, starcoderbase-3b
ON_32 = (167.58, 85.52, 46.26, 50.57, 23.46, 93.69, 53.89)  # table 3: seven models on 32 vCPU …
ON_48 = (181.57, 75.24, 48.42, 52.35, 24.77, 84.67, 58.82)  # … and table 4: on 48
GPU_JOULES, CPU_JOULES = 1252.0, 613.0  # table 5, of 1,000 tokens of starcoderbase-3b (3.04 billion parameters)

# SmolLM2-135M's shape, and one of 18 million parameters that the quick form has the time for.
FULL_SHAPE: dict[str, Any] = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "max_position_embeddings": 2048, "tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
QUICK_SHAPE = FULL_SHAPE | {
    "vocab_size": 8192, "hidden_size": 320, "intermediate_size": 864, "num_hidden_layers": 12, "num_attention_heads": 5, "num_key_value_heads": 5,
}  # fmt: skip

# Requests, prompts and answers of the full form are the paper's: 992.36 processed and 167.58 generated tokens a second for 27 seconds make
# 223 and 45 tokens a request. What is served one by one takes as long for each request, so a few of them are enough.
FULL: dict[str, Any] = {"repeats": 9, "requests": 100, "many": 500, "single": 4, "prompt": 223, "tokens": 45, "shape": FULL_SHAPE}
QUICK: dict[str, Any] = {"repeats": 6, "requests": 100, "many": 500, "single": 8, "prompt": 24, "tokens": 8, "shape": QUICK_SHAPE}

STOCK_LOOP, ONE_ROW, ALL_ROWS, MANY = "stock loop", "one row", "batched", "many requests"
HALF_ONE_ROW, HALF_ALL_ROWS, HALF_SHARE, WORKERS = "one row, one part", "batched, one part", "share, one part", "share, every part"


def settings(full: bool) -> dict[str, Any]:
    """The form's, with a number format that the processor computes in, and the parts that the cores are divided into."""
    from types import SimpleNamespace

    import torch

    from hasten import hf

    form = FULL if full else QUICK
    dtype = str(hf.best_dtype(SimpleNamespace(dtype=torch.bfloat16), "cpu")).removeprefix("torch.")
    divided = {"cores": len(cores()), "parts": [len(part) for part in parts()], "nodes": len(topology().nodes)}
    return form | {"shape": form["shape"] | {"dtype": dtype}} | divided


def cores() -> list[int]:
    """One processor of each physical core."""
    return [core[0] for node in topology().nodes for core in node]


def parts() -> list[list[int]]:
    """The cores of each NUMA node; of a single node, two halves; one part if there is but one core."""
    return topology().places(max(len(topology().nodes), min(2, len(cores()))))


def arms(s: Any, seed: int) -> dict[str, tuple[str, Job]]:
    """What one repeat measures: on which workers ("all" cores in one, the "first" part, or "every" part), and what each of them does."""

    def job(requests: int, rows: int) -> Job:
        return Job(requests, s["prompt"], s["tokens"], rows, seed)

    n, share = s["requests"], s["requests"] // len(s["parts"])
    whole = {
        STOCK_LOOP: ("all", job(s["single"], 0)),
        ONE_ROW: ("all", job(s["single"], 1)),
        ALL_ROWS: ("all", job(n, n)),
        MANY: ("all", job(s["many"], s["many"])),
    }
    divided = {
        HALF_ONE_ROW: ("first", job(s["single"], 1)),
        HALF_ALL_ROWS: ("first", job(n, n)),
        HALF_SHARE: ("first", job(share, share)),
        WORKERS: ("every", job(share, share)),
    }
    return whole | divided if len(s["parts"]) > 1 else whole


class Pool:
    """The workers, started when first asked: one on all cores, one on each part. Never do two of them that share a core work at a time."""

    def __init__(self, shape: Any) -> None:
        self._shape = shape
        self._all: list[Worker] = []
        self._parts: list[Worker] = []

    def line(self, who: str, job: Job) -> Line:
        """Let the workers do a job each, at the same time."""
        from hasten.measure.energy import EnergyMeter
        from hasten.measure.machine import Watch

        self._start()
        workers, used = {"all": self._all, "first": self._parts[:1], "every": self._parts}[who], [0.0]
        with EnergyMeter(gpu=False) as energy, Watch(children=lambda: used[0]) as watch:
            began = time.perf_counter()
            for worker in workers:
                worker.send(job)
            done = [worker.receive() for worker in workers]
            seconds = time.perf_counter() - began
            used[0] = sum(d["cpu"] for d in done)
        made = sum(d["tokens"] for d in done)
        unit = made / 1000 * done[0]["parameters"] / 1e9
        spent = {"no_meter": energy.reason} if energy.joules is None else {"joules": energy.joules / unit}
        return {"rate": made / seconds, "contended": watch.contended, **spent}

    def _start(self) -> None:
        if not self._all:
            self._all = [Worker(cores(), self._shape)]
            self._parts = [Worker(part, self._shape) for part in parts()]
            for worker in (*self._all, *self._parts):
                self._warm(worker)

    def _warm(self, worker: Worker) -> None:
        for rows in (0, 1, 8):
            worker.send(Job(max(1, rows), 8, 2, rows, 0))
            worker.receive()

    def close(self) -> None:
        workers = (*self._all, *self._parts)
        for worker in workers:  # all of them before any is waited for, in case that is interrupted
            worker.stop()
        for worker in workers:
            worker.close()


def collect(run: Run) -> None:
    """Rounds of all arms, forwards and backwards in turn."""
    with contextlib.closing(Pool(run.settings["shape"])) as pool:
        for repeat in range(run.settings["repeats"]):
            todo = list(arms(run.settings, repeat).items())
            for name, (who, job) in reversed(todo) if repeat % 2 else todo:
                if not run.once(name, repeat, partial(pool.line, who, job)):
                    return


# ------------------------------------------------------------------------------------------------------ what the claims read


def published_gain() -> float:
    """Median over the models of what half as many threads again brought, in per cent of a half."""
    return round(100 * middle([(b / a - 1) / 0.5 for a, b in zip(ON_32, ON_48, strict=True)]), 1)


Find = Callable[[Sequence[Line], Settings], Estimate | Absent]


def rates(a: str, b: str) -> Find:
    """The ratio of two arms' tokens a second, of whole machines."""
    return lambda lines, s: ratio(lines, a, b, "rate")


def if_divided(find: Find) -> Find:
    """What needs parts of the machine, where it can be divided."""
    return lambda lines, s: find(lines, s) if len(s["parts"]) > 1 else Absent("there is a single core")


def gain(whole: str, part: str) -> Find:
    """What the cores beyond the first part's add, as per cent of what as many times the throughput would be."""

    def find(lines: Sequence[Line], s: Settings) -> Estimate | Absent:
        fast, slow, more = values(lines, whole, "rate"), values(lines, part, "rate"), s["cores"] / s["parts"][0] - 1
        return median([100 * (fast[i] / slow[i] - 1) / more for i in sorted(fast.keys() & slow.keys())])

    return if_divided(find)


def scaling(lines: Sequence[Line], s: Settings) -> Estimate | Absent:
    """All workers' tokens a second, each over that of one worker alone: 1 if none is in another's way."""
    found = ratio(lines, WORKERS, HALF_SHARE, "rate")
    k = len(s["parts"])
    return Estimate(found.value / k, found.low / k, found.high / k, found.n)


def within_a_node(lines: Sequence[Line], s: Settings) -> Estimate | Absent:
    return if_divided(scaling)(lines, s) if s["nodes"] == 1 else Absent(f"its workers are on {s['nodes']} NUMA nodes")


def across_nodes(lines: Sequence[Line], s: Settings) -> Estimate | Absent:
    return scaling(lines, s) if s["nodes"] > 1 else Absent("it has one NUMA node")


def joules(lines: Sequence[Line], s: Settings) -> Estimate | Absent:
    reason = next((line["no_meter"] for line in lines if "no_meter" in line), "")
    return Absent(reason) if reason else median(list(values(lines, ALL_ROWS, "joules").values()))


def product(lines: Sequence[Line], s: Settings) -> Estimate:
    """How far, in per cent, the figure of four workers is from four times that of one; rounding leaves 0.005 tokens a second open on both."""
    apart, rounding = abs(FOUR_WORKERS / (4 * BATCHED) - 1), 0.005 / FOUR_WORKERS + 0.005 / BATCHED
    return exact(100 * apart, 100 * max(0.0, apart - rounding), 100 * (apart + rounding))


def saving(lines: Sequence[Line], s: Settings) -> Estimate:
    """Energy saved, in per cent, by the figures of table 5, which are rounded to whole joules."""
    return exact(
        100 * (1 - CPU_JOULES / GPU_JOULES),
        100 * (1 - (CPU_JOULES + 0.5) / (GPU_JOULES - 0.5)),
        100 * (1 - (CPU_JOULES - 0.5) / (GPU_JOULES + 0.5)),
    )


# -------------------------------------------------------------------------------------------------------------- the claims

CLAIMS = (
    Claim(
        "batching", "Batching 100 requests gives 18 times the throughput of the stock loop (21.5 times for CodeLlama-7b)",
        round(BATCHED / STOCK, 1), "x", 18.0, "above",
        "our engine with 100 rows over transformers.generate, one request after the other; published: table 1, batched over unbatched",
        rates(ALL_ROWS, STOCK_LOOP),
    ),
    Claim(
        "batching-alone", "The gain is the batch's: it is as large over the same engine with one row",
        round(BATCHED / STOCK, 1), "x", 18.0, "above", "our engine with 100 rows over itself with one row; the paper has no such control",
        rates(ALL_ROWS, ONE_ROW),
    ),
    Claim(
        "more-requests", "Throughput grows with the number of requests: from 100 to 500 by two thirds",
        1.67, "x", 1.1, "above",
        "500 requests over 100, all in flight; published: read off figure 2 (about 150 and 250); less than a tenth is no growth",
        rates(MANY, ALL_ROWS),
    ),
    Claim(
        "more-threads", "More threads hardly help: half as many again bring -12 to +9 % throughput",
        published_gain(), "% of linear", 50.0, "below",
        "100 requests on all cores over the first part of them; published: median of seven models from 32 to 48 vCPU (tables 3 and 4)",
        gain(ALL_ROWS, HALF_ALL_ROWS),
    ),
    Claim(
        "more-threads-one-row", "The same of one request at a time, which reads all weights for every token",
        None, "% of linear", 50.0, "below", "our engine with one row on all cores over the first part of them; the paper has no such figure",
        gain(ONE_ROW, HALF_ONE_ROW),
    ),
    Claim(
        "workers-on-nodes", "Four workers, one a NUMA node, have four times the throughput of one",
        1.0, "of linear", 0.9, "above", "a worker pinned to each NUMA node over as many times one alone; published: the sum of four nodes (table 2)",
        across_nodes,
    ),
    Claim(
        "workers-in-a-node", "Workers on cores of their own do not slow each other down inside one node either",
        None, "of linear", 0.9, "above", "two workers, each pinned to half of the cores, over twice one alone; the paper has no such figure",
        within_a_node,
    ),
    Claim(
        "workers-or-threads", "Isolated workers beat one worker with all threads",
        None, "x", 1.0, "above",
        "the same 100 requests, shared out among pinned workers, over one worker on all cores; the paper has no such control",
        if_divided(rates(WORKERS, ALL_ROWS)),
    ),
    Claim(
        "four-workers", "Figure 1's four workers were measured: 670.32 tokens a second",
        None, "% away", 0.1, "above",
        "arithmetic: how far 670.32 is from 4 x 167.58, one worker's figure; the sum of table 2's workers, which were measured, is 0.7 % from "
        "four times the best of them; no distance at all means that the bar is extrapolated",
        product,
    ),
    Claim(
        "power", "CPUs take 48.9 % less power than a GPU",
        48.9, "% saved", 48.95, "below",
        "arithmetic on table 5: 1 - 613/1252; 48.96 % is what is left, not what is saved; the unit is joules for 1,000 tokens, not power; "
        "640 W and 410 W look like sums of design powers, and 511 tokens a second is little for that GPU; no meter was read",
        saving,
    ),
    Claim(
        "energy", "1,000 tokens cost 613 J on CPUs, 202 J for a billion parameters",
        202.0, "J", 202.0, "below",
        "joules of processor and memory (RAPL) for 1,000 generated tokens of the 100 requests, for a billion parameters",
        joules,
    ),
)  # fmt: skip

PAPER = Paper("cpu-inference", "Inference Acceleration for Large Language Models on CPUs", "arXiv:2406.07553", CLAIMS, settings, collect)
