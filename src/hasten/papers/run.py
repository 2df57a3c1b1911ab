"""Measure a paper's claims: quick, or in full with every line kept so that the same command goes on where it was interrupted.

Lines carry a stamp of settings, version and machine: what was measured under others is not reused.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hasten import __version__
from hasten.artifact import write_text
from hasten.measure.store import Store, saying_why
from hasten.papers import PAPERS, paper
from hasten.papers.paper import VERDICTS, Line, Paper, Settings, document
from hasten.values import UserError

QUICK_SECONDS = 150.0  # after which the quick form measures nothing more, so that it ends within 3 minutes
BEST = ("amx_int8", "avx512_vnni", "avx512f", "avx2", "avx", "sve", "asimd")  # the first that a machine has is in its name


class Measuring:
    """A run of one paper (`paper.Run`). store: where lines are kept, None for nowhere. until: on time.monotonic's clock, None for no limit."""

    def __init__(
        self, settings: Settings, stamp: str, store: Store | None = None, until: float | None = None,
        log: Callable[[str], None] = lambda text: None,
    ) -> None:  # fmt: skip
        self.settings: Settings = settings
        self.lines: list[Line] = [*store.timed(stamp)] if store else []
        self._stamp, self._store, self._until, self._log = stamp, store, until, log

    def once(self, what: str, repeat: int, make: Callable[[], Line]) -> bool:
        if any(line["what"] == what and line["repeat"] == repeat for line in self.lines):
            return True
        if self._until is not None and time.monotonic() > self._until:
            return False
        line = {"what": what, "repeat": repeat, **make()}
        self.lines.append(line)
        if self._store:
            self._store.keep("time", self._stamp, line)
        self._log(f"{what}, repeat {repeat + 1}: {_short(line)}")
        return True


def _short(line: Line) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in line.items() if type(value) is float)


def measure(
    name: str, *, full: bool = False, out: str | Path = "results", work: str | Path = "hasten-out", log: Callable[[str], None] = print
) -> dict[str, Any]:
    """Measure the claims of a paper and return the document of the contract; `full` writes it to out/NAME/MACHINE.json as well.

    work: where the lines of a full run are kept. UserError for an unknown paper, or where nothing can be written.
    """
    known = paper(name)
    until = None if full else time.monotonic() + QUICK_SECONDS
    machine = described()
    settings = {"form": "full" if full else "quick", "hasten": __version__, **known.settings(full)}
    store = Store(Path(work) / "papers" / name) if full else None
    run = Measuring(settings, _stamp(settings, machine), store, until, log)
    known.collect(run)
    contended = any(line.get("contended") for line in run.lines)
    found = document(known, run.lines, settings, {**machine, "contended": contended})
    if full:
        log(f"written: {_write(found, Path(out) / name / f'{slug(machine)}.json')}")
    return found


def described() -> dict[str, Any]:
    """The machine, without what is the same for all or changes by the minute."""
    from hasten.measure.machine import describe

    return describe("cpu")


def slug(machine: dict[str, Any]) -> str:
    """A file name for machines of a kind: processor, best instruction set, cores."""
    cpu = re.sub(r"\((R|TM|C)\)|@.*|\b(CPU|Processor)\b", " ", machine["cpu"], flags=re.IGNORECASE)
    best = next((name for name in BEST if name in machine["instructions"]), "")
    words = f"{cpu} {best} {machine['cores']} cores {machine['gpu'] or ''}"
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")


def _stamp(settings: dict[str, Any], machine: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps([settings, machine], sort_keys=True).encode()).hexdigest()[:20]


def _write(found: dict[str, Any], path: Path) -> Path:
    with saying_why(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    return path


def listing(out: str | Path = "results") -> list[dict[str, Any]]:
    """Every paper with what its results say: [{"name", "title", "source", "claims", "results": [{"machine", "holds", "fails", …}]}]."""
    return [_listed(name, paper(name), Path(out)) for name in PAPERS]


def _listed(name: str, known: Paper, out: Path) -> dict[str, Any]:
    rows = [{"machine": machine, **_tally(found)} for machine, found in results(name, out).items()]
    return {"name": name, "title": known.title, "source": known.source, "claims": len(known.claims), "results": rows}


def _tally(found: dict[str, Any]) -> dict[str, int]:
    counts = Counter(claim["verdict"] for claim in found["claims"])
    return {word: counts[word] for word in VERDICTS}


def results(name: str, out: str | Path) -> dict[str, dict[str, Any]]:
    """The documents of a paper's full runs, by machine; UserError for a file that is none."""
    return {path.stem: _read(path) for path in sorted((Path(out) / name).glob("*.json"))}


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text("utf-8"))
        wanted = {"id", "claim", "published", "measured", "unit", "ci", "n", "threshold", "verdict", "how"}
        if not found["paper"] or not all(wanted <= claim.keys() for claim in found["claims"]):
            raise KeyError
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path}: this is no result of `hasten papers`") from None
    return found
