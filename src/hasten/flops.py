"""What a forward pass of a decoder must compute and move, counted from the module: exact, additive, O(1) per call.

Kaplan et al. (2020, arXiv 2001.08361, section 2.1) with nothing left out: a token costs 2 FLOPs per weight of every matrix
multiplication it goes through, plus 4 * heads * head_dim per layer for each position it attends to (Q K^T and the weighted sum of V),
plus the output head where logits are asked for. Bare 2N misleads on small models: at width 64 and 150 positions attention is 39 % more.
Only useful work counts: masked positions, padding, norms, activations and the rotary tables do not.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

_WINDOWED = ("sliding_attention", "chunked_attention", "hybrid_sliding", "reference_sliding_attention")
_WITHOUT_ATTENTION = ("linear_attention", "conv", "mamba", "mlp", "moe")


@dataclass(frozen=True, slots=True)
class Span:
    """The layers that see the last `window` positions (None: all): FLOPs and cache bytes per position, summed over them."""

    window: int | None
    flops: float
    bytes: float


@dataclass(frozen=True, slots=True)
class ModelCost:
    """Cost of one model's forward pass. FLOPs count a multiply and an add as two; bytes are those of the weights and cache as stored.

    weight_bytes: read once by every forward pass, whatever its number of rows (an untied input embedding is not: one row a token is).
    """

    linear_flops_per_token: float
    head_flops: float
    weight_bytes: int
    spans: tuple[Span, ...]

    @property
    def attention_flops_per_position(self) -> float:
        """FLOPs a token spends on each position it attends to, over all layers, before any window is full."""
        return sum(span.flops for span in self.spans)

    @property
    def kv_bytes_per_position(self) -> float:
        """Cache bytes of one position, over all layers."""
        return sum(span.bytes for span in self.spans)

    def flops(self, new_tokens: int, context: int = 0, outputs: int | None = None) -> float:
        """FLOPs of `new_tokens` tokens after `context` cached positions, with logits at `outputs` of them (None: all)."""
        total = self.linear_flops_per_token * new_tokens + self.head_flops * (new_tokens if outputs is None else outputs)
        for span in self.spans:
            total += span.flops * attended(new_tokens, context, span.window)
        return total

    def bytes(self, context: int, share_of_weights: float = 1.0) -> float:
        """Bytes one row of a forward pass must read: its share of the weights (1 / rows) and its cache of `context` positions."""
        total = self.weight_bytes * share_of_weights
        for span in self.spans:
            total += span.bytes * (context if span.window is None else min(context, span.window))
        return total


def attended(new_tokens: int, context: int, window: int | None = None) -> int:
    """Pairs (query, key) of causal attention: the sum over i = 1..new_tokens of min(context + i, window)."""
    growing = new_tokens if window is None else min(max(window - context, 0), new_tokens)
    return growing * context + growing * (growing + 1) // 2 + (new_tokens - growing) * (window or 0)


def model_cost(model: nn.Module) -> ModelCost:
    """Read the costs of a transformers decoder from its modules (any architecture) and the shapes of its attention from its config."""
    head = _head(model)
    within_head = set(head.modules()) if head is not None else set()
    body = sum(_matmul_flops(module, model) for module in model.modules() if module not in within_head)
    return ModelCost(
        linear_flops_per_token=float(body),
        head_flops=float(sum(_matmul_flops(module, model, tied=True) for module in within_head)),
        weight_bytes=_weight_bytes(model, head),
        spans=tuple(_spans(model)),
    )


def _head(model: Any) -> nn.Module | None:
    """The last projection, which only some positions need: the language-model head, or a reward model's."""
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return output if output is not None else getattr(model, "score", None)


def _matmul_flops(module: nn.Module, model: Any, tied: bool = False) -> float:
    """FLOPs per token of one module's own weights: all those of two or more dimensions are matrices that each token meets once.

    Modules that say `in_features` and `out_features` are believed, so that packed (quantised) weights count as what they stand for.
    Mixtures of experts stack their experts in the first dimension of three, and a token meets `num_experts_per_tok` of them.
    """
    from torch import nn

    if isinstance(module, nn.Embedding) and not tied:
        return 0.0
    shape = (getattr(module, "in_features", None), getattr(module, "out_features", None))
    if all(isinstance(n, int) for n in shape):
        return 2.0 * shape[0] * shape[1] * _expert_share(module, model)  # type: ignore[operator]
    weights = [weight for weight in module.parameters(recurse=False) if weight.dim() >= 2]
    return sum(2.0 * weight.numel() * (_stacked_share(weight, model) if weight.dim() == 3 else 1.0) for weight in weights)


def _experts(config: Any) -> tuple[int, int]:
    """(experts, experts a token meets), (0, 0) for a dense model."""
    count = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None) or getattr(config, "n_routed_experts", None)
    return int(count or 0), int(getattr(config, "num_experts_per_tok", None) or 0)


def _stacked_share(weight: torch.Tensor, model: Any) -> float:
    count, met = _experts(_config(model))
    return met / count if count and weight.shape[0] == count else 1.0


def _expert_share(module: nn.Module, model: Any) -> float:
    """Share of tokens that meet a Linear: experts kept as a ModuleList are `...experts.3.up_proj`, each met by a few tokens."""
    count, met = _experts(_config(model))
    if not count or not any(module is m for name, m in model.named_modules() if ".experts." in name):
        return 1.0
    return met / count


def _weight_bytes(model: nn.Module, head: nn.Module | None) -> int:
    """Bytes of all stored tensors but the embedding tables that are looked up only; a table tied to the head is read in full."""
    from torch import nn

    read_by_head = {t.data_ptr() for t in head.parameters()} if head is not None else set()
    looked_up = {t.data_ptr() for m in model.modules() if isinstance(m, nn.Embedding) for t in m.parameters()} - read_by_head
    tensors = {t.data_ptr(): t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers())}
    return sum(size for pointer, size in tensors.items() if pointer not in looked_up)


def _config(model: Any) -> Any:
    return model.config.get_text_config(decoder=True)


def _spans(model: Any) -> Iterator[Span]:
    """One span for each window length found among the layers."""
    config = _config(model)
    heads = int(config.num_attention_heads)
    head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    windows = layer_windows(config)
    for window in sorted(set(windows), key=lambda w: w or 0):
        layers = windows.count(window)
        yield Span(window, 4.0 * heads * head_dim * layers, 2.0 * kv_heads * head_dim * layers * model.dtype.itemsize)


def layer_windows(config: Any) -> list[int | None]:
    """The window of each attention layer (None: full), as transformers' caches read it; layers without attention are left out."""
    window = getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None)
    types = getattr(config, "layer_types", None)
    if types is None:
        types = ["sliding_attention" if window else "full_attention"] * config.num_hidden_layers
    return [int(window) if kind in _WINDOWED and window else None for kind in types if kind not in _WITHOUT_ATTENTION]
