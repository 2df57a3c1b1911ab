"""Topology from made-up /sys and /proc trees: sockets, hyperthreads, sub-NUMA clusters, containers, missing files, processors that are off."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from hasten import cpu
from hasten.cpu import Topology, read
from hasten.values import UserError

CPU = "sys/devices/system/cpu"


def write(root: Path, files: Mapping[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return root


def tree(root: Path, nodes: Sequence[str], siblings: Sequence[str], online: str, **files: str) -> Path:
    """nodes: their cpulists. siblings: one list a processor; "" for one that is off and has no topology folder."""
    made = {f"sys/devices/system/node/node{i}/cpulist": cpus for i, cpus in enumerate(nodes)}
    made |= {f"{CPU}/cpu{i}/topology/thread_siblings_list": s for i, s in enumerate(siblings) if s}
    return write(root, made | {f"{CPU}/online": online} | files)


def everything(n: int) -> range:
    return range(n)


def test_two_sockets_with_hyperthreads(tmp_path: Path) -> None:
    tree(tmp_path, ["0-3,8-11", "4-7,12-15"], [f"{i % 8},{i % 8 + 8}" for i in range(16)], "0-15")
    there = read(tmp_path, everything(16))
    assert there.nodes == (((0, 8), (1, 9), (2, 10), (3, 11)), ((4, 12), (5, 13), (6, 14), (7, 15)))
    assert (there.cores, there.threads(), there.most) == (8, 4, 16)
    assert there.processors == list(range(16))
    assert there.places(2) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert str(there) == "8 physical cores in 2 NUMA nodes (16 processors)"


def test_sub_numa_clusters_are_nodes(tmp_path: Path) -> None:
    tree(tmp_path, ["0-1", "2-3", "4-5", "6-7"], [str(i) for i in range(8)], "0-7")
    there = read(tmp_path, everything(8))
    assert len(there.nodes) == 4
    assert there.threads() == 2
    assert there.places(3) == [[0, 1], [2, 3], [4, 5]]
    assert there.places(6) == [[4, 5], [6, 7], [0], [1], [2], [3]]  # two nodes are shared, two are not


def test_affinity_takes_cores_and_hyperthreads_away(tmp_path: Path) -> None:
    tree(tmp_path, ["0-1,4-5", "2-3,6-7"], [f"{i % 4},{i % 4 + 4}" for i in range(8)], "0-7")
    assert read(tmp_path, {4, 2, 3, 6}).nodes == (((4,),), ((2, 6), (3,)))
    assert read(tmp_path, {0, 4}).threads() == 1  # two hyperthreads of one core


@pytest.mark.parametrize(("limit", "quota", "threads"), [("max 100000", None, 8), ("250000 100000", 2.5, 2), ("50000 100000", 0.5, 1)])
def test_quota_of_cgroup_v2(tmp_path: Path, limit: str, quota: float | None, threads: int) -> None:
    tree(tmp_path, ["0-7"], [str(i) for i in range(8)], "0-7")
    write(tmp_path, {"proc/self/cgroup": "0::/pod/box", "sys/fs/cgroup/pod/cpu.max": limit, "sys/fs/cgroup/pod/box/cpu.max": "max 100000"})
    there = read(tmp_path, everything(8))
    assert (there.quota, there.threads()) == (quota, threads)
    assert there.threads(workers=2) == max(1, threads // 2)


def test_cpuset_and_quota_of_cgroup_v1_whose_path_is_that_of_the_host(tmp_path: Path) -> None:
    tree(tmp_path, ["0-7"], [str(i) for i in range(8)], "0-7")
    files = {"proc/self/cgroup": "5:cpu,cpuacct:/docker/abc\n4:cpuset:/docker/abc\n3:memory:/docker/abc\n0::/"}
    files |= {"sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "300000", "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000"}
    files |= {"sys/fs/cgroup/cpuset/cpuset.cpus": "2-6"}
    there = read(write(tmp_path, files), everything(8))
    assert there.nodes == (((2,), (3,), (4,), (5,), (6,)),)
    assert (there.quota, there.threads(), there.most) == (3.0, 3, 3)
    assert "the container may use 3" in str(there)
    write(tmp_path, {"sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1", "sys/fs/cgroup/cpuset/cpuset.cpus": ""})
    assert read(tmp_path, everything(8)).quota is None


def test_processors_that_are_off_and_nodes_without_any(tmp_path: Path) -> None:
    tree(tmp_path, ["0-1,4", "2", ""], ["0,4", "1", "2", "", "0,4"], "0-2,4")
    assert read(tmp_path, everything(6)).nodes == (((0, 4), (1,)), ((2,),))


def test_fast_cores_are_used_where_there_are_two_kinds(tmp_path: Path) -> None:
    tree(tmp_path, ["0-7"], ["0-1", "0-1", "2-3", "2-3", "4", "5", "6", "7"], "0-7", **{"sys/devices/cpu_core/cpus": "0-3"})
    assert read(tmp_path, everything(8)).nodes == (((0, 1), (2, 3)),)
    assert read(tmp_path, {5, 6}).nodes == (((5,), (6,)),)


def test_nothing_to_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 3)
    assert read(tmp_path, everything(3)) == Topology((((0,), (1,), (2,)),))
    monkeypatch.delattr("os.sched_getaffinity", raising=False)
    assert read(tmp_path).cores == 3
    monkeypatch.setattr("os.cpu_count", lambda: None)
    assert read(tmp_path).threads() == 1


def test_macos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = {"hw.perflevel0.physicalcpu": "6", "hw.l2cachesize": "4194304"}

    def sysctl(words: list[str], **_: object) -> object:
        if words[-1] not in said:
            raise cpu.subprocess.CalledProcessError(1, words)
        return cpu.subprocess.CompletedProcess(words, 0, said[words[-1]] + "\n", "")

    monkeypatch.setattr(cpu.platform, "system", lambda: "Darwin")
    monkeypatch.setattr(cpu.subprocess, "run", sysctl)
    monkeypatch.delattr("os.sched_getaffinity", raising=False)
    there = read(tmp_path)
    assert (there.threads(), there.cache) == (6, 4 << 20)


def test_level_2_cache(tmp_path: Path) -> None:
    tree(tmp_path, ["0"], ["0"], "0")
    cache = f"{CPU}/cpu0/cache"
    write(
        tmp_path,
        {f"{cache}/index0/level": "1", f"{cache}/index0/size": "48K", f"{cache}/index2/level": "2", f"{cache}/index2/size": "2048K"},
    )
    assert read(tmp_path, {0}).cache == 2 << 20


@pytest.fixture
def eight(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Two nodes of four cores with hyperthreads and 1 MiB each; torch with sixteen threads, noted when it is given others."""
    import torch

    node = lambda first: tuple((core, core + 8) for core in range(first, first + 4))  # noqa: E731
    monkeypatch.setattr(cpu, "topology", lambda: Topology((node(0), node(4)), cache=1 << 20))
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    had = [16]
    monkeypatch.setattr(torch, "get_num_threads", lambda: had[-1])
    monkeypatch.setattr(torch, "set_num_threads", had.append)
    return had


