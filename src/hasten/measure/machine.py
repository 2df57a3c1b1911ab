"""The machine a measurement was made on, and whether something else was using it at the time.

A measurement is contended if other programs used more than a tenth of the processors, or the hypervisor took more than a fiftieth of the
time (`steal` in /proc/stat; Linux, proc(5)). Contended seconds are marked, not hidden.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from hasten import cpu

OTHERS, STEAL = 0.10, 0.02  # shares above which a stretch is contended
_SETS = ("sse4_2", "avx", "avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimd", "sve", "bf16", "i8mm")


def describe(device: str = "auto", threads: str | int = "auto") -> dict[str, Any]:
    """What the seconds depend on: processor, cores, instruction sets, memory (bytes), GPU, threads and versions.

    cores: physical ones that this process may use; `threads`: those of a large model (a small one may have fewer: `cpu.choose`).
    """
    import torch
    import transformers

    cuda = torch.cuda.is_available() and device != "cpu"
    name, flags = _cpu()
    there = cpu.topology()
    return {
        "cpu": name,
        "cores": there.cores,
        "nodes": len(there.nodes),
        "processors": there.most,
        "instructions": [name for name in _SETS if name in flags],
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "threads": cpu.choose(threads),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def fingerprint(machine: dict[str, Any]) -> str:
    """Names a machine, so that seconds measured elsewhere are not reused."""
    return hashlib.sha256(json.dumps(machine, sort_keys=True).encode()).hexdigest()[:12]


def _cpu() -> tuple[str, set[str]]:
    """Model name and feature flags, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine(), set()
    said = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return said.get("model name", platform.machine()), set((said.get("flags") or said.get("Features") or "").split())


class Watch:
    """`with Watch() as watch: ...` then `watch.contended`; a stretch too short to tell (under five clock ticks) counts as not contended.

    children: tells the processor-seconds of processes that are part of what is measured.
    """

    contended = False

    def __init__(self, stat: Path = Path("/proc/stat"), children: Callable[[], float] = lambda: 0.0) -> None:
        self._stat, self._children = stat, children

    def __enter__(self) -> Watch:
        self._before, self._own = _ticks(self._stat), _own_seconds() + self._children()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.contended = contended(self._before, _ticks(self._stat), _own_seconds() + self._children() - self._own)


def contended(before: tuple[float, float, float], after: tuple[float, float, float], own_seconds: float) -> bool:
    """Whether others used the machine between two readings of (busy, stolen, total) processor-seconds."""
    busy, stolen, total = (b - a for a, b in zip(before, after, strict=True))
    if total < 0.05:
        return False
    return (busy - own_seconds) / total > OTHERS or stolen / total > STEAL


def _own_seconds() -> float:
    times = os.times()
    return times.user + times.system


def _ticks(stat: Path) -> tuple[float, float, float]:
    """(busy, stolen, total) seconds since start, summed over the processors; zeros where the system does not tell."""
    try:
        numbers = [float(n) for n in stat.read_text().split("\n", 1)[0].split()[1:9]]
    except (OSError, ValueError):
        return 0.0, 0.0, 0.0
    user, nice, system, idle, wait, irq, soft, steal = (*numbers, *[0.0] * (8 - len(numbers)))
    hertz = os.sysconf("SC_CLK_TCK")
    busy = user + nice + system + irq + soft
    return busy / hertz, steal / hertz, (busy + idle + wait + steal) / hertz
