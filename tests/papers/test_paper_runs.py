"""Runs: what is kept, what is resumed, where the quick form stops, and what the verb prints."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from hasten import papers
from hasten.cli import app
from hasten.papers import run
from hasten.papers.paper import Claim, Paper, Run, ratio

MACHINE = {"cpu": "Fast(R) Chip CPU @ 2.5GHz", "cores": 2, "instructions": ["avx2", "avx512f"], "gpu": None}
SLUG = "fast-chip-avx512f-2-cores"


class Clockwork:
    """A paper of which every repeat measures two rivals; it breaks off when told."""

    def __init__(self) -> None:
        self.measured: list[tuple[str, int]] = []
        self.breaks_at: int | None = None

    def collect(self, measuring: Run) -> None:
        for repeat in range(measuring.settings["repeats"]):
            for what in ("ours", "theirs"):
                if not measuring.once(what, repeat, lambda w=what, r=repeat: self.line(w, r)):  # type: ignore[misc]
                    return

    def line(self, what: str, repeat: int) -> dict[str, Any]:
        if repeat == self.breaks_at:
            raise KeyboardInterrupt
        self.measured.append((what, repeat))
        return {"rate": 6.0 if what == "ours" else 2.0, "contended": False}


@pytest.fixture
def clockwork(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Clockwork:
    works = Clockwork()
    faster = Claim(
        "faster", "It is faster", 3.0, "x", 2.0, "above", "ours over theirs", lambda lines, s: ratio(lines, "ours", "theirs", "rate")
    )
    known = Paper("clock", "Clockwork", "nowhere", (faster,), lambda full: {"repeats": 8 if full else 3}, works.collect)
    monkeypatch.setitem(sys.modules, "clockwork_paper", SimpleNamespace(PAPER=known))  # type: ignore[arg-type]
    monkeypatch.setattr(papers, "PAPERS", {"clock": "clockwork_paper"})
    monkeypatch.setattr(run, "PAPERS", papers.PAPERS)
    monkeypatch.setattr(run, "described", lambda: MACHINE)
    monkeypatch.chdir(tmp_path)
    return works


def hasten(*words: str) -> Any:
    return CliRunner().invoke(app, words)


def test_the_quick_form_prints_one_document_and_writes_nothing(clockwork: Clockwork, tmp_path: Path) -> None:
    done = hasten("papers", "clock", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["settings"]["form"] == "quick"
    assert found["machine"] == {**MACHINE, "contended": False}
    assert [c["verdict"] for c in found["claims"]] == ["undecided"]  # three repeats are too few
    assert "ours, repeat 1: rate 6" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_full_form_resumes_and_writes_its_result(clockwork: Clockwork, tmp_path: Path) -> None:
    clockwork.breaks_at = 5
    assert hasten("papers", "clock", "--full").exit_code == 130
    assert not (tmp_path / "results").exists()
    clockwork.breaks_at = None
    done = hasten("papers", "clock", "--full", "--json")
    assert done.exit_code == 0, done.output
    assert sorted(clockwork.measured) == [(what, i) for what in ("ours", "theirs") for i in range(8)]  # none twice
    [file] = [path for path in (tmp_path / "results").rglob("*") if path.is_file()]
    assert file.relative_to(tmp_path).as_posix() == f"results/clock/{SLUG}.json"
    assert json.loads(file.read_text()) == json.loads(done.stdout)
    assert json.loads(done.stdout)["claims"][0]["verdict"] == "holds"


def test_other_settings_reuse_nothing(clockwork: Clockwork, monkeypatch: pytest.MonkeyPatch) -> None:
    hasten("papers", "clock", "--full")
    monkeypatch.setattr(run, "described", lambda: {**MACHINE, "cores": 4})
    hasten("papers", "clock", "--full")
    assert len(clockwork.measured) == 32


def test_out_of_time_nothing_more_is_measured(clockwork: Clockwork, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "QUICK_SECONDS", -1.0)
    [claim] = run.measure("clock", log=lambda text: None)["claims"]
    assert clockwork.measured == []
    assert (claim["measured"], claim["n"], claim["verdict"]) == (None, 0, "undecided")


def test_the_list_counts_verdicts(clockwork: Clockwork) -> None:
    [row] = json.loads(hasten("papers", "--json").stdout)
    assert (row["name"], row["claims"], row["results"]) == ("clock", 1, [])
    assert "not measured in full yet" in " ".join(hasten("papers").stdout.split())
    hasten("papers", "clock", "--full")
    [row] = json.loads(hasten("papers", "--json").stdout)
    assert row["results"] == [{"machine": SLUG, "holds": 1, "fails": 0, "undecided": 0, "not testable here": 0}]
    assert "1 holds" in " ".join(hasten("papers").stdout.split())


@pytest.mark.parametrize(
    ("words", "sentence"),
    [(["nonsense"], "no such paper: 'nonsense'; there are: clock"), (["clok"], "did you mean 'clock'"), (["--full"], "name the paper")],
)
def test_mistakes_are_one_sentence(clockwork: Clockwork, words: list[str], sentence: str) -> None:
    done = hasten("papers", *words)
    assert (done.exit_code, done.stdout) == (2, "")
    assert sentence in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("text", ["", "[]", '{"paper": "clock"}', '{"paper": "clock", "claims": [{}]}'])
def test_a_file_that_is_no_result_is_named(clockwork: Clockwork, tmp_path: Path, text: str) -> None:
    file = tmp_path / "results/clock/odd.json"
    file.parent.mkdir(parents=True)
    file.write_text(text)
    done = hasten("papers")
    assert done.exit_code == 2 and "odd.json: this is no result" in done.stderr


def test_where_nothing_can_be_written_is_said(clockwork: Clockwork, tmp_path: Path) -> None:
    (tmp_path / "results").write_text("a file")
    done = hasten("papers", "clock", "--full")
    assert done.exit_code == 2 and "cannot be written" in done.stderr


def test_listing_imports_no_torch() -> None:
    code = "import sys; from hasten.papers.run import listing; listing(); sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    source = Path(run.__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=source, timeout=60).returncode == 0


def test_a_machine_s_name_has_nothing_of_its_host() -> None:
    assert run.slug(MACHINE) == SLUG
    assert (
        run.slug({**MACHINE, "cpu": "AMD EPYC 9654 96-Core Processor", "gpu": "Big GPU"}) == "amd-epyc-9654-96-core-avx512f-2-cores-big-gpu"
    )
