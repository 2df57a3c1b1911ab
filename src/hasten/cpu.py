"""The processors that this process may use, and how many threads are worth having on them.

Decoding is bound by memory, so one thread a physical core is what pays: a second hyperthread reads no faster. Memory belongs to a NUMA node,
so one engine stays in one node, and several nodes want several engines (`workers`). A container may hold less than the machine shows. Read from
Linux's sysfs and cgroups (kernel docs: admin-guide/cputopology, cgroup-v1, cgroup-v2); elsewhere from what the system tells.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import platform
import subprocess
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from hasten.values import UserError

Core: TypeAlias = tuple[int, ...]  # numbers of a physical core's logical processors (hyperthreads)
CACHE = 1 << 20  # bytes of a core's own cache where the system does not tell


@dataclass(frozen=True)
class Topology:
    """nodes: NUMA nodes (sub-NUMA clusters are nodes as well), each its physical cores. quota: processors' worth of time that the container
    may use, None: no limit. cache: bytes of one core's level-2 cache."""

    nodes: tuple[tuple[Core, ...], ...]
    quota: float | None = None
    cache: int = CACHE

    @property
    def cores(self) -> int:
        """Physical cores, of all nodes."""
        return sum(map(len, self.nodes))

    @property
    def processors(self) -> list[int]:
        """Logical processors in the order in which they are worth using: one of every core, node after node, then the second ones."""
        cores = [core for node in self.nodes for core in node]
        return [core[i] for i in range(max(map(len, cores))) for core in cores if i < len(core)]

    @property
    def most(self) -> int:
        """Threads that can run at the same time."""
        return self._within_quota(len(self.processors), math.ceil)

    def threads(self, workers: int = 1, place: Sequence[int] = ()) -> int:
        """Threads of one of so many engines: one a core of its place (default: the first of `places`), within its share of the quota."""
        return self._within_quota(len(place or self.places(workers)[0]), lambda quota: int(quota / workers))

    def _within_quota(self, n: int, share: Callable[[float], int]) -> int:
        return n if self.quota is None else max(1, min(n, share(self.quota)))

    def places(self, workers: int) -> list[list[int]]:
        """Processors for each of so many engines, one of each core: whole nodes, largest first, and parts of nodes where there are more engines."""
        nodes = sorted(self.nodes, key=len, reverse=True)
        shares = [len(range(i, workers, len(nodes))) for i in range(len(nodes))]  # engines on each node
        parts = [[core[0] for core in node] for node in nodes]
        return sorted((part[i::n] or part for part, n in zip(parts, shares, strict=True) for i in range(n)), key=len, reverse=True)

    def __str__(self) -> str:
        words = [_count(self.cores, "physical core"), _count(len(self.nodes), "NUMA node"), _count(len(self.processors), "processor")]
        quota = f", of which the container may use {self.quota:g}" if self.quota is not None else ""
        return f"{words[0]} in {words[1]} ({words[2]}{quota})"


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"


# --- using ----------------------------------------------------------------------------------------------------------------------


