"""PEARL: the state machine by itself, the window, the same tokens as plain decoding, the target's law, and a draft in a process of its own."""

from __future__ import annotations

import copy
import json
from collections import deque
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from conftest import CONFIGS, make, reference
from test_engine import MAX, answers, prompts

from hasten import hf
from hasten.lm.decode.drafter import Rows
from hasten.lm.decode.pearl import Options, Pearl
from hasten.lm.engine import TokenEngine


class Here:
    """A drafter in this process, asked as one in another process is."""

    def __init__(self, rows: Rows) -> None:
        self.rows, self.said = rows, deque[str]()
        self.messages: list[dict[str, Any]] = []

    def send(self, message: Mapping[str, Any]) -> None:
        self.messages.append(json.loads(json.dumps(message)))
        self.said.append(json.dumps(self.rows.answer(self.messages[-1])))

    def receive(self) -> dict[str, Any]:
        return json.loads(self.said.popleft())

    def close(self) -> None:
        self.said.clear()


@pytest.fixture(scope="module")
def drafts(pairs: Any) -> Any:
    """A draft of each kind for a target: itself, a stranger, and itself with noise (which agrees about half of the time)."""
    made: dict[Any, Any] = {}

    def get(family: str, kind: str) -> Any:
        if (family, kind) not in made:
            model = copy.deepcopy(pairs(family)[0]) if kind != "stranger" else make("llama", seed=9)
            if kind == "near":
                torch.manual_seed(1)
                for p in model.parameters():
                    p.data += 0.08 * p.data.std() * torch.randn_like(p)
            made[family, kind] = hf.prepare(model)
        return made[family, kind]

    return get


def pearl(model: Any, ends: tuple[int, ...] = (2,), **options: Any) -> Pearl:
    chosen = Options(model="x", **{"window": 4, **options})
    return Pearl(chosen, lambda rows: Here(Rows(model, 97, chosen.mode, rows, ends)))


# --- the same tokens ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["itself", "stranger", "near"])
@pytest.mark.parametrize("family", CONFIGS)
def test_greedy_is_identical(pairs: Any, drafts: Any, family: str, kind: str) -> None:
    model, ours = pairs(family)
    asked = prompts(1)
    technique = pearl(drafts(family, kind))
    engine = TokenEngine(ours, decode=technique, max_rows=4, step_tokens=30)
    assert answers(engine, asked) == reference(model, asked, MAX)
    drafter: Any = technique.drafter
    assert not drafter.rows.rows and drafter.rows.draft.cache.active == 0
    if kind == "itself":
        assert technique.refused == 0 and engine.steps < MAX + 4


@pytest.mark.parametrize("window", [0, 1, 3, 7])
@pytest.mark.parametrize("mode", ["coupled", "rejection"])
def test_samples_depend_on_neither_window_nor_batch_nor_room(pairs: Any, drafts: Any, window: int, mode: str) -> None:
    _, ours = pairs("llama")
    s = {"temperature": 0.9, "top_k": 30, "top_p": 0.95, "repetition_penalty": 1.2, "presence_penalty": 0.3, "min_tokens": 4, "seed": 5}
    asked = prompts(6)
    near = drafts("llama", "near")
    plain = answers(TokenEngine(ours, decode=pearl(near, mode=mode, window=2) if mode == "rejection" else None), asked, **s)
    engine = TokenEngine(
        ours, decode=pearl(near, mode=mode, window=window), memory=400 * TokenEngine(ours).cache.shape.bytes_per_position, max_rows=5
    )
    assert answers(engine, asked, **s) == plain
