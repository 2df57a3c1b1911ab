"""The only file that touches transformers' moving names: loading, what a model is, one forward pass, and why a model cannot be run.

A forward pass gets all rows' tokens as one packed sequence; attention is replaced through transformers' attention interface, so any
architecture that uses it runs unchanged. What a model's attention needs (heads, windows, caps) is found by watching one pass.
"""

from __future__ import annotations

import copy
import logging
import os
import warnings
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hasten.values import UserError

if TYPE_CHECKING:
    import torch

    from hasten.lm.attention import Plan

ATTENTION = "hasten"
_REWARD = ("TokenClassification", "RewardModel")


@dataclass(frozen=True)
class Facts:
    """What the engine must know of a model."""

    layers: int
    kv_heads: int
    head_dim: int
    max_len: int
    vocabulary: int  # ids of the output layer, padding included; 1 for a reward model
    end_ids: tuple[int, ...]
    reward: bool
    step_ids: tuple[int, ...]


def resolve(source: str) -> str:
    """A directory, `zoo:NAME`, or a hub id in the local cache; UserError when there is no such model."""
    if source.startswith("zoo:"):
        from hasten import zoo

        return str(zoo.path(source.removeprefix("zoo:")))
    path = Path(source).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"{source}: this directory holds no config.json, so it is no Hugging Face model")
        return str(path)
    if path.exists() or source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise UserError(f"no such model: {source!r} is neither a directory, nor zoo:NAME, nor a hub id of the form owner/name")
    return source


def quiet() -> None:
    """transformers' progress bars and advice do not belong in another program's output."""
    from transformers.utils import logging as hf_logging

    hf_logging.disable_progress_bar()
    hf_logging.set_verbosity_error()
    logging.getLogger("transformers").setLevel(logging.ERROR)


def load_tokenizer(source: str) -> Any:
    """The tokenizer beside a model, or None when it has none."""
    from transformers import AutoTokenizer

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, TypeError, KeyError):
        return None


def load_model(source: str, *, device: str = "auto", dtype: str = "auto") -> torch.nn.Module:
    """A causal language model or a reward model, ready for `forward`. source: as `resolve` gives it.

    dtype "auto": on a GPU the checkpoint's; on a CPU fp32, but the checkpoint's bf16 where the processor computes in it (AMX, AVX512-BF16).
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

    config = _config(source)
    why = why_not(config)
    if why:
        raise UserError(f"{source}: {why}")
    device = best_device() if device == "auto" else device
    kind = AutoModelForTokenClassification if is_reward(config) else AutoModelForCausalLM
    chosen = best_dtype(config, device) if dtype == "auto" else named_dtype(dtype)
    model = _reading(source, "weights", lambda: kind.from_pretrained(source, dtype=chosen, trust_remote_code=False))
    try:
        return prepare(model.to(torch.device(device)))
    except (RuntimeError, AssertionError) as e:
        raise UserError(f"{source}: device {device!r} cannot be used ({_one_line(e)})") from None


def dtype_name(source: str, device: str = "auto", dtype: str = "auto") -> str:
    """torch's name of the type that `load_model` takes the weights of this source in."""
    device = best_device() if device == "auto" else device
    chosen = best_dtype(_config(source), device) if dtype == "auto" else named_dtype(dtype)
    return str(chosen).removeprefix("torch.")


def _config(source: str) -> Any:
    from transformers import AutoConfig

    quiet()
    return _reading(source, "config", lambda: AutoConfig.from_pretrained(source, trust_remote_code=False))


