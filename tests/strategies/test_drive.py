"""The drive: many generators over shared engines, what they cost, how they end."""

from dataclasses import replace

import pytest
from fake_engine import FakeEngine, words

from hasten.engine import run
from hasten.strategies import vote
from hasten.strategies.drive import Drive
from hasten.usage import Cost, add_costs
from hasten.values import Ask, Event, Request, Result, Sampling, UserError

SEEDED = Sampling(temperature=1.0, seed=3)


def one(request):
    """The plainest strategy: ask the target once."""
    done = yield Ask({"only": request})
    return done["only"]


def cascade(request):
    """Ask the small model; where it is not sure of its answer, ask the large one too."""
    small = yield Ask({"small": replace(request, role="small")})
    if small["small"].text != "unsure":
        return small["small"]
    large = yield Ask({"large": replace(request, role="large")})
    return large["large"]


def first_of_two(request):
    """Ask twice, take what is there first, cancel the other."""
    done = yield Ask({i: replace(request, sample=i) for i in range(2)})
    (key,) = done
    more = yield Ask({"more": request}, cancel=[1 - key])
    assert list(more) == ["more"]
    return done[key]


def drain(engine):
    """Step until idle: all events."""
    events = []
    while not engine.idle:
        events += engine.step()
    return events


def test_a_drive_is_an_engine_and_needs_no_private_knowledge_to_run():
    engine = FakeEngine()
    results = run(Drive({"target": engine}, one), {i: Request(f"p{i}", SEEDED) for i in range(20)})
    assert [r.text for r in results.values()] == [words(Request(f"p{i}", SEEDED)).text for i in range(20)]
    assert engine.idle


def test_a_cascade_is_ten_lines_and_pays_only_for_the_models_it_asks():
    small = FakeEngine(lambda r: Result("unsure" if "hard" in r.prompt else "easy answer", (1,)), role="small")
    large = FakeEngine(lambda r: Result("large answer", (1, 2)), role="large")
    results = run(Drive({"small": small, "large": large}, cascade), {p: Request(p) for p in ("easy", "hard")})
    assert [r.text for r in results.values()] == ["easy answer", "large answer"]
    assert set(results["easy"].usage.by_role) == {"small"}
    assert set(results["hard"].usage.by_role) == {"small", "large"}
    assert len(large.asked) == 1


def test_strategies_share_the_engines_without_a_barrier():
    engine = FakeEngine(steps=lambda r: 50 if r.prompt == "slow" else 1)
    drive = Drive({"target": engine}, one)
    for name in ("slow", "a", "b"):
        drive.add(name, Request(name))
    first = {event.key for event in drive.step() if event.result}
    assert first == {"a", "b"}
    assert len(drain(drive)) == 2  # the tokens and the result of "slow"
    assert engine.waiting == {}


def test_an_answer_does_not_depend_on_what_runs_beside_it():
    asked = {i: Request(f"p{i}", SEEDED) for i in range(12)}
    build = vote.build(vote.Options(n=5))
    alone = {key: run(Drive({"target": FakeEngine()}, build), {key: request})[key] for key, request in asked.items()}
    for rows in (1, 3, 100):
        together = run(Drive({"target": FakeEngine(rows=rows)}, build), asked)
        for key in asked:
            assert replace(together[key], usage=alone[key].usage) == alone[key]
            assert together[key].usage.by_role == alone[key].usage.by_role


def test_usage_is_the_sum_of_all_that_was_asked():
    engine = FakeEngine()
    results = run(Drive({"target": engine}, vote.build(vote.Options(n=4))), {"a": Request("abc"), "b": Request("abcde")})
    assert results["a"].usage.total == Cost(prompt=12, generated=24, forwards=1 + 2 + 3 + 1)
    assert results["b"].usage.by_role["target"].prompt == 20
    assert results["a"].usage.peak_bytes == 30
    usage = results["a"].usage
    assert usage.seconds == usage.ttft > 0
    assert usage.tpot == 0


