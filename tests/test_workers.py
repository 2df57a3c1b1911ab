"""Workers: the same answers and counts as one engine; and between processes, dispatch, refusals, ends, interrupts, nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import fake_worker
import hasten
from fake_worker import ANSWER, BLOCK, BREAK, DIE, HANG, PRINT, REFUSE, UNSENDABLE
from hasten import cpu
from hasten.cpu import Topology
from hasten.engine import run
from hasten.values import Key, Request, Result, Sampling, UserError
from hasten.workers import Workers
from tiny_directory import save

FAKE = (sys.executable, "-P", fake_worker.__file__)


def start(n: int = 2, **setup: Any) -> Workers:
    workers = Workers([{"index": i, **setup} for i in range(n)], command=FAKE)
    workers.wait()
    return workers


@pytest.fixture
def two() -> Iterator[Workers]:
    with start() as workers:
        yield workers


def ask(*kind: int, **more: Any) -> Request:
    return Request(kind or (ANSWER,), **more)


def answers(workers: Workers, keys: set[Key], errors: int = 0) -> dict[Key, Any]:
    """Results of these requests, and so many errors under "errors"; fails where they do not come."""
    done: dict[Key, Any] = {"errors": []}
    until = time.monotonic() + 20
    while (done.keys() - {"errors"} < keys or len(done["errors"]) < errors) and time.monotonic() < until:
        try:
            done |= {event.key: event.result for event in workers.step() if event.result}
        except UserError as error:
            done["errors"].append(str(error))
    assert done.keys() - {"errors"} == keys
    assert len(done["errors"]) == errors
    return done if errors else {key: done[key] for key in keys}


def processes(workers: Workers) -> list[int]:
    return [replica.process.pid for replica in workers._replicas]


def alive(process: int) -> bool:
    """Whether there is such a process; a zombie counts."""
    return (
        Path(f"/proc/{process}").exists() if Path("/proc/self").exists() else subprocess.run(["kill", "-0", str(process)]).returncode == 0
    )


# --- between processes -------------------------------------------------------------------------------------------------------------


def test_requests_go_where_least_is_to_be_done(two: Workers) -> None:
    two.add("big", ask(HANG, sampling=Sampling(n=4)))
    for key in "abc":
        two.add(key, ask())
    assert {r.trace["index"] for r in answers(two, {*"abc"}).values()} == {1}
    assert not two.idle
    two.cancel("big")
    assert answers(two, {"big"})["big"].finish_reason == "cancelled"
    assert two.idle
    assert two.step() == []


def test_children_go_to_their_parent(two: Workers) -> None:
    two.add("busy", ask(HANG))
    two.add("parent", ask(ANSWER, 7, keep=True))
    assert answers(two, {"parent"})["parent"].trace["index"] == 1
    two.cancel("busy")
    answers(two, {"busy"})
    for key in ("x", "y"):  # replica 0 has nothing to do
        two.add(key, ask(ANSWER, parent="parent"))
    assert {r.trace["index"] for r in answers(two, {"x", "y"}).values()} == {1}
    with pytest.raises(UserError, match="66 positions, but the cache holds 64"):  # the parent's 3 tokens count
        two.add("long", ask(*[ANSWER] * 13, parent="parent", sampling=Sampling(max_tokens=50)))
    two.add("last", ask(release=("parent", "nobody")))
    answers(two, {"last"})
    with pytest.raises(UserError, match="parent 'parent' is not a finished request that was kept"):
        two.add("z", ask(parent="parent"))


def test_what_cannot_be_served_is_refused_when_it_is_added(two: Workers) -> None:
    for request, words in [
        (ask(200), "vocabulary of 100"),
        (ask(sampling=Sampling(max_tokens=64)), "65 positions"),
        (Request(()), "empty"),
    ]:
        with pytest.raises(UserError, match=words):
            two.add("a", request)
    with pytest.raises(UserError, match=r"id: it holds a bytes, which cannot be sent"):
        two.add("a", ask(id=b"x"))
    two.add("a", ask(HANG))
    with pytest.raises(ValueError, match="key 'a' is in use"):
        two.add("a", ask())


def test_what_a_worker_refuses_is_said_once_and_the_others_go_on(two: Workers) -> None:
    two.add("bad", ask(REFUSE, id="seven"))
    two.add("good", ask())
    assert answers(two, {"good"}, errors=1)["errors"] == ["request seven: not today"]
    assert two.idle
    two.add("odd", ask(UNSENDABLE))
    [error] = answers(two, set(), errors=1)["errors"]
    assert error.startswith("request odd: its answer holds a object")
    assert two.idle


def test_noise_on_stdout_is_no_message(capfd: pytest.CaptureFixture[str]) -> None:
    with start(1) as workers:
        workers.add("a", ask(PRINT))
        assert answers(workers, {"a"})
    assert "noise\nmore noise" in capfd.readouterr().err


def test_a_step_is_short_and_seconds_are_those_of_the_caller(two: Workers) -> None:
    two.add("a", ask(HANG))
    began = time.perf_counter()
    for _ in range(5):
        assert two.step() == []
    assert 0.03 < time.perf_counter() - began < 2
    two.cancel("a")
    usage = answers(two, {"a"})["a"].usage
    assert usage.seconds > 0.03  # the worker said 0.001
    assert usage.ttft == pytest.approx(usage.seconds - 0.001)
    assert two.processor_seconds() > 0 or sys.platform != "linux"


def test_a_worker_that_dies_gives_one_error_and_the_rest_goes_on(two: Workers) -> None:
    dying = processes(two)[0]
    for key, kind in (("a", DIE), ("b", ANSWER), ("c", HANG)):  # a and c on the first
        two.add(key, ask(kind, keep=True))
    found = answers(two, {"b"}, errors=1)
    assert found["errors"] == ["worker 0 was killed by SIGKILL (the memory was full, perhaps): requests a, c are lost"]
    assert not alive(dying)
    assert two.idle
    two.add("d", ask())
    assert answers(two, {"d"})["d"].trace["index"] == 1
    two.add("e", ask(BREAK))
    assert answers(two, set(), errors=1)["errors"] == ["worker 1 ended with code 1 (KeyError: 'a bug'): request e is lost"]
    with pytest.raises(UserError, match=r"^no worker is left: worker 0 was killed by SIGKILL .*; worker 1 ended"):
        two.add("f", ask())


def test_closing_ends_the_processes_whatever_they_do() -> None:
    workers = start()
    ids = processes(workers)
    workers.add("a", ask(BLOCK))
    workers.add("b", ask(HANG))
    workers.step()
    began = time.monotonic()
    workers.close()
    workers.close()
    with pytest.raises(UserError, match="the workers were closed: requests a, b are lost"):
        workers.step()
    assert workers.idle
    with pytest.raises(UserError, match="no worker is left: they were closed"):
        workers.add("c", ask())
    assert not any(map(alive, ids))
    assert time.monotonic() - began < 4


def test_forgotten_workers_end_too() -> None:
    workers = start(1)
    [process] = processes(workers)
    del workers
    assert not alive(process)


@pytest.mark.parametrize(("error", "words"), [("user", "^no such model$"), ("bug", "^KeyError: 'bug'$")])
def test_what_cannot_be_loaded_is_said_and_nothing_is_left(error: str, words: str) -> None:
    workers = Workers([{"index": 0}, {"index": 1, "error": error}], command=FAKE)
    ids = processes(workers)
    with pytest.raises(UserError, match=words):
        workers.wait()
    assert not any(map(alive, ids))


def test_a_program_that_is_no_worker() -> None:
    workers = Workers([{}], command=(sys.executable, "-c", "raise SystemExit(3)"))
    with pytest.raises(UserError, match="worker 0 ended with code 3"):
        workers.wait()


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -9), (signal.SIGTERM, -15)])
def test_no_process_outlives_a_caller_that_is_interrupted(sent: signal.Signals, code: int, tmp_path: Path) -> None:
    program = (
        "import signal, sys; from hasten.workers import Workers; from hasten.values import Request\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # tests that a shell runs in the background inherit it ignored
        f"w = Workers([{{}}, {{}}], command={FAKE!r}); w.wait(); w.add('a', Request(({HANG},)))\n"
        "print(*[r.process.pid for r in w._replicas], flush=True)\n"
        "try:\n    while True: w.step()\nexcept KeyboardInterrupt: sys.exit(130)\n"
    )
    path = {"PYTHONPATH": os.pathsep.join(sys.path)}
    caller = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, **path})
    assert caller.stdout and caller.stderr
    ids = [int(word) for word in caller.stdout.readline().split()]
    assert len(ids) == 2
    caller.send_signal(sent)
    assert caller.wait(20) == code
    assert b"Traceback" not in caller.stderr.read()
    until = time.monotonic() + 10
    while any(map(alive, ids)) and time.monotonic() < until:
        time.sleep(0.01)
    assert not any(map(alive, ids))
    caller.stdout.close(), caller.stderr.close()


# --- real models -------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("workers") / "model", hidden_size=64, num_hidden_layers=3, max_position_embeddings=200)


@pytest.fixture(scope="module")
def both(directory: Path) -> Iterator[tuple[Any, Any]]:
    """A recipe with a strategy, in this process and in two workers; a schedule that no clock decides, so that counts can be compared."""
    recipe = f"{directory} +ngram(schedule=constant) +vote(n=3,temperature=1.0,extract=last-number)"
    processors = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]
    nodes = (((processors[0],),), ((processors[-1],),))  # as if each was a node
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(cpu, "topology", lambda: Topology(nodes))
        with hasten.load(recipe, workers="auto", dtype="float64") as spread:
            yield hasten.load(recipe, dtype="float64"), spread


PROMPTS = ["a b c", "d e f g 1", "h i", "j k l m n o", "1 2 3", "4 5 6 7 8 9"]
TIMES = {"seconds": 0.0, "ttft": 0.0, "tpot": 0.0, "peak_bytes": 0}


def counted(result: Result, *shared: str) -> Result:
    """A result without its times, and without counts that depend on the rest of the batch."""
    roles = {role: replace(cost, **dict.fromkeys(shared, 0)) for role, cost in result.usage.by_role.items()}
    return replace(result, usage=replace(result.usage, by_role=roles, **TIMES), others=tuple(counted(r, *shared) for r in result.others))


def test_the_same_answers_and_counts_as_one_engine(both: tuple[Any, Any]) -> None:
    sampling = Sampling(max_tokens=12, temperature=0.9, seed=5, ignore_eos=True, logprobs=1, n=2)
    requests: dict[int, Request] = {i: Request(p, replace(sampling, seed=i), id=str(i)) for i, p in enumerate(PROMPTS)}
    one, several = (run(lm.engines["target"], requests) for lm in both)
    for i in requests:
        assert counted(several[i], "bytes") == counted(one[i], "bytes")
    for i in requests:  # one at a time, whatever shares a pass is the same: bytes too
        for lm in both:
            lm.forget()
        one, several = (run(lm.engines["target"], {i: requests[i]}) for lm in both)
        assert counted(several[i]) == counted(one[i])


def test_strategies_run_inside_the_workers(both: tuple[Any, Any]) -> None:
    requests = {i: Request(p, Sampling(max_tokens=8, seed=i)) for i, p in enumerate(PROMPTS)}
    one, several = (run(lm.engine, requests) for lm in both)
    for i in requests:
        assert counted(several[i], "bytes", "reused", "flops", "forwards") == counted(one[i], "bytes", "reused", "flops", "forwards")
        assert several[i].trace["n"] == 3
    with pytest.raises(UserError, match="`keep` asks one model, not a strategy"):
        both[1].engine.add("k", Request("a", keep=True))


def test_scores_and_branches_go_past_the_strategy(both: tuple[Any, Any]) -> None:
    one, several = (lm.score(["a b c", [5, 6, 7, 8]]) for lm in both)
    assert [r.scores for r in one] == [r.scores for r in several]
    found = []
    for lm in both:
        engine = lm.engines["target"]
        [parent] = run(engine, {"p": Request("a b c d", Sampling(max_tokens=3, ignore_eos=True), keep=True)}).values()
        [child] = run(engine, {"c": Request("d", Sampling(max_tokens=3), parent="p", release=("p",))}).values()
        assert child.usage.by_role["target"].reused == 6  # of seven, the last that was generated is not in the cache
        found.append((parent.tokens, child.prompt_tokens, child.tokens))
        with pytest.raises(UserError, match="not a finished request that was kept"):
            engine.add("d", Request("d", parent="p"))
    assert found[0] == found[1]


def test_each_is_on_its_own_processors_and_has_its_threads(both: tuple[Any, Any]) -> None:
    if hasattr(os, "sched_getaffinity"):
        bound = [os.sched_getaffinity(p) for p in processes(both[1].engine)]
        assert bound == [{core[0] for core in node} for node in cpu.topology().nodes]
    assert both[1].threads == 1
    assert both[1].generate("a b", Sampling(max_tokens=2))[0].tokens == both[0].generate("a b", Sampling(max_tokens=2))[0].tokens


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"workers": 3}, "workers=3: must lie between 1 and 2, for this process may use 2 physical cores in 1 NUMA node"),
        ({"workers": "many"}, "must be 'auto' or a whole number"),
        ({"workers": 2, "threads": 2}, "threads=2 in each of 2 workers: 1 at most"),
        ({"workers": 2, "constraint": object()}, "constraint=<object>: a Python object cannot be sent"),
        ({"workers": 2, "models": hasten.load.__globals__["Models"]()}, "models=<Models>"),
        ({"workers": 2, "device": "cuda"}, "workers are replicas on processors"),
    ],
)
def test_what_cannot_be_spread_is_refused_by_name(
    directory: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], words: str
) -> None:
    monkeypatch.setattr(cpu, "topology", lambda: Topology((((0,), (1,)),)))
    with pytest.raises(UserError, match=words):
        hasten.load(str(directory), **options)