def test_a_thread_for_every_cache_of_weights_and_no_more_than_one_node_has(eight: list[int]) -> None:
    sizes = [0, 1 << 20, 2 << 20, (3 << 20) + 5, 4 << 20, 1 << 30, float("inf")]
    assert [cpu.choose("auto", n) for n in sizes] == [1, 1, 2, 3, 4, 4, 4]


def test_what_the_user_said_counts(eight: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    assert cpu.choose(7, 0) == cpu.choose("7", 0) == 7
    eight.append(3)  # torch.set_num_threads(3)
    assert cpu.choose("auto", 1 << 30) == 3
    assert cpu.choose("auto", 0) == 1
    eight.append(12)
    monkeypatch.setenv("OMP_NUM_THREADS", "12")
    assert cpu.choose("auto", 0) == 12


@pytest.mark.parametrize("threads", ["many", 0, -1, 17, "17"])
def test_numbers_of_threads_that_cannot_be(eight: list[int], threads: str | int) -> None:
    said = "a whole number" if threads == "many" else r"between 1 and 16, for this process may use 8 physical cores in 2 NUMA nodes"
    with pytest.raises(UserError, match=said):
        cpu.choose(threads)


def test_threads_are_given_back(eight: list[int]) -> None:
    with contextlib.suppress(KeyError), cpu.using(2):
        assert eight[-1] == 2
        raise KeyError
    with cpu.using(16), cpu.using(None):
        pass
    assert eight == [16, 2, 16]


def test_pin_takes_one_hyperthread_a_core_and_a_node_where_that_is_enough(eight: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    bound: list[list[int]] = []
    monkeypatch.setattr(cpu, "bind", bound.append)
    for threads in (1, 4, 6, 10):
        cpu.pin(threads)
    assert bound == [[0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system does not bind threads")
def test_every_thread_is_bound_and_later_ones_inherit_it() -> None:
    before, stop = os.sched_getaffinity(0), threading.Event()
    early = threading.Thread(target=stop.wait)
    early.start()
    try:
        cpu.bind([min(before)])
        late = threading.Thread(target=stop.wait)
        late.start()
        assert {frozenset(os.sched_getaffinity(t)) for t in (0, early.native_id or 0, late.native_id or 0)} == {frozenset([min(before)])}
        with pytest.raises(UserError, match="processors 100000 are refused"):
            cpu.bind([100000])
    finally:
        cpu.bind(list(before))
        stop.set()


def test_no_binding_on_other_systems(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("os.sched_setaffinity", raising=False)
    with pytest.raises(UserError, match="does not let a process choose"):
        cpu.bind([0])


def test_this_machine() -> None:
    there = cpu.topology()
    assert 1 <= there.threads() <= there.cores <= len(there.processors)
    assert there.most >= 1
