"""Verdicts follow from the interval and the threshold alone, and the document has the fields of the contract."""

import json
import math

import pytest

from hasten import terminal
from hasten.measure.stats import Estimate
from hasten.papers import PAPERS, paper
from hasten.papers.paper import VERDICTS, Absent, Claim, Paper, document, exact, median, ratio, verdict
from hasten.values import UserError

FIELDS = ["id", "claim", "published", "measured", "unit", "ci", "n", "threshold", "verdict", "how"]


@pytest.mark.parametrize(
    ("low", "high", "above", "below"),
    [
        (2.1, 3.0, "holds", "fails"),
        (1.0, 1.9, "fails", "holds"),
        (1.9, 2.1, "undecided", "undecided"),
        (2.0, 3.0, "undecided", "undecided"),  # the threshold itself is on no side
        (-math.inf, math.inf, "undecided", "undecided"),
        (math.nan, math.nan, "undecided", "undecided"),
    ],
)
def test_only_an_interval_wholly_on_one_side_decides(low: float, high: float, above: str, below: str) -> None:
    found = Estimate((low + high) / 2, low, high, 9)
    assert verdict(found, 2.0, "above") == above
    assert verdict(found, 2.0, "below") == below


def test_what_cannot_be_tested_is_neither() -> None:
    assert verdict(Absent("no meter"), 2.0, "above") == verdict(Absent("no meter"), 2.0, "below") == "not testable here"


def test_five_repeats_bound_nothing_and_six_do() -> None:
    assert verdict(median([9.0] * 5), 2.0, "above") == "undecided"
    assert verdict(median([9.0] * 6), 2.0, "above") == "holds"
    assert median([]).n == 0


def test_ratios_are_taken_within_a_repeat() -> None:
    lines = [{"what": "a", "repeat": i, "rate": 2.0 * 10**i} for i in range(7)]
    lines += [{"what": "b", "repeat": i, "rate": 10.0**i} for i in range(6)]  # the seventh was not reached
    assert ratio(lines, "a", "b", "rate") == Estimate(2.0, 2.0, 2.0, 6)


def fake(*claims: Claim) -> Paper:
    return Paper("fake", "A fake", "nowhere", claims, lambda full: {}, lambda run: None)


def claim(found: Estimate | Absent) -> Claim:
    return Claim("faster", "It is faster", 3.0, "x", 2.0, "above", "ours over theirs", lambda lines, settings: found)


def test_the_document_is_that_of_the_contract() -> None:
    found = document(fake(claim(exact(2.5, 2.4, 2.6)), claim(Absent("no meter"))), [], {"form": "quick"}, {"cores": 2})
    assert list(found) == ["paper", "title", "claims", "settings", "machine"]
    assert all(list(c) == FIELDS for c in found["claims"])
    measured, absent = found["claims"]
    assert (measured["measured"], measured["ci"], measured["verdict"]) == (2.5, [2.4, 2.6], "holds")
    assert (absent["measured"], absent["ci"], absent["n"], absent["verdict"]) == (None, [None, None], 0, "not testable here")
    assert measured["how"] == "ours over theirs; holds above 2"
    assert "no meter" in absent["how"]
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_a_side_without_a_bound_is_null() -> None:
    [row] = document(fake(claim(median([9.0]))), [], {}, {})["claims"]
    assert (row["measured"], row["ci"], row["n"], row["verdict"]) == (9.0, [None, None], 1, "undecided")


def test_the_table_of_a_document_shows_every_claim(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.show_paper(document(fake(claim(exact(2.5, 2.4, 2.6)), claim(Absent("no meter"))), [], {"form": "quick"}, {"contended": True}))
    said = capsys.readouterr().out
    assert "holds" in said and "not testable here" in said and "no meter" in said and "Other programs" in said


@pytest.mark.parametrize("name", PAPERS)
def test_every_paper_is_complete(name: str) -> None:
    known = paper(name)
    assert known.name == name
    assert len({c.id for c in known.claims}) == len(known.claims) > 0
    assert all(c.claim and c.how and c.unit and c.direction in ("above", "below") and math.isfinite(c.threshold) for c in known.claims)
    assert set(VERDICTS) == {"holds", "fails", "undecided", "not testable here"}


def test_an_unknown_paper_gets_the_nearest_name() -> None:
    with pytest.raises(UserError, match="did you mean 'cpu-inference'"):
        paper("cpu-infrence")
