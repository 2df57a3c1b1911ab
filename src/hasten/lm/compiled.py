"""Steps of few positions through `torch.compile`: Python's cost of some thousand calls a step, and of operators that could be one, is gone.

What is compiled knows neither rows nor cache. Attention is one opaque operator a layer that asks the plan at hand (as vLLM compiles "around"
its attention), so positions enter packed, nothing is padded on a CPU, and a cache that moves or grows changes nothing. Two graphs serve all
steps: one position, and any number of them. On a CPU in fp32 linear layers are one opaque operator as well, over weights packed once.

On a GPU a step that only decodes is captured as a CUDA graph: rows padded to few sizes, keys cut to few lengths (`lm/static.py`, `lm/graphs.py`).
Whatever goes wrong in compiling costs one warning; the steps are then done as if nothing had been asked.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
import types
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from hasten import hf, native
from hasten.lm import inductor
from hasten.lm.attention import Plan, Span
from hasten.lm.cache import RaggedCache, Shape
from hasten.lm.graphs import Graphs
from hasten.lm.linear import PackedLinear, together
from hasten.lm.static import StaticPlan, bucket
from hasten.native import build

log = logging.getLogger(__name__)

MANY = 5  # positions for which the graph of "any number" is traced; any number above 1 will do
TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-2}  # of the logits' spread, between torch and what was compiled; others: 0.3


# --- operators that the compiler does not look into -----------------------------------------------------------------------------------


class _Now(threading.local):
    """What the opaque operators work on during a step of this thread."""

    plan: Any = None
    linears: Sequence[Callable[[torch.Tensor], torch.Tensor]] = ()


_now = _Now()
_count = itertools.count()
_library = torch.library.Library("hasten", "FRAGMENT")
_library.define("attend(Tensor q, Tensor k, Tensor v, int layer, float? scale, int? window, float? cap) -> Tensor")
_library.define("linear(Tensor x, int index, int outputs) -> Tensor")


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: int, scale: float | None, window: int | None, cap: float | None
) -> torch.Tensor:
    return _now.plan.attend(layer, q, k, v, scale, window, cap).contiguous()


def _attend_shape(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: int, scale: float | None, window: int | None, cap: float | None
) -> torch.Tensor:
    return q.new_empty((1, q.shape[2], q.shape[1], v.shape[3]))


def _linear(x: torch.Tensor, index: int, outputs: int) -> torch.Tensor:
    return _now.linears[index](x)


def _linear_shape(x: torch.Tensor, index: int, outputs: int) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], outputs))


_library.impl("attend", _attend, "CompositeExplicitAutograd")
_library.impl("linear", _linear, "CompositeExplicitAutograd")
torch.library.register_fake("hasten::attend", _attend_shape, lib=_library)
torch.library.register_fake("hasten::linear", _linear_shape, lib=_library)


class TracedPlan:
    """Stands in for the plan while the model is traced."""

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: Any, window: Any, cap: Any) -> torch.Tensor:
        """q [1, heads, N, dim], k and v [1, kv_heads, N, dim] -> [1, N, heads, dim]."""
        return torch.ops.hasten.attend(q, k, v, layer, scale, window, cap)


class OpaqueLinear(nn.Module):
    """Outputs first .. first + size of the packed product `index`, which has `outputs`; `merged` makes equal products one."""

    def __init__(self, index: int, outputs: int, first: int = 0, size: int | None = None) -> None:
        super().__init__()
        self.index, self.outputs, self.first, self.size = index, outputs, first, outputs if size is None else size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.ops.hasten.linear(x, self.index, self.outputs)
        return y if self.size == self.outputs else y[..., self.first : self.first + self.size]


def merged(graph: torch.fx.Graph) -> None:
    """Compute products of the same input once: queries, keys and values, say, which are joined."""
    seen: dict[Any, torch.fx.Node] = {}
    for node in list(graph.nodes):
        if node.op == "call_function" and str(node.target).startswith("hasten.linear"):
            first = seen.setdefault(node.args, node)
            if first is not node:
                node.replace_all_uses_with(first)
                graph.erase_node(node)


# --- the step -------------------------------------------------------------------------------------------------------------------------


class CompiledStep:
    """`takes(ids, plan)` says whether it does a step; calling it does.

    rows: positions in a step at most. backend: of `torch.compile`; "none": nothing is compiled (CUDA graphs alone). graphs: what replays steps
    that only decode; None where there is nothing to gain. seconds: spent on compiling, by the number of positions ("1", "any"). failed: why
    steps are done without it.
    """

    def __init__(self, model: Any, *, rows: int = 64, backend: str = "inductor", graphs: Callable[..., Graphs] | None = None) -> None:
        self.rows, self.backend, self.eager = rows, backend, model
        self.seconds: dict[str, float] = {}
        self.failed = ""
        self.model, self.linears = opened(model)
        self.facts = hf.facts(model)
        self.graphs = graphs(self._static) if graphs else None
        self._functions: dict[bool, Callable[..., torch.Tensor]] = {}

    def takes(self, ids: torch.Tensor, plan: Any) -> bool:
        return not self.failed and len(ids) <= self.rows and isinstance(plan, Plan)

    def __call__(self, ids: torch.Tensor, positions: torch.Tensor, outputs: torch.Tensor | None, plan: Plan) -> torch.Tensor:
        """ids, positions [N] -> logits [outputs, vocabulary]; new keys and values go to the plan's cache."""
        if outputs is None or len(outputs) == len(ids):
            try:
                return self._run(ids, positions, plan)
            except Exception as e:  # a compiler may fail in any way; the step is then done again, over what this one has written
                self._give_up(e)
        return hf.torch_forward(self.eager, ids, positions, outputs, plan)

    def _run(self, ids: torch.Tensor, positions: torch.Tensor, plan: Plan) -> torch.Tensor:
        rows = bucket(plan.spans, self.rows) if self.graphs else None
        free = plan.cache.padding(rows) if rows else None
        if self.graphs is None or rows is None or free is None:
            return self._with(plan, ids, positions)
        return self.graphs(ids, plan, rows, free)

    def _static(self, ids: torch.Tensor, positions: torch.Tensor, plan: StaticPlan) -> torch.Tensor:
        return self._with(plan, ids, positions)

    def _with(self, plan: Any, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        function = self._functions.get(len(ids) > 1) or self._compiled(len(ids) > 1)
        return self._call(function, plan, ids, positions)

    def _call(self, function: Callable[..., torch.Tensor], plan: Any, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        before = _now.plan, _now.linears
        _now.plan, _now.linears = plan, self.linears
        try:
            with torch.inference_mode():
                return function(ids, positions)
        finally:
            _now.plan, _now.linears = before

    def _give_up(self, error: Exception) -> None:
        self.failed = " ".join(str(error).split())[:300] or type(error).__name__
        self._functions.clear()
        self.graphs = None
        warnings.warn(f"compile: steps run without it ({self.failed})", RuntimeWarning, stacklevel=2)

    # --- compiling --------------------------------------------------------------------------------------------------------------------

    def _compiled(self, many: bool) -> Callable[..., torch.Tensor]:
        """The function for one position or for any number, tried on a cache of its own; what it took is in `seconds`."""
        began = time.perf_counter()
        if self.backend == "none":
            function = self._traced(many)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what a compiler advises its developers
                function = inductor.repaired(lambda: self._tried(many)) if self.backend == "inductor" else self._tried(many)
            name = "any" if many else "1"
            self.seconds[name] = time.perf_counter() - began
            log.info("compiled steps of %s position(s) in %.1f s", name, self.seconds[name])
        self._functions[many] = function
        return function

    def _traced(self, many: bool) -> Callable[..., torch.Tensor]:
        """The step as a function of its own code object, since a compiler counts and looks up what it made by code."""
        model, plan = self.model, TracedPlan()
        mask = torch.ones((1, 1, 1, 1), dtype=torch.bool, device=model.device)  # four-dimensional: taken as it is, so no mask is built

        def step(ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
            return model(input_ids=ids[None], position_ids=positions[None], attention_mask=mask, use_cache=False, hasten=plan).logits[0]

        code = step.__code__.replace(co_name=f"step_{next(_count)}")
        return types.FunctionType(code, step.__globals__, code.co_name, None, step.__closure__)

    def _tried(self, many: bool) -> Callable[..., torch.Tensor]:
        """Compiled, and compared with torch on a few tokens: a compiler that computes something else must not be believed."""
        function = torch.compile(self._traced(many), backend=self._backend, fullgraph=True)
        count = MANY if many else 1
        ids = torch.arange(2 * count, device=self.model.device) * 31 % self.eager.get_input_embeddings().weight.shape[0]
        theirs = self._logits(ids, count, lambda *a: hf.torch_forward(self.eager, a[0], a[1], None, a[2]))
        mine = self._logits(ids, count, lambda i, p, plan: self._call(function, plan, _any(i, many), _any(p, many)))
        off = (mine - theirs).abs().max().item() / max(theirs.float().std().item(), 1e-6)
        if not off <= TOLERANCE.get(mine.dtype, 0.3):
            raise RuntimeError(f"what was compiled computes something else (logits {off:.2g} standard deviations off)")
        return function

    def _backend(self, graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        merged(graph.graph)
        graph.recompile()
        return torch._dynamo.lookup_backend(self.backend)(graph, inputs)

    def _logits(self, ids: torch.Tensor, count: int, forward: Callable[..., torch.Tensor]) -> torch.Tensor:
        """Logits of `ids`, computed `count` at a time on a cache of their own."""
        f = self.facts
        parameter = next(self.eager.parameters())
        shape = Shape(f.layers, f.kv_heads, f.head_dim, parameter.dtype, parameter.device)
        cache = RaggedCache(shape, budget=64, max_len=64, max_rows=1)
        entry = cache.allocate(ids.tolist(), len(ids))
        assert entry is not None
        parts = []
        for start in range(0, len(ids), count):
            plan = Plan(cache, [Span(entry.slot, start, count, 0)])
            parts.append(forward(ids[start : start + count].clone(), torch.arange(start, start + count, device=ids.device), plan))
            entry.tokens += ids[start : start + count].tolist()
        return torch.cat(parts)


def _any(x: torch.Tensor, many: bool) -> torch.Tensor:
    """Tell the compiler that the length will change."""
    if many:
        torch._dynamo.mark_dynamic(x, 0)
    return x


# --- the model that is traced -----------------------------------------------------------------------------------------------------------


def opened(model: Any) -> tuple[Any, list[Callable[[torch.Tensor], torch.Tensor]]]:
    """(a copy that a compiler can trace, what its opaque linear layers call): weights are shared, packed ones are added where they pay."""
    twin = hf.shared_copy(model)
    for module in twin.modules():
        if isinstance(module, PackedLinear):
            module.__class__ = nn.Linear
    linears: list[Callable[[torch.Tensor], torch.Tensor]] = []
    made = {} if why_not_packed(model) else _packed(twin, linears)
    for module in list(twin.modules()):
        for name, child in list(module._modules.items()):
            run = getattr(child, "run", None)
            if id(child) in made:
                module._modules[name] = made[id(child)]
            elif isinstance(run, native.Linear):  # int8 layers
                linears.append(run)
                module._modules[name] = OpaqueLinear(len(linears) - 1, run.n)
    return twin, linears


def why_not_packed(model: Any) -> str | None:
    """Why linear layers are left to the compiler; None where our own kernel does them (fp32 on a CPU it is written for, memory to spare)."""
    if model.device.type != "cpu" or model.dtype != torch.float32:
        return "only fp32 on a CPU has kernels of our own"
    wanted = sum(m.weight.numel() * 4 for m in model.modules() if isinstance(m, nn.Linear))
    return "memory is short" if 4 * wanted > hf.spare_memory(model.device) else build.why_not()


def _packed(twin: Any, linears: list[Callable[[torch.Tensor], torch.Tensor]]) -> dict[int, OpaqueLinear]:
    """Opaque layers by the id of the layer they replace; those of the same input share one product."""
    made: dict[int, OpaqueLinear] = {}
    for group in together(twin):
        bias = None if group[0].bias is None else torch.cat([layer.bias.detach() for layer in group])
        joined = native.Linear(torch.cat([layer.weight.detach() for layer in group]), bias)
        first = 0
        for layer in group:
            made[id(layer)] = OpaqueLinear(len(linears), joined.n, first, layer.out_features)
            first += layer.out_features
        linears.append(joined)
    return made