def test_cancelled_requests_are_paid_for_but_not_handed_on():
    engine = FakeEngine(steps=lambda r: 1 if r.sample == 0 else 9)
    result = run(Drive({"target": engine}, first_of_two), {"k": Request("ab")})["k"]
    assert result.finish_reason == "stop"
    assert result.usage.total.forwards == 1 + 1 + 1  # the winner, one step of the loser, and `more`
    assert result.usage.total.prompt == 6
    assert len(engine.cancelled) == 1


def test_what_still_runs_when_a_strategy_returns_is_cancelled_and_paid_for():
    def fastest(request):
        done = yield Ask({i: replace(request, sample=i) for i in range(3)})
        return done[0]

    engine = FakeEngine(steps=lambda r: 2 if r.sample == 0 else 9)
    result = run(Drive({"target": engine}, fastest), {"k": Request("ab")})["k"]
    assert result.usage.total.forwards == 2 + 2 + 2
    assert engine.idle


def test_an_engine_that_says_nothing_of_a_cancelled_request_is_not_waited_for():
    engine = FakeEngine(steps=lambda r: 1 if r.sample == 0 else 9, emits_cancelled=False)
    drive = Drive({"target": engine}, first_of_two)
    assert run(drive, {"k": Request("ab")})["k"].usage.total.forwards == 2
    assert drive.idle


def test_cancel_closes_the_generator_and_brings_one_last_event():
    closed = []

    def forever(request):
        try:
            while True:
                yield Ask({"a": request, "b": replace(request, sample=1)})
        finally:
            closed.append(request.prompt)

    engine = FakeEngine(steps=lambda r: 5)
    drive = Drive({"target": engine}, forever)
    drive.add("k", Request("ab"))
    drive.step()
    drive.cancel("k")
    assert closed == ["ab"]
    assert engine.waiting == {}
    events = drive.step()
    assert [(e.key, e.result.finish_reason) for e in events] == [("k", "cancelled")]
    assert events[0].result.usage.total.forwards == 2
    assert drive.idle
    drive.cancel("k")
    drive.cancel("never there")
    assert drive.idle


def test_cancel_at_once_and_the_key_again():
    drive = Drive({"target": FakeEngine()}, one)
    drive.add("k", Request("ab"))
    with pytest.raises(ValueError, match="in use"):
        drive.add("k", Request("ab"))
    drive.cancel("k")
    assert [e.result.finish_reason for e in drain(drive)] == ["cancelled"]
    assert run(drive, {"k": Request("ab")})["k"].finish_reason == "stop"


def test_cancel_leaves_the_others_alone():
    engine = FakeEngine(steps=lambda r: 4)
    drive = Drive({"target": engine}, one)
    for key in "abc":
        drive.add(key, Request(key, SEEDED))
    drive.step()
    drive.cancel("b")
    results = {e.key: e.result for e in drain(drive) if e.result}
    assert {key: r.finish_reason for key, r in results.items()} == {"a": "stop", "b": "cancelled", "c": "stop"}
    assert results["c"].text == words(Request("c", SEEDED)).text


def test_n_runs_the_strategy_n_times_on_streams_of_their_own():
    engine = FakeEngine()
    drive = Drive({"target": engine}, vote.build(vote.Options(n=3)))
    result = run(drive, {"k": Request("p", SEEDED.but(n=4), sample=2)})["k"]
    assert sorted(r.sample for r in engine.asked) == list(range(6, 18))
    assert all(r.sampling.n == 1 for r in engine.asked)
    singles = [run(drive, {"k": Request("p", SEEDED, sample=2 + i)})["k"] for i in range(4)]
    assert [r.text for r in (result, *result.others)] == [r.text for r in singles]
    assert [r.usage.by_role for r in (result, *result.others)] == [r.usage.by_role for r in singles]
    assert len(result.others) == 3


