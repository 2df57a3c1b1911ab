"""README's table of papers, made from the results: `python -m hasten.papers.table [README.md] [results]` writes it between its two marks."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hasten.artifact import write_text
from hasten.papers import PAPERS, paper
from hasten.papers.run import results
from hasten.terminal import figure, span
from hasten.values import UserError

BEGIN, END = "<!-- papers: made by `python -m hasten.papers.table` -->", "<!-- /papers -->"
HEAD = ("| paper | claim | published | measured | 95 % interval | verdict |", "|---|---|---|---|---|---|")


def table(out: str | Path = "results") -> str:
    """One row a claim and machine, failures included; a paper without results says so."""
    lines = list(HEAD)
    for name in PAPERS:
        found = results(name, out)
        lines += [_row(name, machine, claim) for machine, document in found.items() for claim in document["claims"]]
        if not found:
            lines.append(f"| `{name}` | {paper(name).title} ({len(paper(name).claims)} claims) | | | | not measured in full yet |")
    return "\n".join(lines)


def _row(name: str, machine: str, claim: Mapping[str, Any]) -> str:
    published, measured = (f"{figure(claim[key])} {claim['unit']}" if claim[key] is not None else "" for key in ("published", "measured"))
    interval = span(claim["ci"]) if claim["measured"] is not None else ""
    where = f"[`{name}`](results/{name}/{machine}.json)"
    return f"| {where} | {claim['claim']} | {published} | {measured} | {interval} | {claim['verdict']} |"


def placed(text: str, made: str) -> str:
    """The text with the table between its marks; UserError where it has none."""
    if text.count(BEGIN) != 1 or END not in text.split(BEGIN)[1]:
        raise UserError(f"the marks {BEGIN} and {END} are not there once each")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{made}\n{END}{rest.split(END, 1)[1]}"


def main() -> None:
    """Rewrite the file that is named (README.md)."""
    given = dict(enumerate(sys.argv[1:]))
    readme, out = Path(given.get(0, "README.md")), given.get(1, "results")
    write_text(readme, placed(readme.read_text("utf-8"), table(out)))


if __name__ == "__main__":
    main()
