"""A user's checkpoint: a tiny random Llama in a directory, with a tokenizer of words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

WORDS = ["<pad>", "<bos>", "<eos>", *"abcdefghijklmnopqrstuvwxyz", *map(str, range(10))]


def save(path: Path, **changes: Any) -> Path:
    """Llama, 2 layers of width 32, fp32; `changes` go to its config (dtype: that of the weights)."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    dtype = changes.pop("dtype", torch.float32)
    model = LlamaForCausalLM(LlamaConfig(**{"vocab_size": len(WORDS), "max_position_embeddings": 128, **shape, **ids, **changes}))
    with torch.no_grad():  # spread, so that its greedy text is not one token repeated
        for p in model.parameters():
            if p.dim() > 1:
                p.normal_(0, 0.3)
    model.to(dtype).save_pretrained(path)
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>").save_pretrained(path)
    return path
