"""One recipe under test: the closed loop, what is kept, what is not measured twice."""

import json
from pathlib import Path

import pytest
from fake_models import FakeEngine

from hasten.measure import trial as module
from hasten.measure.store import MEASUREMENTS, OUTCOMES, Store
from hasten.measure.trial import Setting, Trial, closed_loop, costs, difference, slowdown
from hasten.recipe import Recipe, Use
from hasten.values import Request, UserError

SMALL, LARGE = Recipe("small"), Recipe("large")


def test_closed_loop_keeps_as_many_in_flight_as_asked() -> None:
    engine = FakeEngine(1.0, 1.0)
    results = dict(closed_loop(engine, ((i, Request(f"say {i}", id=str(i))) for i in range(10)), 3))
    assert list(results) == list(range(10))
    assert engine.most == 3


def test_closed_loop_leaves_nothing_running() -> None:
    engine = FakeEngine(1.0, 1.0)
    loop = closed_loop(engine, ((i, Request("say")) for i in range(10)), 4)
    next(loop)
    loop.close()
    assert engine.idle


def test_a_measurement_has_the_fields_of_the_contract(setting: Setting) -> None:
    trial = Trial(LARGE, setting)
    items = setting.task.items["calibration"]
    trial.time(0, items[-4:])
    trial.answer(items[:50])
    found = json.loads(json.dumps(trial.measurement({})))
    assert {"recipe", "recipe_text", "task", "quality", "cost", "machine", "contended"} <= found.keys()
    assert {"name", "value", "ci", "n"} <= found["quality"].keys()
    assert {"seconds", "ttft", "tpot", "tokens", "forwards", "flops", "bytes", "joules", "peak_bytes", "by_role"} <= found["cost"].keys()
    assert {"p95_ttft", "p95_tpot"} <= found["cost"].keys()
    assert found["cost"]["seconds"] == pytest.approx(4.0)
    assert found["cost"]["by_role"]["target"]["generated"] == 5
    assert found["quality"]["ci"][0] <= found["quality"]["value"] <= found["quality"]["ci"][1]


def test_what_was_measured_is_not_measured_again(setting: Setting) -> None:
    items = setting.task.items["calibration"]
    first = Trial(LARGE, setting)
    first.answer(items[:20])
    first.time(0, items[-2:])
    again = Trial(LARGE, Setting(setting.task, setting.load, Store(setting.store.directory), {}, 1, "stamp"))
    assert again.outcomes == first.outcomes
    assert costs(again.times) == costs(first.times)
    again.answer(items[:20])
    again.time(0, items[-2:])
    assert again._loaded is None  # nothing was loaded as nothing was missing
    again.answer(items[:30])
    assert len(again.loaded.engine.log) == 10  # type: ignore[attr-defined]


@pytest.mark.parametrize("other", ["stamp 2", "recipe", "split"])
def test_other_settings_reuse_nothing(setting: Setting, other: str) -> None:
    Trial(LARGE, setting).answer(setting.task.items["calibration"][:5])
    changed = Setting(setting.task, setting.load, setting.store, {}, 1, "another" if other == "stamp 2" else "stamp")
    trial = Trial(SMALL if other == "recipe" else LARGE, changed, "test" if other == "split" else "calibration")
    assert not trial.outcomes


def test_an_interrupted_run_keeps_what_it_had(setting: Setting) -> None:
    trial = Trial(LARGE, setting)
    trial.loaded.engine.fail_after = 7  # type: ignore[attr-defined]
    with pytest.raises(KeyboardInterrupt):
        trial.answer(setting.task.items["calibration"][:50])
    assert trial.loaded.engine.idle
    path = setting.store.directory / OUTCOMES
    path.write_text(path.read_text() + '{"kind": "answer", "key"')  # killed in the middle of a line
    again = Trial(LARGE, Setting(setting.task, setting.load, Store(setting.store.directory), {}, 1, "stamp"))
    assert len(again.outcomes) == 7
    again.answer(setting.task.items["calibration"][:50])
    lines = path.read_text().splitlines()
    assert len(lines) == 51
    assert sum(line.endswith("}") for line in lines) == 50


def test_the_first_timed_request_is_not_the_engine_s_first(setting: Setting) -> None:
    engines: list[FakeEngine] = []

    def load(recipe: Recipe):
        loaded = setting.load(recipe)
        engines.append(loaded.engine)  # type: ignore[arg-type]
        return loaded

    trial = Trial(LARGE, Setting(setting.task, load, setting.store, {}, 2, "stamp"))
    trial.time(0, setting.task.items["calibration"][:8])
    assert [len(e.log) for e in engines] == [2, 8]  # warmed up, then timed on a fresh cache
    assert engines[1].most == 2


def test_paired_difference_and_slowdown(setting: Setting) -> None:
    small, large = (Trial(r, setting) for r in (SMALL, LARGE))
    items = setting.task.items["calibration"]
    for t in (small, large):
        t.answer(items[:200])
        for block in range(6):
            t.time(block, items[block * 4 : block * 4 + 4])
    gap = difference(large, small, {})
    assert gap.low > 0.1
    ratio = slowdown(large, small)
    assert (ratio.value, ratio.low, ratio.n) == (4.0, 4.0, 6)


def test_costs_of_nothing_are_unknown_and_joules_need_every_request() -> None:
    assert costs([])["seconds"] is None
    line = {**module.plain_usage(_result()), "joules": 2.0}
    assert costs([line, line])["joules"] == 2.0
    assert costs([line, {**line, "joules": None}])["joules"] is None


def _result():
    engine = FakeEngine(1.0, 1.0)
    return next(closed_loop(engine, [(0, Request("say"))], 1))[1]


def test_a_full_disk_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(UserError, match=f"{MEASUREMENTS}: cannot be written .No space left on device"):
        store.publish({"a": 1})


def test_a_forbidden_directory_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        Store(tmp_path / "file" / "out")


def test_use_options_are_part_of_the_key(setting: Setting) -> None:
    keys = {Trial(Recipe("small", (Use("vote", {"n": n}),)), setting).key for n in (4, 5)}
    assert len(keys) == 2
