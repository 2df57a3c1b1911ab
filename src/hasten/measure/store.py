"""What was measured, kept as it comes: a run that is interrupted goes on from there.

`measurements.jsonl` is for people and tools: one measurement a line, the latest of a recipe counts. `outcomes.jsonl` is what they are
made of: one answered item or one timed request a line. A line is written with one call and flushed, so that an interrupted
write costs one line, which is ignored when read.
"""

from __future__ import annotations

import contextlib
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hasten.values import UserError

MEASUREMENTS, OUTCOMES = "measurements.jsonl", "outcomes.jsonl"


class Store:
    """A directory of measurements. `answered(key)` and `timed(key)` give what is already known of a recipe under a key."""

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        with saying_why(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
        self._known: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
        for line in _lines(self.directory / OUTCOMES):
            if {"kind", "key"} <= line.keys():
                self._known[line["kind"], line["key"]].append(line)

    def answered(self, key: str) -> list[dict[str, Any]]:
        return self._known["answer", key]

    def timed(self, key: str) -> list[dict[str, Any]]:
        return self._known["time", key]

    def keep(self, kind: str, key: str, document: Mapping[str, Any]) -> None:
        """Remember one answer ("answer") or one timed request ("time")."""
        line = {"kind": kind, "key": key, **document}
        self._known[kind, key].append(line)
        self._append(OUTCOMES, line)

    def publish(self, measurement: Mapping[str, Any]) -> None:
        """Append a measurement to measurements.jsonl."""
        self._append(MEASUREMENTS, measurement)

    def _append(self, name: str, line: Mapping[str, Any]) -> None:
        path = self.directory / name
        with saying_why(path), path.open("a", encoding="utf-8") as file:
            if file.tell() and not _ends_with_newline(path):
                file.write("\n")  # an interrupted run left half a line
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def saying_why(path: Path) -> Iterator[None]:
    """A full disk or a forbidden directory as one sentence."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from None


def _ends_with_newline(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, 2)
        return file.read(1) == b"\n"


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The JSON objects of a file; broken lines are left out."""
    text = path.read_text("utf-8", errors="replace") if path.is_file() else ""
    for line in text.splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            document = json.loads(line)
            if isinstance(document, dict):
                yield document
