"""Saving a trained model as an ordinary transformers checkpoint in 16 bits, with its tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from hasten.zoo import tokenizer
from hasten.zoo.model import THETA, Llama

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def config(model: Llama, **more: object) -> object:
    from transformers import LlamaConfig

    size = model.size
    return LlamaConfig(
        vocab_size=model.model.embed_tokens.num_embeddings,
        hidden_size=size.width,
        intermediate_size=size.inner,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        max_position_embeddings=len(model.cos),
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.BOS,
        eos_token_id=tokenizer.EOS,
        pad_token_id=tokenizer.PAD,
        **more,
    )


def policy(model: Llama, out: Path, record: dict, words: PreTrainedTokenizerFast | None = None, exit_layers: int = 0) -> Path:
    """Write a policy or a text model to `out` (config, float16 weights, tokenizer, generation config, training.json); returns it.

    words: its tokenizer, by default that of the arithmetic task. exit_layers: the config says so many if it is not 0.
    """
    from transformers import GenerationConfig, LlamaForCausalLM

    theirs = LlamaForCausalLM(config(model, **({"exit_layers": exit_layers} if exit_layers else {})))
    missing, unexpected = theirs.load_state_dict(model.state_dict(), strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    theirs.tie_weights()
    generation = {"bos_token_id": tokenizer.BOS, "eos_token_id": tokenizer.EOS, "pad_token_id": tokenizer.PAD}
    theirs.generation_config = GenerationConfig(**generation, max_new_tokens=128)
    return _write(theirs, out, record, words or tokenizer.build())


def reward(model: Llama, out: Path, record: dict) -> Path:
    """Write a reward model to `out`, as LlamaForTokenClassification with one label."""
    from transformers import LlamaForTokenClassification

    theirs = LlamaForTokenClassification(config(model, num_labels=1))
    theirs.config.step_token_ids = [tokenizer.STEP_END]  # where the engine reads a step's reward
    theirs.load_state_dict(model.state_dict())
    return _write(theirs, out, record, tokenizer.build())


def _write(theirs: torch.nn.Module, out: Path, record: dict, words: PreTrainedTokenizerFast) -> Path:
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.parent.mkdir(parents=True, exist_ok=True)
    theirs.to(torch.float16).save_pretrained(part)
    words.save_pretrained(part)
    for file in part.iterdir():
        file.chmod(0o644)  # safetensors writes its file for the owner alone
    (part / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    shutil.rmtree(out, ignore_errors=True)  # with its card, which told of other weights
    part.rename(out)
    return out
