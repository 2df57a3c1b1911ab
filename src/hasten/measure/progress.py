"""What a long run tells while it runs: lines that stay and a bar that moves, both on stderr, so that stdout holds results only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Silent:
    """Says nothing; the base of what says something."""

    def line(self, text: str) -> None:
        """A line that stays."""

    def bar(self, text: str, done: int, total: int) -> None:
        """How far the present stage is."""


class Console(Silent):
    """On a terminal a moving bar under the lines; elsewhere (a log file) the lines alone."""

    def __init__(self, live: Any) -> None:
        self._live = live
        self._task = live.add_task("", total=None)

    def line(self, text: str) -> None:
        self._live.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def bar(self, text: str, done: int, total: int) -> None:
        self._live.update(self._task, description=text, completed=done, total=total)


@contextmanager
def console() -> Iterator[Console]:
    """`with console() as progress: pick(..., progress=progress)`."""
    from rich.console import Console as Terminal
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Terminal(stderr=True), transient=True) as live:
        yield Console(live)
