"""The staircase paper: what its claims read, and a tiny run of real arms."""

from typing import Any

import pytest

from hasten.papers import stairs as module
from hasten.papers.paper import document
from hasten.papers.run import Measuring
from hasten.papers.stairs import ASSISTED, CAUSAL, KS, PAPER, PLAIN, STAIRS, collect, named, recipes

SETTINGS: dict[str, Any] = {"repeats": 1, "prompts": 1, "prompt": 16, "tokens": 6, "native": False}
SECONDS = {PLAIN: 10.0, STAIRS: 8.0, CAUSAL: 6.0, ASSISTED: 12.0, named(1): 7.0, named(2): 7.5, named(8): 12.0, named(16): 21.0}


def lines(repeats: int = 9, **more: Any) -> list[dict[str, Any]]:
    base = {"differing": 0, "answers": 20, **more}
    return [{"what": what, "repeat": i, "seconds": t * (1 + i), **base} for what, t in SECONDS.items() for i in range(repeats)]


def claims(evidence: list[Any]) -> dict[str, dict[str, Any]]:
    return {claim["id"]: claim for claim in document(PAPER, evidence, SETTINGS, {})["claims"]}


def test_claims_read_the_arms_they_name() -> None:
    found = claims(lines())
    assert found["identical"]["measured"] == 0 and found["identical"]["n"] == 5 * 9 * 20 and found["identical"]["verdict"] == "holds"
    assert found["faster"]["measured"] == pytest.approx(20.0) and found["faster"]["verdict"] == "holds"
    assert found["causal"]["measured"] == pytest.approx(8 / 6) and found["causal"]["verdict"] == "fails"
    assert found["draft-length"]["measured"] == pytest.approx(3.0)
    assert found["transformers"]["measured"] == pytest.approx(1.5)
    assert found["t5"]["verdict"] == "not testable here"


def test_answers_that_differ_and_too_few_repeats() -> None:
    assert claims(lines(differing=4))["identical"]["verdict"] == "fails"
    few = claims(lines(5))
    assert few["faster"]["verdict"] == few["draft-length"]["verdict"] == "undecided"
    assert {claim["verdict"] for claim in claims([]).values()} == {"undecided", "not testable here"}


def test_all_arms_have_the_same_steps_and_draft() -> None:
    plain, native = recipes(SETTINGS), recipes({**SETTINGS, "native": True})
    assert plain.keys() == native.keys() == {PLAIN, CAUSAL, *map(named, KS)}
    assert all("+native" in recipe for recipe in native.values()) and not any("+native" in recipe for recipe in plain.values())


def test_a_tiny_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KS", (4,))
    run = Measuring(SETTINGS, "")
    collect(run)
    assert {line["what"] for line in run.lines} == {PLAIN, STAIRS, CAUSAL, ASSISTED}
    assert all(line["differing"] == 0 and line["seconds"] > 0 for line in run.lines)