def choose(threads: str | int = "auto", nbytes: float = math.inf) -> int:
    """Threads for a model whose weights are `nbytes`: a number that was asked for, or "auto".

    auto: a thread for every full level-2 cache of weights, at most the physical cores of one node. Weights that stay in the caches of fewer
    cores leave further threads nothing to fetch, and every layer would wait for them. What OMP_NUM_THREADS or MKL_NUM_THREADS say is taken as
    it is, and where torch has fewer threads (`torch.set_num_threads`) there are no more. UserError for what is no such number.
    """
    there = topology()
    if threads != "auto":
        return _asked(threads, there)
    import torch

    if any(os.environ.get(name) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")):
        return int(torch.get_num_threads())
    return int(max(1, min(there.threads(), torch.get_num_threads(), nbytes / there.cache)))


def _asked(threads: str | int, there: Topology) -> int:
    try:
        number = int(threads)
    except ValueError:
        raise UserError(f"threads={threads!r}: must be 'auto' or a whole number") from None
    if not 1 <= number <= there.most:
        raise UserError(f"threads={number}: must lie between 1 and {there.most}, for this process may use {there}")
    return number


@contextlib.contextmanager
def using(threads: int | None) -> Iterator[None]:
    """Inside, torch has so many threads (None: as many as it has); afterwards what it had."""
    import torch

    before = torch.get_num_threads()
    if threads is None or threads == before:
        yield
        return
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def bind(processors: Sequence[int]) -> None:
    """From now on every thread of this process, those that it starts later included, runs on these processors. UserError where it cannot."""
    if not hasattr(os, "sched_setaffinity"):
        raise UserError(f"pin: {platform.system()} does not let a process choose its processors")
    try:
        for task in os.listdir("/proc/self/task"):
            with contextlib.suppress(ProcessLookupError):  # that thread has ended
                os.sched_setaffinity(int(task), processors)
    except OSError as error:
        raise UserError(f"pin: processors {', '.join(map(str, processors))} are refused ({error.strerror})") from None


def pin(threads: int) -> None:
    """`bind` to one hyperthread of each core of the largest node; to as many processors as there are threads, where a node has fewer cores."""
    there = topology()
    node = there.places(1)[0]
    bind(node if len(node) >= threads else there.processors[:threads])


# --- reading --------------------------------------------------------------------------------------------------------------------


@functools.cache
def topology() -> Topology:
    """That of this process, read once."""
    return read()


def read(root: Path = Path("/"), affinity: Collection[int] | None = None) -> Topology:
    """The topology that the files under `root` describe. affinity: processors the process is bound to (default: asked of the system)."""
    usable = _usable(root, affinity)
    fast = usable & _list(root / "sys/devices/cpu_core/cpus")  # work is shared evenly, so slow cores beside fast ones would be waited for
    usable = fast or usable
    groups = [usable & _list(folder / "cpulist") for folder in _numbered(root / "sys/devices/system/node", "node")]
    groups.append(usable.difference(*groups))  # what no node claims
    nodes = tuple(tuple(_cores(root, group)) for group in groups if group)
    return Topology(nodes, _quota(root), _cache(root, min(usable)))


def _usable(root: Path, affinity: Collection[int] | None) -> set[int]:
    """Processors that are online, and that both the affinity and the cgroup allow."""
    online = _list(root / "sys/devices/system/cpu/online") or set(range(_macos("physicalcpu") or os.cpu_count() or 1))
    if affinity is None and hasattr(os, "sched_getaffinity"):
        affinity = os.sched_getaffinity(0)
    allowed = online & set(affinity) if affinity else online
    names = ("cpuset.cpus.effective", "cpuset.effective_cpus", "cpuset.cpus")
    confined = next((found for folder in _cgroups(root, "cpuset") for name in names if (found := _list(folder / name))), allowed)
    return allowed & confined or allowed or online


def _cores(root: Path, processors: set[int]) -> Iterator[Core]:
    """Usable processors grouped by the physical core they are threads of."""
    left = set(processors)
    for first in sorted(processors):
        if first in left:
            core = {first} | (left & _list(root / f"sys/devices/system/cpu/cpu{first}/topology/thread_siblings_list"))
            left -= core
            yield tuple(sorted(core))


def _quota(root: Path) -> float | None:
    """Processors' worth of time that the tightest of the cgroups around this process allows."""
    limits = []
    for folder in _cgroups(root, "cpu"):
        v1 = f"{_text(folder / 'cpu.cfs_quota_us')} {_text(folder / 'cpu.cfs_period_us')}"
        words = (_text(folder / "cpu.max") or v1).split()
        if len(words) == 2 and words[0].isdigit() and words[1].isdigit():  # v2 writes "max", v1 -1, where there is no limit
            limits.append(int(words[0]) / int(words[1]))
    return min(limits, default=None)


def _cgroups(root: Path, controller: str) -> Iterator[Path]:
    """Folders of the cgroups this process is in, the innermost first, of both versions of the interface."""
    mounts = root / "sys/fs/cgroup"
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, names, path = (*line.split(":", 2), "", "")[:3]
        if names and controller not in names.split(","):
            continue
        inside = [part for part in path.split("/") if part not in ("", "..")]  # a container may see neither its path nor what is around it
        for mount in [mounts / names, mounts / controller] if names else [mounts, mounts / "unified"]:
            yield from (mount.joinpath(*inside[:n]) for n in range(len(inside), -1, -1))


def _cache(root: Path, processor: int) -> int:
    """Bytes of the level-2 cache of a processor."""
    for folder in _numbered(root / f"sys/devices/system/cpu/cpu{processor}/cache", "index"):
        size = _text(folder / "size")
        if _text(folder / "level") == "2" and size[:-1].isdigit():
            return int(size[:-1]) * {"K": 1 << 10, "M": 1 << 20}.get(size[-1], 1)
    return _macos("l2cachesize") or CACHE


def _macos(name: str) -> int:
    """What macOS says of its performance cores; 0 elsewhere."""
    if platform.system() != "Darwin":
        return 0
    for key in (f"hw.perflevel0.{name}", f"hw.{name}"):
        with contextlib.suppress(OSError, ValueError, subprocess.SubprocessError):
            return int(subprocess.run(["sysctl", "-n", key], capture_output=True, text=True, timeout=5, check=True).stdout)
    return 0


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""


def _list(path: Path) -> set[int]:
    """A kernel list such as `0-3,8,10-11`; empty where there is no such file."""
    spans = [span.partition("-") for span in _text(path).split(",") if span]
    try:
        return {n for low, _, high in spans for n in range(int(low), int(high or low) + 1)}
    except ValueError:
        return set()


def _numbered(folder: Path, name: str) -> list[Path]:
    """`name0`, `name1`, … in a folder, by number."""
    found = [path for path in folder.glob(f"{name}*") if path.name.removeprefix(name).isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix(name)))
