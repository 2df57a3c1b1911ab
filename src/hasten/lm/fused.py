"""A step of a Llama-like model in one C++ call (`native/step.cpp`) on a CPU.

Eager Python spends more on some thousand calls a step than on the mathematics of a small model. The step works on the engine's own cache, so
steps that torch does better (long prompts, on processors without AVX-512) go through it, and the next goes on from what they stored. Which
parts a model has is read from its modules; that they were read rightly is not assumed but tried, on a few tokens, when the step is built.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hasten import hf, native
from hasten.lm.attention import Plan, Span
from hasten.lm.cache import RaggedCache, Shape
from hasten.native import build

BLOCK = 16  # gate and up projections alternate in blocks of so many outputs
ACTIVATIONS = {"silu": 0, "swish": 0, "gelu_pytorch_tanh": 1}
TOLERANCE = 0.02  # most that a logit may be off, in standard deviations of the logits, between torch and the step
TOLERANCE_WHOLE = 0.2  # of the mean square: what 8 bits round in one layer moves across a rounding's edge in the next


class Unfit(Exception):
    """Why a model has no fused step."""


@dataclass(frozen=True)
class Norm:
    weight: torch.Tensor
    eps: float


class FusedStep:
    """`takes(plan)` says whether it does a step; calling it does. bits: of the weights of layers, 32, 16, 8 or 4; head: of the output layer.

    rows: positions in a step at most where torch does prompts faster.
    """

    trees = False  # a position sees all that lies before it in its row

    def __init__(self, model: Any, *, bits: int = 32, head: int | None = None, rows: int = 64) -> None:
        self.rows, self.bits, self.head_bits, isa = rows, bits, head or bits, build.isa()
        self.prompts = isa in ("vnni", "amx") or (bits < 32 and isa == "avx2")  # whether torch is slower at long prompts as well
        self.rotary = model.model.rotary_emb
        self.head = model.lm_head.weight.shape[0]
        self._keep: list[Any] = []  # what the C++ side points to
        self._table = (torch.empty(0), torch.empty(0))
        self.handle = self._build(model, bits, self.head_bits)
        self._check(model, bits < 32)

    def takes(self, ids: torch.Tensor, plan: Any) -> bool:
        return isinstance(plan, Plan) and not plan.branches and (self.prompts or len(ids) <= self.rows)

    def __call__(self, ids: torch.Tensor, positions: torch.Tensor, outputs: torch.Tensor | None, plan: Plan) -> torch.Tensor:
        """ids, positions [N] -> logits [outputs, vocabulary]; new keys and values go to the plan's cache."""
        cache = plan.cache
        slots = torch.tensor([s.slot for s in plan.spans for _ in range(s.n)])
        which = torch.arange(len(ids)) if outputs is None else outputs
        cosines, sines = self._tables(cache.capacity)
        logits = torch.empty(len(which), self.head)
        build.library().hasten_step(
            self.handle, len(ids), ids.data_ptr(), slots.data_ptr(), positions.data_ptr(), len(which), which.data_ptr(), cosines.data_ptr(),
            sines.data_ptr(), cache.data.data_ptr(), cache.data.shape[2], cache.capacity, logits.data_ptr(),
        )  # fmt: skip
        return logits

    def _tables(self, positions: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines [positions, rotary / 2], made by the model's own module."""
        if self._table[0].shape[0] < positions:
            cos, sin = self.rotary(torch.zeros(1, 1, 1), torch.arange(positions)[None])
            half = cos.shape[-1] // 2
            self._table = (cos[0, :, :half].float().contiguous(), sin[0, :, :half].float().contiguous())
        return self._table

    # --- building -----------------------------------------------------------------------------------------------------------------

    def _build(self, model: Any, bits: int, head_bits: int) -> int:
        lib, config = build.library(), model.config.get_text_config(decoder=True)
        layers = [_layer(layer, bits) for layer in model.model.layers]
        seen = _watch(model)
        if len({s.shape for s in seen.values()}) != 1 or any(s.cap for s in seen.values()):
            raise Unfit("its layers differ in shape, or cap their scores")
        heads, kv_heads, dim = next(iter(seen.values())).shape
        activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", "")
        if activation not in ACTIVATIONS:
            raise Unfit(f"its activation {activation!r} is not one of {', '.join(ACTIVATIONS)}")
        norm, embedding = _norm(model.model.norm), model.get_input_embeddings().weight.detach()
        head = native.Linear(model.lm_head.weight, model.lm_head.bias, bits=head_bits)
        inner, rotary = layers[0].down.k, 2 * self._tables(1)[0].shape[1]
        isa, scaling = build.ISAS.index(build.isa()), next(iter(seen.values())).scale
        sizes = (ctypes.c_int * 8)(config.hidden_size, inner, heads, kv_heads, dim, rotary, ACTIVATIONS[activation], isa)
        scale = config.hidden_size**0.5 if config.model_type.startswith("gemma") else 1.0
        numbers = (ctypes.c_float * 3)(norm.eps, dim**-0.5 if scaling is None else scaling, scale)
        team = native.team(torch.get_num_threads())
        handle = int(lib.hasten_model(sizes, numbers, embedding.data_ptr(), norm.weight.data_ptr(), head.handle, team))
        weakref.finalize(self, lib.hasten_model_free, handle)
        self._keep += [layers, norm, embedding, head]
        for i, layer in enumerate(layers):
            norms = [w.data_ptr() if w is not None else None for w in layer.norms]
            matrices = (layer.qkv.handle, layer.o.handle, layer.gate_up.handle, layer.down.handle)
            lib.hasten_model_layer(handle, *matrices, *norms, seen[i].window or 0)
        return handle

    def _check(self, model: Any, whole: bool) -> None:
        """The step against torch on a few tokens in two chunks; Unfit if they disagree: then the model has something that was not read."""
        ids = torch.arange(7) * 31 % model.get_input_embeddings().weight.shape[0]
        mine, theirs = (_logits(f, ids, model) for f in (self, lambda *a: hf.torch_forward(model, *a)))
        apart, spread = mine - theirs, max(theirs.std().item(), 1e-6)
        off = (apart.square().mean().sqrt() if whole else apart.abs().max()).item() / spread
        if not off <= (TOLERANCE_WHOLE if whole else TOLERANCE):
            raise Unfit(f"it computes something that the fused step does not (logits {off:.2g} standard deviations off)")


@dataclass(frozen=True)
class _Seen:
    shape: tuple[int, int, int]
    scale: float | None
    window: int | None
    cap: float | None


class _Watcher:
    """Stands in for a plan and notes what each layer's attention is asked for."""

    def __init__(self) -> None:
        self.seen: dict[int, _Seen] = {}

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: Any, window: Any, cap: Any) -> torch.Tensor:
        self.seen[layer] = _Seen((q.shape[1], k.shape[1], k.shape[3]), scale, window, cap)
        return q.new_zeros(1, q.shape[2], q.shape[1], v.shape[3])