def test_events_stream_the_tokens_of_each_sample():
    drive = Drive({"target": FakeEngine()}, one)
    drive.add("k", Request("p", SEEDED.but(n=3)))
    events = drain(drive)
    result = events[-1].result
    streamed = {e.sample: e.tokens for e in events[:-1]}
    assert streamed == dict(enumerate(r.tokens for r in (result, *result.others)))


def test_drives_nest():
    engine = FakeEngine()
    inner = Drive({"target": engine}, vote.build(vote.Options(n=3)))
    outer = Drive({"target": inner}, vote.build(vote.Options(n=2)))
    result = run(outer, {"k": Request("ab", SEEDED)})["k"]
    assert sorted(r.sample for r in engine.asked) == list(range(6))
    assert result.usage.total.prompt == 12
    assert result.trace["n"] == 2


def test_one_engine_may_serve_several_roles():
    engine = FakeEngine(steps=lambda r: 2)
    drive = Drive({"small": engine, "large": engine}, cascade)
    drive.add("k", Request("p"))
    assert drive.step() == []  # stepped once, not twice
    assert [e.key for e in drive.step()] == ["k", "k"]


def test_a_strategy_may_answer_without_asking():
    def constant(request):
        if not request.prompt:
            yield Ask()
        return Result("known")

    drive = Drive({}, constant)
    drive.add("k", Request("p"))
    assert not drive.idle
    assert [e.result.text for e in drive.step()] == ["known"]
    assert drive.idle


def test_kept_requests_are_named_by_the_strategys_own_keys_and_freed_at_the_end():
    def two_steps(request):
        yield Ask({"root": replace(request, keep=True)})
        yield Ask({"child": replace(request, parent="root", keep=True)})
        done = yield Ask({"last": replace(request, parent="child", release=("root",))})
        return done["last"]

    engine = FakeEngine()
    run(Drive({"target": engine}, two_steps), {"k": Request("p")})
    root, child, last = engine.asked
    assert child.parent == last.release[0] != "root"
    assert last.parent != child.parent
    assert engine.cancelled == [last.parent]  # released is "root", still kept was "child"
    assert root.keep
    with pytest.raises(ValueError, match="keeps no such request"):
        run(Drive({"target": FakeEngine()}, lambda r: one(replace(r, parent="unknown"))), {"k": Request("p")})


def fails_on(word):
    def strategy(request):
        done = yield Ask({i: replace(request, sample=i) for i in range(3)})
        if word in request.prompt:
            raise KeyError("a bug of the strategy")
        while len(done) < 3:
            done |= yield Ask()
        return done[0]

    return strategy


def test_an_exception_leaves_no_orphans_and_does_not_hurt_the_others():
    engine = FakeEngine()
    drive = Drive({"target": engine}, fails_on("bad"))
    for key in ("good", "bad", "fine"):
        drive.add(key, Request(key, SEEDED))
    with pytest.raises(KeyError) as caught:
        drive.step()
    assert caught.value.__notes__ == ["in the strategy that answers request 'bad'"]
    assert {request.prompt for request, _ in engine.waiting.values()} == {"good", "fine"}
    results = {e.key: e.result for e in drain(drive) if e.result}
    assert set(results) == {"good", "fine"}
    alone = run(Drive({"target": FakeEngine()}, fails_on("bad")), {"good": Request("good", SEEDED)})["good"]
    assert results["good"].text == alone.text
    assert results["good"].usage.by_role == alone.usage.by_role
    assert engine.idle


def test_the_key_of_a_failed_request_is_free_again():
    engine = FakeEngine(steps=lambda r: 1 + 3 * r.sample)
    drive = Drive({"target": engine}, fails_on("bad"))
    drive.add("k", Request("bad"))
    with pytest.raises(KeyError):
        drive.step()
    drive.add("k", Request("good"))
    results = [e for e in drain(drive) if e.result]
    assert [e.result.finish_reason for e in results] == ["stop"]
    assert results[0].result.usage.total.prompt == 12  # three times "good", nothing of "bad"


