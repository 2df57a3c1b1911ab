"""Joules of a stretch of work, or the reason why this machine cannot tell.

RAPL: the processor's own counters under /sys/class/powercap (Linux kernel, Documentation/power/powercap), packages and their memory.
NVML: nvmlDeviceGetTotalEnergyConsumption, by way of pynvml where it is installed. Both count the whole device, whoever uses it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import TracebackType

POWERCAP = Path("/sys/class/powercap")


class Counter:
    """One energy counter. read() gives microjoules; it starts again from zero after `span` (None: it never does)."""

    def __init__(self, read: Callable[[], int], span: int | None = None) -> None:
        self.read, self.span = read, span

    def joules_since(self, before: int) -> float:
        now = self.read()
        return (now - before if now >= before or not self.span else now + self.span - before) / 1e6


class EnergyMeter:
    """`with EnergyMeter() as energy: ...` then `energy.joules` (None where unknown) and `energy.reason`.

    A counter that wraps is read right as long as it wraps once (at 100 W about 40 minutes): measure in shorter stretches.
    """

    def __init__(self, root: Path = POWERCAP, gpu: bool = True) -> None:
        self.joules: float | None = None
        self._counters, self.reason = find_counters(root, gpu)
        self._before: list[int] = []

    def __enter__(self) -> EnergyMeter:
        self._before = [counter.read() for counter in self._counters]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._counters:
            self.joules = sum(counter.joules_since(before) for counter, before in zip(self._counters, self._before, strict=True))


def find_counters(root: Path = POWERCAP, gpu: bool = True) -> tuple[list[Counter], str]:
    """The counters that can be read, and a sentence on what they cover or why there are none."""
    cpu, why = _rapl(root)
    gpus = _nvml() if gpu else []
    if not cpu and not gpus:
        return [], why
    covers = [*(["processor (RAPL)"] if cpu else []), *(["GPU (NVML)"] if gpus else [])]
    return [*cpu, *gpus], f"whole {' and '.join(covers)}, other programs included"


def _rapl(root: Path) -> tuple[list[Counter], str]:
    """Counters of each package (intel-rapl:N) and its memory (a zone named dram); "psys" and "core" would count the same joules twice."""
    zones = sorted(root.glob("intel-rapl:*")) if root.is_dir() else []
    counters = []
    try:
        for zone in zones:
            name = (zone / "name").read_text().strip()
            if name.startswith("package") or name == "dram":
                energy = zone / "energy_uj"
                int(energy.read_text())
                counters.append(Counter(lambda path=energy: int(path.read_text()), int((zone / "max_energy_range_uj").read_text())))  # type: ignore[misc]
    except PermissionError:
        return [], f"the processor's energy counters are readable by root only (chmod a+r {root}/intel-rapl:*/energy_uj)"
    except (OSError, ValueError) as error:
        return [], f"the processor's energy counters cannot be read: {error}"
    return counters, "" if counters else "this machine shows no energy counter (no RAPL, as in most virtual machines, and no NVML)"


def _nvml() -> list[Counter]:
    """One counter for each NVIDIA GPU; none where pynvml, the driver or the feature (Volta and later) is missing."""
    try:
        import pynvml  # type: ignore[import-not-found,import-untyped,unused-ignore]

        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        for handle in handles:
            pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except Exception:  # whatever is missing, the answer is the same: no counter
        return []
    return [Counter(lambda h=h: 1000 * pynvml.nvmlDeviceGetTotalEnergyConsumption(h)) for h in handles]  # type: ignore[misc]