def _watch(model: Any) -> dict[int, _Seen]:
    watcher, one = _Watcher(), torch.zeros(1, dtype=torch.long)
    hf.torch_forward(model, one, one, None, watcher)
    return watcher.seen


def _logits(forward: Callable[..., torch.Tensor], ids: torch.Tensor, model: Any) -> torch.Tensor:
    """Logits of `ids`, computed as 4 tokens and then the rest."""
    facts = hf.facts(model)
    cache = RaggedCache(
        Shape(facts.layers, facts.kv_heads, facts.head_dim, torch.float32, torch.device("cpu")), budget=64, max_len=64, max_rows=1
    )
    entry = cache.allocate(ids.tolist(), len(ids))
    assert entry is not None
    parts = []
    for start, stop in ((0, 4), (4, len(ids))):
        plan = Plan(cache, [Span(entry.slot, start, stop - start, 0)])
        parts.append(forward(ids[start:stop], torch.arange(start, stop), None, plan))
        entry.tokens += ids[start:stop].tolist()
    return torch.cat(parts)


@dataclass(frozen=True)
class _Layer:
    qkv: native.Linear
    o: native.Linear
    gate_up: native.Linear
    down: native.Linear
    norms: Sequence[torch.Tensor | None]  # before attention, before the MLP, of queries, of keys


def _layer(layer: Any, bits: int) -> _Layer:
    try:
        attention, mlp = layer.self_attn, layer.mlp
        qkv = [attention.qkv_proj] if hasattr(attention, "qkv_proj") else [attention.q_proj, attention.k_proj, attention.v_proj]
        gate, up = mlp.gate_up_proj.weight.chunk(2) if hasattr(mlp, "gate_up_proj") else (mlp.gate_proj.weight, mlp.up_proj.weight)
        norms = [_norm(layer.input_layernorm).weight, _norm(layer.post_attention_layernorm).weight]
        norms += [_norm(getattr(attention, n)).weight if hasattr(attention, n) else None for n in ("q_norm", "k_norm")]
        if hasattr(layer, "pre_feedforward_layernorm") or any(m.bias is not None for m in (mlp.down_proj, attention.o_proj)):
            raise Unfit("its layers have more parts than Llama's")
        return _Layer(
            native.Linear(torch.cat([m.weight for m in qkv]), _biases(qkv), bits=bits),
            native.Linear(attention.o_proj.weight, bits=bits),
            native.Linear(_interleaved(gate, up), bits=bits),
            native.Linear(mlp.down_proj.weight, bits=bits),
            norms,
        )
    except AttributeError as e:
        raise Unfit(f"its layers are not built as Llama's ({e})") from None


def _biases(layers: Sequence[Any]) -> torch.Tensor | None:
    return None if layers[0].bias is None else torch.cat([m.bias for m in layers])


def _interleaved(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Rows of both by turns in blocks, so that one panel of the product holds a gate and what it gates."""
    if gate.shape[0] % BLOCK:
        raise Unfit(f"its MLP's width {gate.shape[0]} is not a multiple of {BLOCK}")
    return torch.stack([gate.detach().view(-1, BLOCK, gate.shape[1]), up.detach().view(-1, BLOCK, up.shape[1])], 1).flatten(0, 2)


def _norm(module: Any) -> Norm:
    """The weights an RMSNorm multiplies by, found by asking it: Gemma's are stored minus one."""
    eps = getattr(module, "variance_epsilon", None) or getattr(module, "eps", None)
    if eps is None or getattr(module, "bias", None) is not None:
        raise Unfit(f"{type(module).__name__} is not an RMSNorm")
    with torch.no_grad():
        one = torch.ones(1, module.weight.shape[0])
        return Norm((module(one)[0] * (1 + eps) ** 0.5).float().contiguous(), float(eps))


def attach(model: Any, rows: int = 64, bits: int = 32) -> Any:
    """A copy of the model (weights shared) whose small steps are fused. Raises Unfit with the reason where that cannot be."""
    if model.device.type != "cpu" or model.dtype != torch.float32:
        raise Unfit(
            f"the fused step computes in fp32 on a CPU, and this model is {str(model.dtype).removeprefix('torch.')} on {model.device.type}"
        )
    for part in ("model", "lm_head"):
        if not hasattr(model, part):
            raise Unfit(f"{type(model).__name__} is not built as Llama is")
    return hf.derived(
        model,
        ("native", rows, bits, torch.get_num_threads()),
        lambda: hf.stepped(hf.shared_copy(model), FusedStep(model, rows=rows, bits=bits)),
    )
