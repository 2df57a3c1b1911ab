"""The analytic count against torch's FlopCounterMode on eager attention, which multiplies the whole (new x stored) rectangle."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from hasten.flops import ModelCost, Span, attended, model_cost

SMALL = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4}
GQA = SMALL | {"num_key_value_heads": 2, "pad_token_id": 0}
ARCHITECTURES = {
    "llama": GQA | {"tie_word_embeddings": True},
    "qwen2": GQA,
    "qwen3": GQA | {"head_dim": 32},
    "mistral": GQA | {"sliding_window": 16},
    "phi3": GQA,
    "gpt_neox": SMALL,
    "gemma": GQA | {"head_dim": 24},
    "gemma2": GQA | {"head_dim": 16, "sliding_window": 16, "num_hidden_layers": 4},
    "gpt2": {"vocab_size": 512, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 256},
    "mixtral": GQA | {"num_local_experts": 4, "num_experts_per_tok": 2},
}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model(request: pytest.FixtureRequest) -> torch.nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model(request.param, **ARCHITECTURES[request.param])
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager", experts_implementation="eager").eval()


def forward_flops(model: torch.nn.Module, cache: DynamicCache, tokens: int, outputs: int = 0) -> int:
    """FLOPs of one forward pass as torch counts them; outputs 0 means logits at every position."""
    ids = torch.randint(3, 500, (1, tokens))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(ids, past_key_values=cache, use_cache=True, logits_to_keep=outputs)
    return counter.get_total_flops()


def test_decode_steps_agree_at_every_context(model: torch.nn.Module) -> None:
    cost, cache = model_cost(model), DynamicCache(config=model.config)
    forward_flops(model, cache, 8)
    for context in range(8, 40):
        assert cost.flops(1, context, 1) == pytest.approx(forward_flops(model, cache, 1), rel=0.01)


def test_prefill_agrees_once_the_masked_half_of_the_rectangle_is_added(model: torch.nn.Module) -> None:
    cost, tokens = model_cost(model), 15
    masked = tokens * tokens - attended(tokens, 0)
    useful = forward_flops(model, DynamicCache(config=model.config), tokens) - cost.attention_flops_per_position * masked
    assert cost.flops(tokens, 0, tokens) == pytest.approx(useful, rel=0.01)


def test_logits_are_charged_only_where_asked(model: torch.nn.Module) -> None:
    cost = model_cost(model)
    every, last = (forward_flops(model, DynamicCache(config=model.config), 12, outputs) for outputs in (0, 1))
    assert cost.flops(12, 0, 12) - cost.flops(12, 0, 1) == every - last == 11 * cost.head_flops


def test_cost_is_additive_over_chunks(model: torch.nn.Module) -> None:
    cost = model_cost(model)
    chunks = sum(cost.flops(n, start, 0) for n, start in ((7, 0), (1, 7), (20, 8), (2, 28)))
    assert chunks + cost.head_flops == pytest.approx(cost.flops(30, 0, 1), rel=1e-12)


def test_bytes_are_those_of_weights_and_cache(model: torch.nn.Module) -> None:
    cost, cache = model_cost(model), DynamicCache(config=model.config)
    forward_flops(model, cache, 10)
    stored = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert cost.bytes(10, 0.0) == stored
    weights = sum(p.nbytes for p in model.parameters())
    looked_up = 0 if model.config.tie_word_embeddings else model.get_input_embeddings().weight.nbytes
    positions = model.transformer.wpe.weight.nbytes if model.config.model_type == "gpt2" else 0
    buffers = sum(b.nbytes for b in model.buffers())
    assert cost.weight_bytes == weights - looked_up - positions + buffers
    assert cost.bytes(10, 0.25) == pytest.approx(stored + cost.weight_bytes / 4)


def test_a_reward_head_is_the_head() -> None:
    from transformers import LlamaConfig, LlamaForTokenClassification

    cost = model_cost(LlamaForTokenClassification(LlamaConfig(**GQA, num_labels=1)))
    assert cost.head_flops == 2 * SMALL["hidden_size"]


@pytest.mark.parametrize("window", [None, 1, 5, 12])
@pytest.mark.parametrize("context", [0, 3, 5, 40])
def test_attended_is_the_sum_it_says(context: int, window: int | None) -> None:
    for new in range(12):
        assert attended(new, context, window) == sum(min(context + i, window or 10**9) for i in range(1, new + 1))


def test_the_2n_rule_misses_attention_on_a_small_model() -> None:
    width, layers, context = 64, 4, 150  # Kaplan's ratio: context / (6 width)
    cost = ModelCost(24.0 * layers * width**2, 0.0, 0, (Span(None, 4.0 * width * layers, 0.0),))
    assert cost.flops(1, context - 1, 0) / cost.linear_flops_per_token == pytest.approx(1 + context / (6 * width))
