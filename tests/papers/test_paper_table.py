"""README's table of papers is what the results give."""

import json
import sys
from pathlib import Path

import pytest

from hasten.papers import table
from hasten.values import UserError

ROOT = Path(__file__).parents[2]
CLAIM = {
    "id": "faster",
    "claim": "It is faster",
    "published": 3.0,
    "measured": 1.234,
    "unit": "x",
    "ci": [1.1, 1.3],
    "n": 9,
    "threshold": 2.0,
}
CLAIM |= {"verdict": "fails", "how": "ours over theirs"}


def test_readme_is_up_to_date() -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    assert table.placed(readme, table.table(ROOT / "results")) == readme, "run python -m hasten.papers.table"


def test_results_name_no_host_and_are_what_the_command_writes() -> None:
    for path in (ROOT / "results").rglob("*.json"):
        found = json.loads(path.read_text("utf-8"))
        assert (found["paper"], found["settings"]["form"]) == (path.parent.name, "full")


def test_a_row_a_claim_failures_included(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "results/cpu-inference/chip.json"
    file.parent.mkdir(parents=True)
    absent = CLAIM | {"measured": None, "ci": [None, None], "verdict": "not testable here", "published": None}
    file.write_text(json.dumps({"paper": "cpu-inference", "title": "T", "claims": [CLAIM, absent], "settings": {}, "machine": {}}))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(table, "PAPERS", ["cpu-inference"])
    Path("README.md").write_text(f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n")
    monkeypatch.setattr(sys, "argv", ["table"])
    table.main()
    link = "[`cpu-inference`](results/cpu-inference/chip.json)"
    rows = [f"| {link} | It is faster | 3 x | 1.234 x | 1.1 to 1.3 | fails |", f"| {link} | It is faster |  |  |  | not testable here |"]
    assert Path("README.md").read_text() == "\n".join(["before", table.BEGIN, *table.HEAD, *rows, table.END, "after\n"])


@pytest.mark.parametrize("text", ["", table.BEGIN, f"{table.END} {table.BEGIN}", f"{table.BEGIN}{table.BEGIN}{table.END}"])
def test_a_file_without_the_marks_is_left_alone(text: str) -> None:
    with pytest.raises(UserError, match="marks"):
        table.placed(text, "made")
