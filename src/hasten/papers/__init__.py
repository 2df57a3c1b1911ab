"""Published claims, each with a command that measures it here: `hasten papers NAME`.

One file a paper. It states its claims with the thresholds that decide them, and how their evidence is collected; nothing else knows it.
This module imports no torch, so that the list is there at once.
"""

from __future__ import annotations

from importlib import import_module

from hasten.papers.paper import Paper
from hasten.values import UserError, did_you_mean

PAPERS: dict[str, str] = {
    "cpu-inference": "hasten.papers.cpu_inference",
    "speculative-theory": "hasten.papers.speculative_theory",
    "stairs": "hasten.papers.stairs",
    "pearl": "hasten.papers.pearl",
}


def paper(name: str) -> Paper:
    """The paper of a name; UserError with the nearest name for an unknown one."""
    if name not in PAPERS:
        raise UserError(f"no such paper: {name!r}{did_you_mean(name, PAPERS)}")
    return import_module(PAPERS[name]).PAPER
