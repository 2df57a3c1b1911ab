"""Packed linear layers give the numbers of the plain ones, and are used where they should be."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from hasten.lm.linear import FEW, MANY, PackedLinear, pack

SIZES = {
    "vocab_size": 600,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}
needed = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")


@needed
@pytest.mark.parametrize("kind", [(LlamaForCausalLM, LlamaConfig), (Qwen2ForCausalLM, Qwen2Config)], ids=["llama", "qwen2 with biases"])
@pytest.mark.parametrize("rows", [1, FEW, 8, MANY, MANY + 1])
def test_same_numbers(kind: tuple, rows: int) -> None:
    torch.manual_seed(0)
    plain = kind[0](kind[1](**SIZES)).eval()
    for p in plain.parameters():
        torch.nn.init.normal_(p, 0, 0.1)
    packed = pack(copy.deepcopy(plain), 1 << 40)
    assert any(isinstance(m, PackedLinear) for m in packed.modules())
    ids = torch.randint(0, 600, (1, rows))
    with torch.inference_mode():
        for _ in range(2):
            torch.testing.assert_close(packed(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-4)
    assert packed.state_dict().keys() == plain.state_dict().keys()


@needed
def test_nothing_is_kept_after_a_pass_and_nothing_is_packed_where_memory_is_short() -> None:
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    assert not any(isinstance(m, PackedLinear) for m in pack(model, 1 << 20).modules())
    pack(model, 1 << 40)
    with torch.inference_mode():
        model(torch.randint(0, 600, (1, 8)))
    assert all(m.packed._input is None for m in model.modules() if isinstance(m, PackedLinear))


def test_doubles_and_small_layers_stay_as_they_are() -> None:
    assert not any(isinstance(m, PackedLinear) for m in pack(LlamaForCausalLM(LlamaConfig(**SIZES)).double(), 1 << 40).modules())
    assert type(pack(torch.nn.Sequential(torch.nn.Linear(8, 8)), 1 << 40)[0]) is torch.nn.Linear
