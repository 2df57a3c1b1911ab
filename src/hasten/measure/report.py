"""`report.html`: what was measured, as one self-contained page. It needs no network, and it is drawn by the page itself from the JSON inside.

The page shows quality against each cost axis with the frontier and the budget, every recipe with its evidence, the machine, and the command
that measures it all again. The template is `report.html` beside this file; its two marks are replaced and nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from hasten.artifact import write_text

_DATA, _TITLE = "__DATA__", "__TITLE__"


def write(path: str | Path, document: Mapping[str, Any], command: str) -> None:
    """Write the page whole or not at all. document: what `pick` returns; command: the shell line that reproduces it."""
    write_text(Path(path), render(document, command))


def render(document: Mapping[str, Any], command: str) -> str:
    """The page. Text from outside (recipes, file names) reaches it as JSON data only, never as markup."""
    template = files("hasten.measure").joinpath("report.html").read_text("utf-8")
    task = str(document["picked"]["task"])
    title = f"hasten: {task}".translate(_ENTITIES)
    return template.replace(_TITLE, title, 1).replace(_DATA, embedded({**document, "command": command}), 1)


def embedded(value: Any) -> str:
    """JSON that can stand inside a <script> element: no `<`, so nothing in it ends the element; no NaN, which JSON does not have."""
    text = json.dumps(_finite(value), ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c")


_ENTITIES = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;"})


def _finite(value: Any) -> Any:
    """The value with numbers that JSON lacks as null."""
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not (value - value == 0) else value
