"""The trie in other engines: transformers' `generate`, and vLLM's interface (a stand-in for it, as vLLM is not installed where tests run)."""

from __future__ import annotations

import enum
import importlib
import random
import sys
import types
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import brute
import pytest
import torch
from transformers import LogitsProcessorList

from hasten.lm.constrain import trie as tries
from hasten.lm.constrain.processor import TrieLogitsProcessor
from hasten.values import UserError

END = 2


def some(seed: int) -> list[tuple[int, ...]]:
    rng = random.Random(seed)
    return list(dict.fromkeys(tuple(rng.randrange(3, 97 if rng.random() < 0.3 else 7) for _ in range(5)) for _ in range(60)))


def test_generate_with_beams_finds_what_brute_force_finds(pairs: Any) -> None:
    """transformers normalises scores by length unless told not to; all items have the same, so the order is that of the joint log-probability."""
    model, _ = pairs("llama")
    items, prompts = some(1), torch.tensor([[0, 5, 6], [7, 8, 9]])
    processor = TrieLogitsProcessor(tries.build(items, 97), prompts.shape[1], END)
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    out = model.generate(
        prompts, attention_mask=mask, num_beams=4, num_return_sequences=4, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0,
        logits_processor=LogitsProcessorList([processor]),
    )  # fmt: skip
    for row, prompt in enumerate(([5, 6], [7, 8, 9])):

        def logp(some: list[tuple[int, ...]], prompt: list[int] = prompt) -> torch.Tensor:
            return torch.stack([torch.log_softmax(model(torch.tensor([[*prompt, *p]])).logits[0, -1], -1) for p in some])

        assert [tuple(o) for o in out[4 * row : 4 * row + 4, 3:].tolist()] == [i for i, _ in brute.beams(items, logp, 4)]


def test_sampling_gives_items_and_then_the_end(pairs: Any) -> None:
    model, _ = pairs("gpt2")
    items = some(2)
    torch.manual_seed(0)
    processors = LogitsProcessorList([TrieLogitsProcessor(tries.build(items, 97), 3, [END])])
    ids = torch.tensor([[5, 6, 7]] * 6)
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=True, max_new_tokens=9, logits_processor=processors, pad_token_id=0
    )
    assert all(tuple(row[:5]) in items and row[5] == END for row in out[:, 3:].tolist())
    with pytest.raises(UserError, match="are no tokens"):
        TrieLogitsProcessor(tries.build(items, 97), 3, 97)


class Moves(enum.Enum):
    UNIDIRECTIONAL = enum.auto()
    SWAP = enum.auto()


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Any:
    for name in ("vllm", "vllm.v1", "vllm.v1.sample", "vllm.v1.sample.logits_processor"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["vllm.v1.sample.logits_processor"].LogitsProcessor = object  # type: ignore[attr-defined]
    yield importlib.import_module("hasten.lm.constrain.vllm_plugin")
    sys.modules.pop("hasten.lm.constrain.vllm_plugin")


def test_vllm_rows_come_go_and_move(plugin: Any, tmp_path: Path) -> None:
    sets = {"a": some(3), "b": some(4)}
    for name, items in sets.items():
        tries.build(items, 97).save(tmp_path / name)
    config = SimpleNamespace(
        model_config=SimpleNamespace(get_vocab_size=lambda: 97, hf_config=SimpleNamespace(eos_token_id=END)),
        additional_config={"hasten_tries": {name: str(tmp_path / name) for name in sets}},
    )
    processor = plugin.TrieProcessor(config, torch.device("cpu"), False)
    assert processor.is_argmax_invariant() is False
    asked: dict[int, tuple[str | None, list[int]]] = {0: ("a", []), 1: (None, []), 2: ("b", []), 3: ("a", [])}  # row -> set, tokens so far
    follow = {name: brute.prefixes(items) for name, items in sets.items()}

    def params(name: str | None) -> Any:
        return SimpleNamespace(extra_args=None if name is None else {"trie": name})

    def update(removed: Any = (), added: Any = (), moved: Any = ()) -> None:
        processor.update_state(SimpleNamespace(batch_size=len(asked), removed=removed, added=added, moved=moved))

    update(added=[(row, params(name), [1], tokens) for row, (name, tokens) in asked.items()])
    rng = random.Random(0)
    for turn in range(7):
        logits = processor.apply(torch.zeros(len(asked), 97))
        for row, (name, tokens) in asked.items():
            open_ = set((logits[row] == 0).nonzero()[:, 0].tolist())
            wanted = set(range(97)) if name is None else follow[name].get(tuple(tokens), {END})
            assert open_ == wanted
            tokens.append(rng.choice(sorted(open_)))
        if turn == 1:
            asked[0], asked[3] = asked[3], asked[0]
            update(moved=[(0, 3, Moves.SWAP)])
        if turn == 2:
            asked[1] = asked.pop(3)
            update(removed=[1], moved=[(3, 1, Moves.UNIDIRECTIONAL)])
        else:
            processor.update_state(None)
    with pytest.raises(ValueError, match="no item set 'c'; there are: a, b"):
        update(added=[(0, params("c"), [1], [])])
    with pytest.raises(ValueError, match="is not the name"):
        plugin.TrieProcessor.validate_params(params(3))  # type: ignore[arg-type]