@pytest.mark.parametrize("steps", [lambda sample: 1, lambda sample: 1 + sample, lambda sample: 5 - 2 * (sample % 2)])
def test_all_samples_of_a_failed_request_go(steps):
    def second_fails(request):
        done = yield Ask({"only": request})
        if request.sample == 1:
            raise KeyError
        return done["only"]

    engine = FakeEngine(steps=lambda r: steps(r.sample))
    drive = Drive({"target": engine}, second_fails)
    drive.add("k", Request("p", Sampling(n=3)))
    with pytest.raises(KeyError):
        drain(drive)
    assert drain(drive) == []
    assert drive.idle
    assert engine.idle


def yields(*asks):
    def strategy(request):
        for ask in asks:
            _ = yield ask  # not `yield from`: it would send the results to the tuple
        return Result()

    return strategy


@pytest.mark.parametrize(
    ("strategy", "error", "words"),
    [
        (yields(Ask({"x": Request("p", role="rewrad")})), UserError, "role 'rewrad'.*did you mean 'reward'"),
        (yields(Ask()), RuntimeError, "wait for ever"),
        (yields({"x": Request("p")}), TypeError, "must yield an Ask, not dict"),
        (yields(Ask({"x": Request("p")}), Ask({"x": Request("p")}, cancel=["x"]), Ask(cancel=["x"])), RuntimeError, "wait for ever"),
        (yields(Ask({"x": Request("p"), "y": Request("p", sample=2)}), Ask({"y": Request("p")})), ValueError, "'y' again"),
        (lambda request: (yield Ask({"x": request})), TypeError, "must return a Result, not dict"),
    ],
)
def test_a_strategy_that_breaks_the_rules_is_told_how(strategy, error, words):
    engines = {"target": FakeEngine(), "reward": FakeEngine(role="reward")}
    drive = Drive(engines, strategy)
    with pytest.raises(error, match=words):
        run(drive, {"k": Request("p")})
    assert all(not engine.waiting for engine in engines.values())
    assert drain(drive) == []
    assert drive.idle


def test_an_engine_that_refuses_a_request_is_heard():
    class Refuses(FakeEngine):
        def add(self, key, request):
            if request.sample == 2:
                raise UserError("too long")
            super().add(key, request)

    engine = Refuses()
    drive = Drive({"target": engine}, vote.build(vote.Options(n=4)))
    with pytest.raises(UserError, match="too long"):
        drive.add("k", Request("p"))
    assert engine.waiting == {}
    assert drain(drive) == []


def test_an_engine_that_loses_a_request_is_found_out():
    engine = FakeEngine()
    drive = Drive({"target": engine}, one)
    drive.add("k", Request("p"))
    engine.waiting.clear()
    with pytest.raises(RuntimeError, match="without answering.*'only'"):
        drive.step()


@pytest.mark.parametrize("field", [{"score": True}, {"parent": "x"}, {"keep": True}, {"release": ("x",)}])
def test_what_only_one_model_can_do_is_refused_by_name(field):
    with pytest.raises(UserError, match=f"`{next(iter(field))}`"):
        Drive({"target": FakeEngine()}, one).add("k", Request("p", **field))


def test_events_of_others_on_a_shared_engine_are_ignored():
    class Chatty(FakeEngine):
        def step(self):
            return [Event("not ours", result=Result("x")), *super().step()]

    assert run(Drive({"target": Chatty()}, one), {"k": Request("p", SEEDED)})["k"].text == words(Request("p", SEEDED)).text


def test_hundreds_of_strategies_at_once():
    engine = FakeEngine(rows=10**6)
    requests = {i: Request(f"p{i}", SEEDED) for i in range(200)}
    results = run(Drive({"target": engine}, vote.build(vote.Options(n=6))), requests)
    assert len(results) == 200
    assert add_costs(r.usage for r in results.values())["target"].forwards == 200 * (1 + 2 + 3) * 2
