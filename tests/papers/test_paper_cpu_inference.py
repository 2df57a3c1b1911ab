"""The CPU paper: its arithmetic, what its claims read, and real workers on a tiny model."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest

from hasten.cpu import Topology
from hasten.papers import cpu_inference
from hasten.papers.cpu_inference import ALL_ROWS, HALF_ALL_ROWS, HALF_SHARE, MANY, ONE_ROW, PAPER, STOCK_LOOP, WORKERS, arms, collect
from hasten.papers.paper import document
from hasten.papers.run import Measuring
from hasten.papers.worker import Job, Server, Worker
from hasten.values import UserError

SHAPE = cpu_inference.QUICK_SHAPE | {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SHAPE |= {"num_attention_heads": 2, "num_key_value_heads": 2, "dtype": "float32"}
SETTINGS = {
    "repeats": 6,
    "requests": 8,
    "many": 12,
    "single": 2,
    "prompt": 5,
    "tokens": 3,
    "shape": SHAPE,
    "cores": 2,
    "parts": [1, 1],
    "nodes": 1,
}
RATES = {STOCK_LOOP: 10.0, ONE_ROW: 12.0, ALL_ROWS: 240.0, MANY: 250.0, HALF_ALL_ROWS: 200.0, HALF_SHARE: 150.0, WORKERS: 297.0}


def lines(**more: Any) -> list[dict[str, Any]]:
    return [{"what": what, "repeat": i, "rate": rate * (1 + i), **more} for what, rate in RATES.items() for i in range(6)]


def claims(evidence: list[dict[str, Any]], **settings: Any) -> dict[str, dict[str, Any]]:
    return {claim["id"]: claim for claim in document(PAPER, evidence, SETTINGS | settings, {})["claims"]}


def test_arithmetic_needs_no_run() -> None:
    found = claims([])
    assert found["power"]["measured"] == pytest.approx(51.04, abs=0.01)
    low, high = found["power"]["ci"]
    assert 50.9 < low < found["power"]["measured"] < high < 51.1
    assert found["power"]["verdict"] == found["four-workers"]["verdict"] == "fails"
    assert found["four-workers"]["measured"] == pytest.approx(0.0, abs=1e-9)
    assert found["batching"]["verdict"] == "undecided"


def test_published_figures() -> None:
    found = claims([])
    assert found["batching"]["published"] == 18.0
    assert found["more-threads"]["published"] == 9.3  # a median of +4.7 % for half as many threads again


def test_claims_read_the_arms_they_name() -> None:
    found = claims(lines(joules=100.0))
    assert found["batching"]["measured"] == 24.0 and found["batching"]["verdict"] == "holds"
    assert found["batching-alone"]["measured"] == 20.0
    assert found["more-requests"]["verdict"] == "fails"
    assert found["more-threads"]["measured"] == pytest.approx(20.0)  # 1.2 times on twice the cores
    assert found["workers-in-a-node"]["measured"] == pytest.approx(0.99) and found["workers-in-a-node"]["verdict"] == "holds"
    assert found["workers-or-threads"]["measured"] == pytest.approx(297 / 240)
    assert found["energy"]["measured"] == 100.0 and found["energy"]["verdict"] == "holds"
    assert found["workers-on-nodes"]["verdict"] == "not testable here"


def test_what_a_machine_cannot_show_is_said() -> None:
    found = claims(lines(no_meter="no energy counter"), cores=1, parts=[1])
    assert "no energy counter" in found["energy"]["how"]
    for name in ("more-threads", "more-threads-one-row", "workers-in-a-node", "workers-or-threads"):
        assert found[name]["verdict"] == "not testable here" and "single core" in found[name]["how"]
    across = claims(lines(), nodes=2)
    assert across["workers-on-nodes"]["verdict"] == "holds"
    assert across["workers-in-a-node"]["verdict"] == "not testable here"


def test_rivals_get_the_same_work() -> None:
    work = arms(SETTINGS, 3)
    assert dataclasses.replace(work[STOCK_LOOP][1], rows=1) == work[ONE_ROW][1]
    assert work[ALL_ROWS][1] == work[HALF_ALL_ROWS][1]
    assert work[WORKERS] == ("every", work[HALF_SHARE][1]) and work[WORKERS][1].requests == 4
    assert set(arms(SETTINGS | {"parts": [1]}, 0)) == {STOCK_LOOP, ONE_ROW, ALL_ROWS, MANY}


@pytest.mark.parametrize(
    ("nodes", "cores", "parts"),
    [
        ((((0,), (1,), (2,), (3,)),), [0, 1, 2, 3], 2),
        ((((0, 1),),), [0], 1),
        ((((0,), (1,)), ((2,), (3,)), ((4,), (5,))), [0, 1, 2, 3, 4, 5], 3),
    ],
)
def test_parts_are_nodes_or_halves(monkeypatch: pytest.MonkeyPatch, nodes: Any, cores: list[int], parts: int) -> None:
    monkeypatch.setattr(cpu_inference, "topology", lambda: Topology(nodes))
    assert cpu_inference.cores() == cores
    found = cpu_inference.parts()
    assert len(found) == parts and sorted(core for part in found for core in part) == cores


def test_settings_are_plain_and_fixed() -> None:
    quick, full = cpu_inference.settings(False), cpu_inference.settings(True)
    assert quick.keys() == full.keys()
    assert full["requests"] == quick["requests"] == 100
    assert quick["shape"]["dtype"] in ("float32", "bfloat16")


def test_a_worker_does_the_tokens_it_is_asked_for() -> None:
    server = Server(SHAPE)
    for rows in (0, 1, 8):
        done = server.serve(Job(3, 5, 4, rows, 0))
        assert done["tokens"] == 12 and done["seconds"] > 0 and done["parameters"] < 40_000


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    made = Worker(cpu_inference.cores()[:1], SHAPE)
    yield made
    made.close()


def test_a_process_answers_job_after_job(worker: Worker) -> None:
    for rows in (0, 4):
        worker.send(Job(2, 5, 4, rows, 0))
        assert worker.receive()["tokens"] == 8


def test_a_worker_that_dies_is_one_sentence() -> None:
    broken = Worker([], {})  # no cores at all: it ends before it has loaded anything
    with pytest.raises(UserError, match="a worker process ended"):
        broken.receive()
    broken.close()


def test_a_round_measures_every_arm(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    """One process stands for all workers, so that the test starts no more of them."""
    monkeypatch.setattr(cpu_inference, "Worker", lambda cores, shape: worker)
    monkeypatch.setattr(worker, "stop", lambda: None)
    monkeypatch.setattr(worker, "close", lambda: None)
    monkeypatch.setattr(cpu_inference, "parts", lambda: [[0]])
    run = Measuring({**SETTINGS, "repeats": 1, "parts": [1]}, "stamp")
    collect(run)
    assert {line["what"] for line in run.lines} == {STOCK_LOOP, ONE_ROW, ALL_ROWS, MANY}
    assert all(line["rate"] > 0 and ("joules" in line or line["no_meter"]) for line in run.lines)
