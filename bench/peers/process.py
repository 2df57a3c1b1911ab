"""The other end of `serving`: starts a rival, asks it, and reads how much processor time it has used."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


class Absent(Exception):
    """Why a rival takes no part."""


class Process:
    """A rival that is ready. cold: seconds from its start to its first answer, with files converted before and an empty cache of ours."""

    def __init__(self, python: str, script: str, kind: str, folder: Path, threads: int, converts: bool = False) -> None:
        self.command = [python, str(HERE / script)]
        self.stderr = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.caches = tempfile.TemporaryDirectory()
        self.environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HASTEN_CACHE": self.caches.name}
        if converts:
            self._convert(folder, kind)
        began = time.perf_counter()
        self.child = subprocess.Popen(
            [*self.command, "serve", str(folder), kind, str(threads)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.stderr,
            text=True, env=self.environment,
        )  # fmt: skip
        self.facts = self._answer()["ready"]
        self.cold = time.perf_counter() - began

    def ask(self, **question: Any) -> Any:
        assert self.child.stdin is not None
        try:
            self.child.stdin.write(json.dumps(question) + "\n")
            self.child.stdin.flush()
        except BrokenPipeError:
            pass  # reading says why
        return self._answer()

    def seconds(self) -> float:
        """Processor time that it and what it ran, a compiler say, have used (Linux; 0 elsewhere)."""
        try:
            fields = Path(f"/proc/{self.child.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return 0.0
        return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        assert self.child.stdin is not None
        self.child.stdin.close()
        self.child.wait()
        self.caches.cleanup()

    def _convert(self, folder: Path, kind: str) -> None:
        done = subprocess.run([*self.command, "convert", str(folder), kind], stdout=self.stderr, stderr=self.stderr, env=self.environment)
        if done.returncode:
            raise Absent(self._why(done.returncode))

    def _answer(self) -> Any:
        assert self.child.stdout is not None
        line = self.child.stdout.readline()
        if not line:
            raise Absent(self._why(self.child.wait()))
        return json.loads(line)

    def _why(self, code: int) -> str:
        self.stderr.seek(0)
        lines = [line.strip() for line in self.stderr.read().splitlines() if line.strip()]
        return f"it was killed by signal {-code}" if code < 0 else lines[-1] if lines else f"it ended with {code}"
