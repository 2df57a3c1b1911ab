"""A process of ours that is told and tells one JSON document a line, and that never outlives us.

It ends when its input does. A process group of its own keeps Ctrl-C from it: that reaches whoever asks, who then closes its input.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

PATIENCE = 5.0  # seconds that a process has to end by itself


class Child:
    """One process and its pipes. name: what it is called where its end is told. said: the last error that it reported itself."""

    def __init__(self, name: str, command: Sequence[str]) -> None:
        path = {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen(command, env={**os.environ, **path}, process_group=0, **pipes)  # type: ignore[call-overload]
        self.name, self.said, self._part = name, "", b""

    def send(self, message: Mapping[str, Any]) -> None:
        with contextlib.suppress(BrokenPipeError):  # it has ended: the end of its output will say so
            self.process.stdin.write(json.dumps(message).encode() + b"\n")
            self.process.stdin.flush()

    def read(self) -> list[dict[str, Any]] | None:
        """The messages that have come, once there is something to read; None at the end."""
        data = os.read(self.process.stdout.fileno(), 1 << 20)
        *lines, self._part = (self._part + data).split(b"\n")
        return [json.loads(line) for line in lines] if data else None

    def processor_seconds(self) -> float:
        """User and system time that it has used so far (proc(5), stat: fields 14 and 15); 0.0 where the system does not tell."""
        try:
            with open(f"/proc/{self.process.pid}/stat", encoding="utf-8", errors="replace") as file:
                fields = file.read().rpartition(")")[2].split()
        except OSError:
            return 0.0
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def end(self) -> str:
        """How a process whose output has ended ended, in words."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(PATIENCE)
        stop([self])
        code = self.process.returncode
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        why = self.said or ("the memory was full, perhaps" if code == -signal.SIGKILL else "")
        return f"{self.name} {how}" + (f" ({why})" if why else "")


def stop(children: list[Any]) -> None:
    """End processes and wait for them: none is left, not even as a zombie. The list is empty afterwards."""
    for child in children:
        with contextlib.suppress(OSError):
            child.process.stdin.close()  # which ends it
    for child in children:
        try:
            child.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            child.process.kill()
            child.process.wait()
        child.process.stdout.close()
    children.clear()


def readable(file: int, spin: float, wait: float) -> bool:
    """Whether there is something to read, or an end. spin: seconds in which to ask again and again, so that nobody need wake us; wait: to sleep."""
    until = time.perf_counter() + spin
    while not select.select([file], [], [], 0)[0]:
        if time.perf_counter() > until:
            return bool(select.select([file], [], [], wait)[0])
    return True
