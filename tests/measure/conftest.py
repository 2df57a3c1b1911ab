"""A run's setting over fake models, and a tiny random model with a chat template in a directory, as a user's would be."""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_models import fake_load, make_task

from hasten.measure import trial
from hasten.measure.store import Store
from hasten.measure.trial import Setting


@pytest.fixture
def setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Setting:
    monkeypatch.setattr(trial, "weights", lambda recipe: ())  # there are none
    return Setting(make_task(), fake_load, Store(tmp_path), {"cpu": "none"}, 1, "stamp")  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers with a word-level tokenizer that has a chat template."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    directory = tmp_path_factory.mktemp("model")
    words = ["<unk>", "<s>", "</s>", "user", "assistant", *"abcdefghijklmnopqrstuvwxyz", *map(str, range(10)), "####", "say"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    fast.chat_template = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}assistant"
    fast.save_pretrained(directory)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=256, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory
