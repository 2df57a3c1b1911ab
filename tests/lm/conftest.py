"""Tiny random models of every supported family, and the naive loop they are compared with."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)  # fmt: skip

COMMON = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
CONFIGS: dict[str, Any] = {
    "llama": lambda: LlamaConfig(**COMMON),
    "qwen2": lambda: Qwen2Config(**COMMON, use_sliding_window=True, sliding_window=12, max_window_layers=1),
    "qwen3": lambda: Qwen3Config(**COMMON, head_dim=16),
    "mistral": lambda: MistralConfig(**COMMON, sliding_window=9),
    "phi3": lambda: Phi3Config(**COMMON),
    "gpt_neox": lambda: GPTNeoXConfig(**{k: v for k, v in COMMON.items() if k != "num_key_value_heads"}),
    "gemma": lambda: GemmaConfig(**COMMON, head_dim=16),
    "gpt2": lambda: GPT2Config(
        vocab_size=97, n_embd=32, n_layer=3, n_head=4, n_positions=256, bos_token_id=1, eos_token_id=2, pad_token_id=0
    ),
}


def make(family: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> Any:
    """A random model whose logits are spread enough that its greedy text is not one token repeated."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[family]()).to(dtype).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.normal_(0, 0.3)
    return model.requires_grad_(False)


def reference(model: Any, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
    """transformers' own greedy `generate`, one prompt at a time: generated ids, the end token included."""
    return [_one(model, tuple(prompt), max_tokens) for prompt in prompts]


@functools.cache
def _one(model: Any, prompt: tuple[int, ...], max_tokens: int) -> list[int]:
    """Kept, as many tests ask for the same: `generate` takes most of their time."""
    ids = torch.tensor([prompt])
    full = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False)
    return full[0, len(prompt) :].tolist()


@pytest.fixture(scope="session")
def pairs() -> Any:
    """family, dtype -> (reference model, the same weights prepared for the engine), made once."""
    from hasten import hf

    made: dict[Any, Any] = {}

    def get(family: str, dtype: torch.dtype = torch.float64) -> Any:
        if (family, dtype) not in made:
            model = make(family, dtype)
            made[family, dtype] = (model, hf.prepare(copy.deepcopy(model)))
        return made[family, dtype]

    return get