def nbytes(model: Any) -> int:
    """Bytes of a model's weights."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


def prepare(model: Any) -> Any:
    """Make a transformers model ours: evaluation mode, our attention. The model must not be used for anything else afterwards."""
    from transformers import AttentionInterface, AttentionMaskInterface

    from hasten.lm.attention import attention
    from hasten.lm.linear import pack
    from hasten.lm.norms import fuse

    why = why_not(model.config)
    if why:
        raise UserError(f"{type(model).__name__}: {why}")
    AttentionInterface.register(ATTENTION, attention)
    AttentionMaskInterface.register(ATTENTION, lambda *args, **kwargs: None)
    try:
        model.set_attn_implementation(ATTENTION)
    except (ValueError, AttributeError, KeyError) as e:
        raise UserError(f"{type(model).__name__}: its attention cannot be replaced ({_one_line(e)})") from None
    return pack(fuse(model.eval().requires_grad_(False)), spare_memory(model.device))


def own(model: Any) -> None:
    """Copy weights that are the checkpoint's file, mapped: the file's pages lie on the node that read it first, in whatever process."""
    for p in model.parameters():
        p.data = p.data.clone()


def shared_copy(model: Any) -> Any:
    """A second module tree over the same weights, so that a transform can change one and leave the other alone."""
    twin = copy.copy(model)
    for name in ("_derived", "small_step"):  # they were made of the first one
        twin.__dict__.pop(name, None)
    twin.__dict__["_modules"] = {name: None if m is None else shared_copy(m) for name, m in model._modules.items()}
    return twin


def cut(model: Any, layers: int) -> Any:
    """The model's first `layers` layers under its own last norm and head, weights shared: what it would say if it ended there.

    It works on the whole model's cache, whose first layers it fills. UserError where a model cannot be cut.
    """
    return derived(model, ("cut", layers), lambda: _cut(model, layers))


def _cut(model: Any, layers: int) -> Any:
    text = model.config.get_text_config(decoder=True)
    n = text.num_hidden_layers
    if not 1 <= layers < n:
        raise UserError(f"{type(model).__name__}: it has {n} layers, so an exit is after layer 1 to {n - 1}, not {layers}")
    where, name = _stack(model, n)
    short = shared_copy(model)
    short.config = copy.deepcopy(model.config)
    text = short.config.get_text_config(decoder=True)
    kinds = getattr(text, "layer_types", None)
    text.num_hidden_layers = layers
    if kinds:
        text.layer_types = list(kinds[:layers])
    for module in short.modules():  # those that read the number of layers, on the way to them
        if type(getattr(module, "config", None)) is type(text) and module is not short:
            module.config = text
    holder = short.get_submodule(where)
    holder._modules[name] = holder._modules[name][:layers]
    facts(short)  # reads one pass: exactly these layers must attend
    return short


def _stack(model: Any, count: int) -> tuple[str, str]:
    """Where the decoder's layers stand, in order, one for each layer of the cache: (path of the module that holds their list, its name there)."""
    found = [
        (path, name)
        for path, module in model.named_modules()
        for name, child in module.named_children()
        if type(child).__name__ == "ModuleList" and len(child) == count and all(_layer_of(m) == i for i, m in enumerate(child))
    ]
    if len(found) != 1:
        raise UserError(f"{type(model).__name__}: its layers do not stand in one list, so it cannot be cut")
    return found[0]


def _layer_of(module: Any) -> int | None:
    """The layer of the cache that the attention inside a module has."""
    return next((m.layer_idx for m in module.modules() if getattr(m, "layer_idx", None) is not None), None)


def stepped(model: Any, step: Any) -> Any:
    """The model with `step` doing those steps that it takes (see `forward`)."""
    object.__setattr__(model, "small_step", step)
    return model


def derived(model: Any, key: Hashable, make: Callable[[], Any]) -> Any:
    """What a transform made of this model before, or makes now: recipes that share a model share what was made of it."""
    kept = model.__dict__.setdefault("_derived", {})
    if key not in kept:
        kept[key] = make()
    return kept[key]


