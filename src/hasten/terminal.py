"""What the command line shows. Answers and documents go to stdout; progress, notes and errors go to stderr."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

    from hasten.usage import Usage


def note(text: str) -> None:
    """One line on stderr."""
    print(text, file=sys.stderr, flush=True)


def print_json(document: Any) -> None:
    """Exactly one JSON document on stdout; numbers that JSON lacks (NaN, infinities) become null."""
    print(json.dumps(plain(document), ensure_ascii=False, allow_nan=False), flush=True)


def plain(value: Any) -> Any:
    """Dataclasses, mappings, sequences and numbers as what JSON has."""
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def si(value: float | None, unit: str = "") -> str:
    """A number with three digits and a decimal prefix: 1234567.0 -> `1.23M`; None -> `-`."""
    if value is None or not math.isfinite(value):
        return "-"
    for scale, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1, ""), (1e-3, "m")):
        if abs(value) >= scale:
            return f"{value / scale:.3g}{prefix}{unit}"
    return f"{value * 1e6:.3g}µ{unit}" if value else f"0{unit}"


class Progress:
    """Bars on a terminal's stderr, plain lines elsewhere. `log` says what happened, `update` how far a named piece of work is."""

    def __init__(self) -> None:
        self._bars: Bars | None = None
        self._ids: dict[str, TaskID] = {}

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bars

            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bars = Bars(*columns, console=Console(stderr=True), transient=True)
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars:
            self._bars.stop()

    def log(self, text: str) -> None:
        """A line that stays."""
        if self._bars:
            self._bars.console.print(text, markup=False, highlight=False)
        else:
            note(text)

    def update(self, name: str, done: float, total: float) -> None:
        """The work `name` has done `done` of `total`; shown as a bar on a terminal, and not at all elsewhere."""
        if not self._bars:
            return
        if name not in self._ids:
            self._ids[name] = self._bars.add_task(name.replace("[", r"\["), total=total)
        self._bars.update(self._ids[name], completed=done, total=total, visible=done < total)


def table(title: str, heads: Sequence[str], rows: Iterable[Sequence[str]], stderr: bool = False) -> None:
    """A table; heads that start with `>` are aligned to the right."""
    from rich.console import Console
    from rich.table import Table

    out = Table(title=title or None, title_justify="left", box=None, pad_edge=False)
    for head in heads:
        out.add_column(head.lstrip(">"), justify="right" if head.startswith(">") else "left", overflow="fold")
    for row in rows:
        out.add_row(*(cell.replace("[", r"\[") for cell in row))
    Console(stderr=stderr).print(out)


def show_techniques(rows: Sequence[Mapping[str, Any]]) -> None:
    """Name, slot, exactness and options of each technique."""
    cells = [(r["name"], r["slot"], r["family"], r["exactness"], _options(r["options"]), r["summary"]) for r in rows]
    table("", ("name", "slot", "family", "exactness", "options (defaults)", "what it does"), cells)
    for row in rows:
        if row["why_not"]:
            print(f"{row['name']}: {row['why_not']}")


def _options(options: Sequence[Mapping[str, Any]]) -> str:
    return " ".join(f"{o['name']}={json.dumps(o['default'])}" for o in options)


def show_measurements(title: str, measurements: Sequence[Mapping[str, Any]]) -> None:
    """One row a measurement: quality with its interval, and what a request costs."""
    heads = ("recipe", ">quality", ">95% interval", ">n", ">seconds", ">tokens", ">FLOPs")
    table(title, heads, [_row(m) for m in measurements])


def _row(m: Mapping[str, Any]) -> tuple[str, ...]:
    quality, cost = m["quality"], m["cost"]
    low, high = quality["ci"]
    text = m["recipe_text"] + (" (contended)" if m.get("contended") else "")
    interval = f"{low:.3f} to {high:.3f}"
    return text, f"{quality['value']:.3f}", interval, str(quality["n"]), si(cost["seconds"], "s"), si(cost["tokens"]), si(cost["flops"])


def show_pick(document: Mapping[str, Any]) -> None:
    """The frontier, the pick with its reason, and where the evidence lies."""
    if not document.get("picked"):
        print(document.get("why") or "nothing was picked")
        return
    show_measurements("frontier (quality against cost)", document["frontier"])
    show_measurements("baseline", [document["baseline"]])
    print(f"\npicked: {document['picked']['recipe_text']}\n{document['why']}\nevidence: {document['out']}/report.html")


def show_papers(rows: Sequence[Mapping[str, Any]]) -> None:
    """One row for each paper and machine with results."""
    cells = [
        (row["name"], row["title"], row["source"], result.get("machine", "not measured in full yet"), _tally(result))
        for row in rows
        for result in row["results"] or [{}]
    ]
    table("", ("paper", "title", "source", "results of", "claims"), cells)


def _tally(result: Mapping[str, Any]) -> str:
    return ", ".join(f"{count} {word}" for word, count in result.items() if word != "machine" and count)


def show_paper(document: Mapping[str, Any]) -> None:
    """What was measured of each claim, and how; last, the verdicts."""
    claims = document["claims"]
    for claim in claims:
        print(f"{claim['id']}: {claim['claim']}\n    {claim['how']}\n")
    cells = [(c["id"], figure(c["published"]), figure(c["measured"]), span(c["ci"]), c["unit"], str(c["n"]), c["verdict"]) for c in claims]
    title = f"{document['title']} ({document['settings']['form']} form)"
    table(title, ("claim", ">published", ">measured", ">95% interval", "unit", ">n", "verdict"), cells)
    if document["machine"].get("contended"):
        print("Other programs used the machine meanwhile.")


def figure(number: float | None) -> str:
    """Four digits; `-` for none."""
    return "-" if number is None else f"{number:.4g}"


def span(interval: Sequence[float | None]) -> str:
    """An interval in words; `-` where it is unbounded."""
    low, high = interval
    return "-" if low is None or high is None else f"{figure(low)} to {figure(high)}"


def show_ledger(usage: Usage) -> None:
    """What an answer cost, by model role, on stderr."""
    heads = ("role", ">prompt", ">reused", ">generated", ">scored", ">forwards", ">FLOPs", ">bytes read")
    rows = [
        (role, *(str(n) for n in (c.prompt, c.reused, c.generated, c.scored, c.forwards)), si(c.flops), si(c.bytes, "B"))
        for role, c in usage.by_role.items()
    ]
    table("", heads, rows, stderr=True)
    times = f"{si(usage.seconds, 's')}, first token {si(usage.ttft, 's')}, then {si(usage.tpot, 's')} a token"
    note(f"{times}, peak memory {si(float(usage.peak_bytes), 'B')}")
