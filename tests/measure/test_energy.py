"""Counters from a directory shaped like /sys/class/powercap."""

from pathlib import Path

import pytest

from hasten.measure.energy import EnergyMeter, find_counters


@pytest.fixture
def powercap(tmp_path: Path) -> Path:
    for zone, name in (("intel-rapl:0", "package-0"), ("intel-rapl:0:0", "core"), ("intel-rapl:0:1", "dram"), ("intel-rapl:1", "psys")):
        (tmp_path / zone).mkdir()
        (tmp_path / zone / "name").write_text(name + "\n")
        (tmp_path / zone / "max_energy_range_uj").write_text("10000000\n")
        (tmp_path / zone / "energy_uj").write_text("4000000\n")
    return tmp_path


def test_packages_and_memory_are_counted_once(powercap: Path) -> None:
    with EnergyMeter(powercap, gpu=False) as energy:
        for zone in ("intel-rapl:0", "intel-rapl:0:0", "intel-rapl:0:1", "intel-rapl:1"):
            (powercap / zone / "energy_uj").write_text("6500000")
    assert energy.joules == pytest.approx(5.0)
    assert "RAPL" in energy.reason


def test_a_counter_that_wraps(powercap: Path) -> None:
    with EnergyMeter(powercap, gpu=False) as energy:
        (powercap / "intel-rapl:0" / "energy_uj").write_text("1000000")
    assert energy.joules == pytest.approx(7.0)


def test_none_with_a_reason_where_there_is_no_counter(tmp_path: Path) -> None:
    with EnergyMeter(tmp_path, gpu=False) as energy:
        pass
    assert energy.joules is None
    assert "no energy counter" in energy.reason


def test_none_with_a_reason_where_it_is_forbidden(powercap: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = Path.read_text

    def forbidden(path: Path, *args: object) -> str:
        if path.name == "energy_uj":
            raise PermissionError(path)
        return read(path)

    monkeypatch.setattr(Path, "read_text", forbidden)
    counters, why = find_counters(powercap, gpu=False)
    assert not counters
    assert "root only" in why


def test_none_with_a_reason_where_it_is_broken(powercap: Path) -> None:
    (powercap / "intel-rapl:0" / "energy_uj").write_text("")
    assert "cannot be read" in find_counters(powercap, gpu=False)[1]


def test_this_machine_gives_a_number_or_a_reason() -> None:
    with EnergyMeter() as energy:
        sum(range(10_000))
    assert energy.reason
    assert energy.joules is None or energy.joules >= 0