def why_not(config: Any) -> str | None:
    """Why a model of this config cannot be run by the token engine; None if it can, as far as its config tells."""
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    if getattr(config, "is_encoder_decoder", False):
        return "an encoder-decoder model: the token engine runs decoder-only models"
    kinds = set(getattr(text, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        return f"it has layers of type {', '.join(sorted(kinds))}: recurrent or hybrid state cannot be rewound row by row"
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    if isinstance(rope, dict) and rope.get("rope_type", rope.get("type")) == "dynamic":
        return "dynamic NTK rotary scaling makes a row's numbers depend on the rows beside it"
    names = list(getattr(config, "architectures", None) or ())
    if names and not any("CausalLM" in n or "LMHead" in n or any(r in n for r in _REWARD) for n in names):
        return f"{names[0]} is not a causal language model"
    return None


def is_reward(config: Any) -> bool:
    return any(any(r in n for r in _REWARD) for n in getattr(config, "architectures", None) or ())


def best_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def best_dtype(config: Any, device: str) -> torch.dtype:
    """The fastest type that loses nothing the checkpoint has: bf16 only where the hardware computes in it."""
    import torch

    stored = getattr(config, "dtype", None) or torch.float32
    if device.startswith("cuda"):
        return stored
    native = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if stored == torch.bfloat16 and native else torch.float32


def spare_memory(device: torch.device | str) -> int:
    """Bytes that are free now on a device."""
    import torch

    if torch.device(device).type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def named_dtype(name: str) -> torch.dtype:
    import torch

    names = {"float32": torch.float32, "fp32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "bf16": torch.bfloat16}
    names |= {"float16": torch.float16, "fp16": torch.float16}
    if name not in names:
        from hasten.values import did_you_mean

        raise UserError(f"unknown dtype {name!r}{did_you_mean(name, ['auto', *names])}")
    return names[name]


def facts(model: Any) -> Facts:
    """Read a prepared model: one pass over one token shows every attention layer's shape."""
    import torch

    seen: dict[int, tuple[int, int]] = {}
    probe = _Probe(seen)
    forward(
        model, torch.zeros(1, dtype=torch.long, device=model.device), torch.zeros(1, dtype=torch.long, device=model.device), None, probe
    )
    config = model.config.get_text_config(decoder=True)
    layers = int(config.num_hidden_layers)
    if sorted(seen) != list(range(layers)):
        what = "keep another state than keys and values, or do not use transformers' attention interface"
        raise UserError(f"{type(model).__name__}: {layers - len(seen)} of its {layers} layers {what}")
    if len(set(seen.values())) != 1:
        raise UserError(f"{type(model).__name__}: its layers store keys of different shapes, which the cache does not hold")
    kv_heads, head_dim = seen[0]
    reward = is_reward(model.config) or (not hasattr(model, "lm_head") and model.get_output_embeddings() is None)
    head = model.get_output_embeddings()
    return Facts(
        layers, kv_heads, head_dim, max_length(config), 1 if reward else int(head.weight.shape[0]), _end_ids(model), reward,
        tuple(getattr(model.config, "step_token_ids", None) or ()),
    )  # fmt: skip


class _Probe:
    """Stands in for a plan and notes the shape of each layer's keys."""

    def __init__(self, seen: dict[int, tuple[int, int]]) -> None:
        self.seen = seen

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: Any, window: Any, cap: Any) -> torch.Tensor:
        self.seen[layer] = (k.shape[1], k.shape[3])
        if v.shape != k.shape:
            raise UserError("keys and values of different shapes (latent attention) are not held by the cache")
        return q.new_zeros(1, q.shape[2], q.shape[1], v.shape[3])


def max_length(config: Any) -> int:
    """Positions the model was made for; longrope models switch factors beyond their original length, which would tie rows together."""
    rope = getattr(config, "rope_parameters", None) or {}
    original = rope.get("original_max_position_embeddings") if isinstance(rope, dict) and rope.get("rope_type") == "longrope" else None
    return int(original or getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or 1 << 20)


def forward(model: Any, ids: torch.Tensor, positions: torch.Tensor, outputs: torch.Tensor | None, plan: Plan | Any) -> torch.Tensor:
    """ids, positions [N]; outputs: indices of positions whose output is needed (None: all) -> logits [outputs, vocabulary], or rewards [N, 1]."""
    small = getattr(model, "small_step", None)
    if small is not None and small.takes(ids, plan):
        return small(ids, positions, outputs, plan)
    return torch_forward(model, ids, positions, outputs, plan)


def torch_forward(model: Any, ids: torch.Tensor, positions: torch.Tensor, outputs: torch.Tensor | None, plan: Plan | Any) -> torch.Tensor:
    """`forward` through the model's own modules."""
    import torch

    mask = torch.ones((1, 1, 1, 1), dtype=torch.bool, device=ids.device)  # four-dimensional: taken as it is, so no mask is built
    keep = {} if outputs is None or "logits_to_keep" not in _parameters(type(model)) else {"logits_to_keep": outputs}
    with torch.inference_mode():
        out = model(input_ids=ids[None], position_ids=positions[None], attention_mask=mask, use_cache=False, hasten=plan, **keep).logits[0]
        return out if keep or outputs is None else out[outputs]


_KNOWN: dict[type, frozenset[str]] = {}


def _parameters(kind: type) -> frozenset[str]:
    if kind not in _KNOWN:
        import inspect

        _KNOWN[kind] = frozenset(inspect.signature(kind.forward).parameters)  # type: ignore[attr-defined]
    return _KNOWN[kind]


def _end_ids(model: Any) -> tuple[int, ...]:
    for owner in (getattr(model, "generation_config", None), model.config):
        ids = getattr(owner, "eos_token_id", None)
        if ids is not None:
            return (ids,) if isinstance(ids, int) else tuple(ids)
    return ()


def _reading(source: str, what: str, read: Any) -> Any:
    """Run a loader; whatever is wrong with the files becomes one sentence."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return read()
    except MemoryError:
        raise UserError(f"{source}: its {what} do not fit the memory that is free") from None
    except Exception as e:  # a file of the user's may be wrong in any way, and each library has its own error for it
        hint = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") == "1" and not Path(source).is_dir() else ""
        raise UserError(f"{source}: its {what} cannot be loaded{hint}: {_one_line(e)}") from e


def _one_line(e: BaseException) -> str:
    text = " ".join(str(e).split())
    return text[:300] or type(e).__name__
