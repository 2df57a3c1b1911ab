"""Majority vote: who wins, who does not vote, which samples are asked for."""

from collections import Counter

import pytest
from fake_engine import FakeEngine, words

from hasten.engine import run
from hasten.strategies import vote
from hasten.strategies.drive import Drive
from hasten.values import Request, Result, Sampling, UserError


def voted(texts, steps=lambda request: 1, **options):
    """The result of a vote over these texts by sample index, and the engine."""
    engine = FakeEngine(lambda r: Result(texts[r.sample], (r.sample,)), steps)
    strategy = vote.build(vote.Options(n=len(texts), **options))
    return run(Drive({"target": engine}, strategy), {"k": Request("p", Sampling(max_tokens=9, seed=5, stop=("x",)))})["k"], engine


@pytest.mark.parametrize(
    ("answers", "chosen"),
    [
        ([1], 0),
        ([1, 2, 2], 1),
        ([2, 1, 1, 2], 1),  # both reach two, 1 reaches it first
        ([1, 2, 1, 2], 0),
        ([3, 1, 2], 0),
        (["", "", 4], 2),
        ([5, "", "", ""], 0),
        ([1, 2, 3, 3, 2, 1], 2),
        (["1,000", "7", "1000.0", "$7", "1000"], 0),
    ],
)
def test_most_votes_win_and_ties_go_to_the_first_to_get_there(answers, chosen):
    texts = [f"#### {answer}" if answer else "I do not know" for answer in answers]
    result, _ = voted(texts)
    assert result.tokens == (chosen,)
    assert result.text == texts[chosen]
    assert result.trace["unparsed"] == answers.count("")
    assert result.trace["n"] == len(answers)
    assert sum(result.trace["answers"].values()) + result.trace["unparsed"] == len(answers)


def test_the_order_in_which_samples_finish_does_not_matter():
    texts = [f"#### {answer}" for answer in (2, 1, 1, 2, 3)]
    forwards, _ = voted(texts, lambda r: 1 + r.sample)
    backwards, _ = voted(texts, lambda r: 9 - r.sample)
    assert forwards.tokens == backwards.tokens == (1,)
    assert forwards.trace == backwards.trace == {"answers": {"2": 2, "1": 2, "3": 1}, "unparsed": 0, "n": 5}


def test_no_answer_at_all_gives_the_first_sample():
    result, _ = voted(["nothing", "to see"])
    assert result.text == "nothing"
    assert result.trace == {"answers": {}, "unparsed": 2, "n": 2}


def test_the_winner_has_as_many_votes_as_any():
    strategy = vote.build(vote.Options(n=9))
    for seed in range(50):
        request = Request("p", Sampling(seed=seed))
        result = run(Drive({"target": FakeEngine()}, strategy), {0: request})[0]
        counts = Counter(words(Request("p", Sampling(seed=seed), sample=i)).text[5:] for i in range(9))
        assert result.trace["answers"] == counts
        assert counts[result.text[5:]] == max(counts.values())


def test_samples_are_separate_requests_on_streams_that_never_collide():
    _, engine = voted(["#### 1"] * 4, temperature=0.6, top_p=0.9)
    assert [r.sample for r in engine.asked] == [0, 1, 2, 3]
    expected = Sampling(max_tokens=9, seed=5, stop=("x",), temperature=0.6, top_p=0.9)
    assert {r.sampling.n for r in engine.asked} == {1}
    assert all(r.sampling == expected for r in engine.asked)
    other = FakeEngine()
    run(Drive({"target": other}, vote.build(vote.Options(n=4))), {"k": Request("p", sample=3)})
    assert [r.sample for r in other.asked] == [12, 13, 14, 15]


def test_the_way_to_find_answers_is_an_option_or_the_tasks_own():
    assert voted(["a: 1, b: 5", "a: 2, b: 5", "a: 2, b: 4"])[0].tokens == (0,)  # auto takes the last number
    assert voted(["a: 1, b: 5", "a: 2, b: 5", "a: 2, b: 4"], extract=r"a: (\d)")[0].tokens == (1,)

    class Task:
        def extract(self, text):
            return text[:1]

    strategy = vote.build(vote.Options(n=3), Task())
    engine = FakeEngine(lambda r: Result(["x 1", "y 1", "y 2"][r.sample]))
    assert run(Drive({"target": engine}, strategy), {0: Request("p")})[0].trace["answers"] == {"x": 1, "y": 2}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"n": 0}, "n=0"),
        ({"n": 2.5}, "n=2.5"),
        ({"temperature": -1}, "temperature=-1"),
        ({"top_p": 0}, "top_p=0"),
        ({"extract": "hsh"}, "did you mean 'hash'"),
        ({"extract": "(a)(b)"}, "exactly one group, not 2"),
        ({"extract": "(a"}, "not a regular expression"),
    ],
)
def test_bad_options_are_refused_by_name(options, words):
    with pytest.raises(UserError, match=words):
        vote.Options(**options)


def test_a_vote_needs_no_other_model():
    assert vote.roles(vote.Options()) == {}
    assert vote.why_not(vote.Options(), None) is None
