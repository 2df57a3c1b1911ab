"""report.html: one file that shows the evidence of a pick and needs nothing but a browser.

The page is `report.html` beside this module with the data of the run put into it as JSON; it loads nothing from any network.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from hasten.measure.pareto import AXES
from hasten.recipe import Recipe
from hasten.techniques import exactness, technique

PLACE = "/*DATA*/null"
SHOWN = ("seconds", "flops", "tokens", "bytes", "forwards", "ttft", "tpot", "p95_ttft", "p95_tpot", "peak_bytes", "joules")


def render(document: Mapping[str, Any]) -> str:
    """The report of what `pick` returned, as HTML."""
    template = files("hasten.measure").joinpath("report.html").read_text("utf-8")
    data = json.dumps(plain(page(document)), ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
    return template.replace(PLACE, data)


def page(document: Mapping[str, Any]) -> dict[str, Any]:
    """What the page shows: a point for every recipe, the two confirmed measurements, budget, machine and command."""
    return {
        "points": [point(m) for m in document["measurements"]],
        "picked": point(document["picked"]),
        "baseline": point(document["baseline"]),
        "confirmation": document.get("confirmation"),
        "budget": document["budget"],
        "targets": document.get("targets", {}),
        "axes": {name: AXES[name] for name in SHOWN},
        "why": document["why"],
        "command": document.get("command", ""),
        "refused": document.get("refused", []),
        "machine": document["picked"]["machine"],
        "task": document["picked"]["task"],
        "concurrency": document["picked"].get("concurrency", 1),
    }


def point(measurement: Mapping[str, Any]) -> dict[str, Any]:
    """A measurement with the labels the plot colours and shapes it by."""
    recipe = Recipe.from_json(measurement["recipe"])
    return {
        "text": measurement["recipe_text"],
        "model": recipe.model,
        "strategy": _label(recipe, ("strategy",)) or "one answer",
        "other": _label(recipe, ("transform", "reuse", "decode", "constraint")),
        "exactness": exactness(recipe),
        "quality": measurement["quality"],
        "cost": measurement["cost"],
        "contended": measurement["contended"],
    }


def _label(recipe: Recipe, slots: Sequence[str]) -> str:
    return " + ".join(use.name for use in recipe.uses if technique(use.name).slot in slots)


def plain(value: Any) -> Any:
    """Numbers that JSON lacks as null."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
