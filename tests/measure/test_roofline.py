"""The ceiling from numbers whose meaning is known."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from hasten.flops import ModelCost, Span, model_cost
from hasten.measure import roofline
from hasten.measure.roofline import Roofline, bandwidth, step_bytes

COST = ModelCost(0.0, 0.0, 1000, (Span(None, 0.0, 8.0), Span(10, 0.0, 2.0)))


@pytest.mark.parametrize(
    ("rows", "context", "shares", "expected"),
    [
        (1, 0, {}, 1000),
        (1, 100, {}, 1000 + 800 + 20),
        (3, 5, {}, 1000 + 3 * 50),
        (3, 5, {"weights": 0.25}, 250 + 150),
        (2, 5, {"weights": 0.5, "cache": 0.5}, 500 + 50),
    ],
)
def test_weights_once_and_the_cache_of_every_row(rows: int, context: int, shares: dict[str, float], expected: float) -> None:
    assert step_bytes(COST, rows, context, **shares) == expected


def test_of_a_model() -> None:
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    cost = model_cost(model)
    assert step_bytes(cost, 3, 7) == pytest.approx(cost.weight_bytes + 3 * 7 * 2 * 2 * 2 * 4 * 4)  # layers, keys and values, heads, width
    assert cost.weight_bytes >= 4 * sum(p.numel() for p in model.parameters())


def test_distance_and_card() -> None:
    roof = Roofline(2e8, 2e10)
    assert roof.seconds == pytest.approx(0.01)
    assert roof.distance(0.014) == pytest.approx(1.4)
    assert roof.card("int8") == "ceiling, int8: 200 MB a step at 20.0 GB/s measured = 10.0 ms"


def test_bandwidth_is_the_best_of_some_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = iter([0.0, 3.0, 3.0, 5.0, 5.0, 9.0])
    monkeypatch.setattr(roofline, "time", SimpleNamespace(perf_counter=lambda: next(readings)))
    assert bandwidth(4096, repeats=3) == 2048.0
