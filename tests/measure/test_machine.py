"""The machine's description, and contention from readings whose meaning is known."""

import json
from pathlib import Path

import pytest

from hasten.measure import machine


def test_description_is_plain_and_names_the_machine() -> None:
    described = machine.describe("cpu")
    assert json.loads(json.dumps(described)) == described
    assert described["cores"] >= 1
    assert described["memory_bytes"] > 1 << 28
    assert machine.fingerprint(described) == machine.fingerprint(dict(described))
    assert machine.fingerprint(described) != machine.fingerprint({**described, "threads": 99})


@pytest.mark.parametrize(
    ("busy", "stolen", "own", "expected"),
    [(1.0, 0.0, 1.0, False), (1.9, 0.0, 1.0, True), (1.1, 0.1, 1.0, True), (1.1, 0.0, 1.0, False), (0.0, 0.0, 0.0, False)],
)
def test_contended_is_what_others_use_or_the_hypervisor_takes(busy: float, stolen: float, own: float, expected: bool) -> None:
    assert machine.contended((5.0, 1.0, 100.0), (5.0 + busy, 1.0 + stolen, 102.0), own) is expected


def test_too_short_to_tell_is_not_contended() -> None:
    assert not machine.contended((0.0, 0.0, 0.0), (0.04, 0.0, 0.04), 0.0)


def test_reads_the_kernel_s_counters(tmp_path: Path) -> None:
    stat = tmp_path / "stat"
    stat.write_text("cpu  100 0 100 700 0 0 0 0 0 0\ncpu0 1 1 1 1\n")
    with machine.Watch(stat) as watch:
        stat.write_text("cpu  900 0 100 700 0 0 0 0 0 0\n")
    assert watch.contended
    with machine.Watch(tmp_path / "missing") as watch:
        pass
    assert not watch.contended


def test_children_s_seconds_are_not_others(tmp_path: Path) -> None:
    stat, used = tmp_path / "stat", iter([3.0, 11.0])
    stat.write_text("cpu  100 0 100 700 0 0 0 0 0 0\n")
    with machine.Watch(stat, children=lambda: next(used)) as watch:
        stat.write_text("cpu  900 0 100 700 0 0 0 0 0 0\n")
    assert not watch.contended
