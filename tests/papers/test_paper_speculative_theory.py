"""The theory paper: its golden chain, what its claims read, controls that they can fail, and a real pair of models."""

from typing import Any

import numpy as np
import pytest

from hasten.lm.decode import theory
from hasten.papers import speculative_theory as module
from hasten.papers.paper import document
from hasten.papers.run import Measuring
from hasten.papers.speculative_theory import LOSSY, PAIRS, PAPER, SAMPLINGS, collect

SETTINGS: dict[str, Any] = {"chains": 6, "runs": 2000, "laws": 5, "rounds": 1, "prompts": 2, "tokens": 8, "k": 3}


def claims(lines: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {claim["id"]: claim for claim in document(PAPER, lines, SETTINGS, {})["claims"]}


@pytest.fixture(scope="module")
def evidence() -> list[Any]:
    """A tiny run of everything but the models."""
    run = Measuring({**SETTINGS, "rounds": 0}, "")
    collect(run)
    return list(run.lines)


def real(ratio: float, positions: int = 40000) -> list[dict[str, Any]]:
    line = {"repeat": 0, "tv": 0.3 * positions, "variance": 0.15 * positions, "positions": positions}
    arms = [(f"{pair}, {name}, weight {w:g}", w) for pair in PAIRS for name in SAMPLINGS for w in (1.0, LOSSY)]
    return [{**line, "what": what, "rejections": ratio * w * line["tv"]} for what, w in arms]


def test_the_first_chain_is_the_golden_one() -> None:
    found = module.chain(0, 500)
    assert found["expected"] == pytest.approx(16.6202, abs=6e-4) and found["many"] == pytest.approx(12.347, abs=6e-4)


def test_chains_and_laws_bear_the_theorems_out(evidence: list[Any]) -> None:
    found = claims(evidence)
    for name in ("control", "limit", "trade-off", "residual", "residual-exact"):
        assert found[name]["verdict"] == "holds", name
    for name in ("rejections", "batch"):
        assert found[name]["ci"][0] < 0.5, name  # so few runs decide nothing
    assert found["unbiased"]["measured"] < 1.3 < found["control"]["measured"]
    assert found["speed-up"]["published"] == 3.05 and 2.8 < found["speed-up"]["measured"] < 3.3


def test_a_wrong_algorithm_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that draws from the target after a rejection, and one that rejects too often."""
    whole = theory.simulate

    def wrong(p: Any, q: Any, start: int, runs: int, drafts: int = 1, seed: int = 0) -> Any:
        rejections, _ = whole(p, q, start, runs, drafts, seed)
        return rejections * 1.02, module.biased(p, q, runs, seed)

    monkeypatch.setattr(theory, "simulate", wrong)
    found = claims([{"what": "chain", "repeat": i, **module.chain(i, 4000)} for i in range(6)])
    assert found["unbiased"]["verdict"] == found["rejections"]["verdict"] == found["batch"]["verdict"] == "fails"


def test_claims_about_models_read_their_own_arms() -> None:
    found = claims(real(1.01))
    assert found["models"]["verdict"] == found["models-lossy"]["verdict"] == "holds"
    assert found["models"]["measured"] == pytest.approx(1.0) and found["models"]["n"] == 3 * 2 * 40000
    assert claims(real(1.2))["models"]["verdict"] == claims(real(0.8))["models-lossy"]["verdict"] == "fails"
    assert claims(real(1.01, 300))["models"]["verdict"] == "undecided"
    assert claims([])["models"]["verdict"] == claims([])["trade-off"]["verdict"] == "undecided"
    assert claims([])["judges"]["verdict"] == "not testable here"


def test_a_real_pair_is_counted() -> None:
    found = module.models("arith", "plain", 1.0, 0, {**SETTINGS, "prompts": 6, "tokens": 40})
    assert found["positions"] > 100 and 0 < found["variance"] < found["tv"]
    assert abs(found["rejections"] - found["tv"]) < 5 * found["variance"] ** 0.5


def test_misfit_is_one_for_the_right_law() -> None:
    q = module.transitions(11)
    _, tokens = theory.simulate(q, q, 0, 4000)
    assert module.misfit(tokens, q) == pytest.approx(1, abs=0.35)
    assert np.allclose(q.sum(-1), 1)
