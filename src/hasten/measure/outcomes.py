"""What was seen of each item, one JSON line each, so that an interrupted run loses nothing and the next one resumes.

A line is `{"key", "item", "kind", ...}`. The key names everything the outcome depends on; kinds are "quality", "cost" and "reference".
A line cut short by a crash is skipped when the file is read, and the item is measured again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

from hasten.values import UserError

Outcome: TypeAlias = dict[str, Any]


class Outcomes:
    """Outcomes by (key, kind) and item; `path` None keeps them in memory only."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self._known: dict[tuple[str, str], dict[str, Outcome]] = {}
        for line in path.read_text("utf-8", errors="replace").splitlines() if path and path.exists() else ():
            self._take(line)

    def of(self, key: str, kind: str) -> Mapping[str, Outcome]:
        """item -> outcome, in the order seen."""
        return self._known.get((key, kind), {})

    def add(self, key: str, kind: str, item: str, outcome: Mapping[str, Any]) -> None:
        """Remember an outcome, on disk before anything else happens."""
        if self.path is not None:
            append_line(self.path, {"key": key, "kind": kind, "item": item, **outcome})
        self._known.setdefault((key, kind), {})[item] = dict(outcome)

    def _take(self, line: str) -> None:
        try:
            row = json.loads(line)
            key, kind, item = row.pop("key"), row.pop("kind"), row.pop("item")
        except (json.JSONDecodeError, KeyError, AttributeError):
            return
        self._known.setdefault((key, kind), {})[item] = row


def append_line(path: Path, document: Mapping[str, Any]) -> None:
    """Append one JSON line in one write. UserError where the disk does not take it; a part that was written is taken back."""
    data = (json.dumps(document, ensure_ascii=False) + "\n").encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None
    try:
        size = os.fstat(file).st_size
        if size and os.pread(file, 1, size - 1) != b"\n":  # a line that a crash cut short stays a line of its own
            data = b"\n" + data
        if os.write(file, data) != len(data):
            os.ftruncate(file, size)
            raise UserError(f"{path}: the disk is full")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None
    finally:
        os.close(file)
