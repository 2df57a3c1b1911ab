"""`hasten.load` on a user's own directory: chat template, recipes, sampling, and one clear sentence for whatever is wrong with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import hasten
from hasten.values import UserError

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} {% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}"
WORDS = ["<pad>", "<bos>", "<eos>", "<user>", "<assistant>", "<system>", *"abcdefghijklmnopqrstuvwxyz", *map(str, range(30))]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: Any) -> Path:
    """A user's instruct checkpoint: a tiny random Llama with its tokenizer and chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("user") / "model"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=128, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(path)
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path)
    return path


def test_text_ids_and_messages(directory: Path) -> None:
    lm = hasten.load(str(directory))
    s = hasten.Sampling(max_tokens=5, ignore_eos=True)
    text, ids = lm.generate(["a b 3", [6, 7, 35]], s)
    assert text.prompt_tokens == ids.prompt_tokens == (6, 7, 35)
    assert text.tokens == ids.tokens
    assert text.text == lm.tokenizer.decode(text.tokens, skip_special_tokens=True) != ""
    [chat] = lm.generate([{"role": "user", "content": "a b"}], s)
    assert [WORDS[t] for t in chat.prompt_tokens] == ["<user>", "a", "b", "<assistant>"]
    assert lm.templated
    assert lm.ask("a") == [{"role": "user", "content": "a"}]
    assert hasten.load(str(directory), template="off").ask("a") == "a"


def test_n_results_a_prompt_in_order(directory: Path) -> None:
    lm = hasten.load(str(directory))
    got = lm.generate(["a", "b"], hasten.Sampling(max_tokens=4, temperature=1.0, n=3, ignore_eos=True))
    assert [r.prompt_tokens for r in got] == [(6,)] * 3 + [(7,)] * 3


@pytest.mark.parametrize("techniques", ["+ngram(k=3,shortest=1)", "+prefix(share=false)", "+plain"])
def test_identical_techniques_give_the_same_tokens(directory: Path, techniques: str) -> None:
    prompts = ["a b a b a", "c d e", "1 2 3 4 1 2"]
    s = hasten.Sampling(max_tokens=12, temperature=0.9, seed=3, ignore_eos=True)
    plain = [r.tokens for r in hasten.load(str(directory)).generate(prompts, s)]
    assert [r.tokens for r in hasten.load(f"{directory} {techniques}").generate(prompts, s)] == plain


def test_recipes_with_a_strategy_and_a_constraint(directory: Path) -> None:
    lm = hasten.load(f'{directory} +ngram +allowed(text="1 2 3") +vote(n=5,temperature=1.0,extract=last-number)')
    [result] = lm.generate(["a b c d e f"], hasten.Sampling(max_tokens=4))
    assert {WORDS[t] for t in result.tokens} <= {"1", "2", "3", "<eos>"}
    assert result.trace["n"] == 5
    assert result.usage.by_role["target"].prompt == 30
    assert result.usage.by_role["target"].reused == 20  # four of five samples find all but the prompt's last token computed


def test_recipe_files(directory: Path, tmp_path: Path) -> None:
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps({"model": str(directory), "techniques": [{"name": "ngram", "options": {"k": 2}}]}))
    assert str(hasten.load(str(file)).recipe) == f"{directory} +ngram(k=2)"


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("/no/such/dir", "no such model"),
        ("nonsense", "no such model"),
        ("zoo:arith-q", "did you mean 'arith-"),
        ("{} +ngrm", "did you mean 'ngram'"),
        ("{} +ngram(kk=3)", "did you mean 'k'"),
        ("{} +ngram(k=-1)", "must not be negative"),
        ("{} +ngram +plain", "decode"),
        ("{} +allowed(tokens=[999])", "outside the vocabulary"),
        ("{} +allowed", "no token is allowed"),
        ("{} +best-of-n(n=2)", "reward"),
        ("{} +best-of-n(n=2,reward=/no/such/dir)", "no such model"),
        ("{} +vote(n=0)", "n=0"),
    ],
)
def test_what_cannot_be_loaded_is_said_in_a_sentence(directory: Path, source: str, words: str) -> None:
    with pytest.raises(UserError, match=words.replace("(", r"\(")) as error:
        hasten.load(source.format(directory))
    assert "\n" not in str(error.value)


def test_bad_files(directory: Path, tmp_path: Path) -> None:
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(directory, broken)
    (broken / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(UserError, match="weights cannot be loaded"):
        hasten.load(str(broken))
    (broken / "config.json").write_text("{")
    with pytest.raises(UserError, match="config cannot be loaded"):
        hasten.load(str(broken))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no config.json"):
        hasten.load(str(tmp_path / "empty"))
    with pytest.raises(UserError, match="unknown dtype 'flot32'; did you mean 'float32'"):
        hasten.load(str(directory), dtype="flot32")


@pytest.mark.parametrize("kind", ["t5", "mamba", "bert"])
def test_models_that_cannot_be_run_are_refused_with_the_reason(kind: str, tmp_path: Path) -> None:
    from transformers import BertConfig, BertForMaskedLM, MambaConfig, MambaForCausalLM, T5Config, T5ForConditionalGeneration

    made = {
        "t5": lambda: T5ForConditionalGeneration(T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)),
        "mamba": lambda: MambaForCausalLM(MambaConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, state_size=4)),
        "bert": lambda: BertForMaskedLM(
            BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
        ),
    }
    made[kind]().save_pretrained(tmp_path)
    reason = {"t5": "encoder-decoder", "mamba": "another state than keys and values|recurrent|cannot be replaced", "bert": "not a causal"}[
        kind
    ]
    with pytest.raises(UserError, match=reason):
        hasten.load(str(tmp_path))
