"""Decode steps replayed as CUDA graphs: launching some thousand kernels costs the processor more than the GPU needs to run them.

One graph a pair of sizes (rows, keys), captured when it is first needed and replayed with inputs copied into the same place. A graph holds
the addresses of the cache's buffer, so it is captured anew when that has moved. Not measured yet: no GPU was at hand.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from weakref import WeakKeyDictionary

import torch

from hasten.lm import static
from hasten.lm.attention import Plan
from hasten.lm.cache import RaggedCache
from hasten.lm.static import Inputs, StaticPlan

Step = Callable[[torch.Tensor, torch.Tensor, StaticPlan], torch.Tensor]
Replay = Callable[[], torch.Tensor]


@dataclass
class Held:
    """Graphs of one cache as it lay at `address` with `shape`."""

    address: int
    shape: torch.Size
    graphs: dict[tuple[int, int], tuple[Inputs, Replay]]


class Graphs:
    """step: computes (ids, positions, plan) -> logits. capture: makes of a function without arguments one that replays what it did."""

    def __init__(self, step: Step, capture: Callable[[Replay], Replay] | None = None) -> None:
        self.step, self.capture = step, capture or Capture()
        self._held: WeakKeyDictionary[RaggedCache, Held] = WeakKeyDictionary()

    def __call__(self, ids: torch.Tensor, plan: Plan, rows: int, free: int) -> torch.Tensor:
        """ids [N], one new token a span; slots below `rows` take part, slot `free` belongs to nobody -> logits [N, vocabulary]."""
        keys = static.length(max(s.start for s in plan.spans) + 1, plan.cache.capacity)
        graphs = self._graphs(plan.cache)
        known = graphs.get((rows, keys))
        inputs = known[0] if known else Inputs(rows, ids.device)
        which = inputs.fill(ids, plan.spans, plan.cache.capacity, free)
        if known is None:
            known = graphs[rows, keys] = inputs, self.capture(partial(self._run, inputs, plan.cache, keys))
        return known[1]()[which].clone()  # the next replay writes over it

    def _run(self, inputs: Inputs, cache: RaggedCache, keys: int) -> torch.Tensor:
        return self.step(inputs.ids, inputs.positions, StaticPlan(cache, inputs, keys))

    def _graphs(self, cache: RaggedCache) -> dict[tuple[int, int], tuple[Inputs, Replay]]:
        held = self._held.get(cache)
        if held is None or (held.address, held.shape) != (cache.data.data_ptr(), cache.data.shape):
            held = self._held[cache] = Held(cache.data.data_ptr(), cache.data.shape, {})
        return held.graphs


class Capture:
    """Captures on a GPU; all graphs share one pool of memory, as one runs at a time."""

    def __init__(self) -> None:
        self.pool: object = None

    def __call__(self, run: Replay) -> Replay:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # compiles, tunes and allocates what must not happen while capturing
            for _ in range(2):
                run()
        torch.cuda.current_stream().wait_stream(side)
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            out = run()

        def replay() -> torch.Tensor:
            graph.replay()
            return out

        return replay
