"""Best-of-n: the same choice as by brute force, and no more asked of the reward model than the choice needs."""

import itertools
import math
from dataclasses import dataclass, field

import pytest
from fake_engine import FakeEngine

from hasten.engine import run
from hasten.rng import integer, uniform
from hasten.strategies import best_of_n
from hasten.strategies.drive import Drive
from hasten.values import Request, Result, Sampling, UserError

CUT = "length"


@dataclass
class Asked:
    """A best-of-n over samples (text, rewards of its steps, finish reason) by sample index; equal texts are equal tokens."""

    samples: list[tuple]
    steps: object = lambda request: 1
    reward_steps: object = lambda request: 1
    engines: dict = field(init=False)

    def __post_init__(self):
        self.engines = {
            "target": FakeEngine(self.draw, self.steps),
            "reward": FakeEngine(self.judge, self.reward_steps, role="reward"),
        }

    def draw(self, request):
        text, _, *cut = self.samples[request.sample]
        return Result(text, tuple(map(ord, text)), finish_reason=cut[0] if cut else "stop", prompt_tokens=(1, 2, 3))

    def judge(self, request):
        assert request.score
        assert request.score_from == 3
        text = "".join(map(chr, request.prompt[3:]))
        return Result(finish_reason="scored", scores=next(tuple(rewards) for t, rewards, *_ in self.samples if t == text))

    def best(self, **options):
        strategy = best_of_n.build(best_of_n.Options(n=len(self.samples), reward="zoo:r", **options))
        return run(Drive(self.engines, strategy), {"k": Request("p")})["k"]


AGGREGATES = {"last": lambda r: r[-1], "min": min, "prod": math.prod, "mean": lambda r: sum(r) / len(r)}


def brute_force(samples, aggregate, weighted):
    """The chosen text, from the definition."""
    pool = [(t, AGGREGATES[aggregate](r)) for t, r, *cut in samples if not cut and "####" in t]
    pool = pool or [(t, AGGREGATES[aggregate](r)) for t, r, *_ in samples]
    answers = {t.split("####")[-1] for t, _ in pool}
    if len(answers) == 1 and "####" in pool[0][0]:
        return pool[0][0]
    if weighted and "####" in pool[0][0]:
        totals = {a: sum(v for t, v in pool if t.split("####")[-1] == a) for a in answers}
        top = max(totals.values())
        pool = [(t, v) for t, v in pool if totals[t.split("####")[-1]] > top - 1e-9]
    return next(t for t, v in pool if v == max(v for _, v in pool))


def drawn_at_random(case):
    """n samples whose answers, rewards, endings and repetitions are drawn; equal texts have equal rewards."""
    samples, n = [], 2 + integer(6, case, "n")
    for i in range(n):
        kind = integer(10, case, i, "kind")
        if kind == 0 and samples:
            samples.append(samples[integer(len(samples), case, i, "again")])
            continue
        text = f"{i} so ? " if kind == 1 else f"{i} so #### {integer(3, case, i, 'answer')}"
        rewards = [round(uniform(case, i, j, "reward"), 3) for j in range(1 + integer(3, case, i, "steps"))]
        samples.append((text, rewards, CUT) if kind == 2 else (text, rewards))
    return samples


@pytest.mark.parametrize(("aggregate", "weighted"), list(itertools.product(AGGREGATES, (False, True))))
def test_the_choice_is_that_of_brute_force(aggregate, weighted):
    unlike_first = 0
    for case in range(40):
        samples = drawn_at_random(case)
        fast = Asked(samples, lambda r, c=case: 1 + integer(5, c, r.sample), lambda r: 1 + len(r.prompt) % 3)
        result = fast.best(aggregate=aggregate, weighted=weighted, extract="hash")
        assert result.text == brute_force(samples, aggregate, weighted), samples
        unlike_first += result.text != samples[0][0]
    assert unlike_first > 10


def test_the_highest_reward_wins_and_ties_go_to_the_lower_index():
    assert Asked([("#### 1", [0.2]), ("#### 2", [0.9]), ("#### 3", [0.5])]).best().text == "#### 2"
    tied = Asked([("#### 1", [0.2]), ("#### 2", [0.9]), ("#### 3", [0.9])], steps=lambda r: 9 - r.sample).best()
    assert tied.text == "#### 2"
    assert tied.trace["chosen"] == 1
    assert tied.trace["rewards"] == (0.2, 0.9, 0.9)


def test_weighted_sums_by_answer_and_returns_its_best_sample():
    samples = [("a #### 1", [0.9]), ("b #### 2", [0.5]), ("c #### 2.0", [0.6])]
    assert Asked(samples).best().text == "a #### 1"
    assert Asked(samples).best(weighted=True).text == "c #### 2.0"


def test_aggregates_differ_where_they_should():
    samples = [("a #### 1", [0.1, 0.9]), ("b #### 2", [0.5, 0.6]), ("c #### 3", [0.7, 0.4, 0.75])]
    best = {name: Asked(samples).best(aggregate=name).text[0] for name in AGGREGATES}
    assert best == {"last": "a", "min": "b", "prod": "b", "mean": "c"}


@pytest.mark.parametrize("weighted", [False, True])
def test_unfinished_or_unreadable_samples_never_beat_a_finished_answer(weighted):
    asked = Asked([("cut #### 7", [0.99], CUT), ("no answer", [0.98]), ("x #### 1", [0.1]), ("y #### 2", [0.2])])
    result = asked.best(weighted=weighted)
    assert result.text == "y #### 2"
    assert result.trace["unparsed"] == 2
    assert len(asked.engines["reward"].asked) == 2
    assert result.trace["rewards"] == (None, None, 0.1, 0.2)


@pytest.mark.parametrize("weighted", [False, True])
def test_where_nothing_is_finished_the_rewards_decide(weighted):
    result = Asked([("cut #### 7", [0.5], CUT), ("cut #### 8", [0.6], CUT), ("no answer", [0.55])]).best(weighted=weighted)
    assert result.text == "cut #### 8"


def test_samples_that_agree_need_no_reward_model():
    asked = Asked([("b #### 7", [0.1]), ("a #### 7.0", [0.9]), ("cut #### 5", [0.9], CUT)])
    result = asked.best()
    assert result.text == "b #### 7"
    assert asked.engines["reward"].asked == []
    assert "reward" not in result.usage.by_role
    assert result.trace["scored"] == 0


def test_identical_samples_are_scored_once():
    asked = Asked([("a #### 7", [0.4]), ("b #### 8", [0.9]), ("a #### 7", [0.4]), ("a #### 7", [0.4])])
    assert asked.best().trace["rewards"] == (0.4, 0.9, 0.4, 0.4)
    assert len(asked.engines["reward"].asked) == 2
    assert asked.best().text == "b #### 8"
    assert asked.best(weighted=True).text == "a #### 7"


def test_scoring_starts_with_the_first_disagreement_and_waits_for_no_sample():
    asked = Asked([("a #### 1", [0.1]), ("b #### 1", [0.9]), ("c #### 2", [0.3]), ("d #### 1", [0.2])], lambda r: 1 + r.sample)
    strategy = best_of_n.build(best_of_n.Options(n=4, reward="zoo:r"))
    drive, reward = Drive(asked.engines, strategy), asked.engines["reward"]
    drive.add("k", Request("p"))
    scored = []
    while not drive.idle:
        drive.step()
        scored.append(len(reward.asked))
    assert scored[:4] == [0, 0, 3, 4]


def test_a_sample_without_tokens_costs_nothing_and_is_worth_nothing():
    asked = Asked([("", []), ("", [])])
    assert asked.best().text == ""
    assert asked.engines["reward"].asked == []


def test_usage_has_both_roles():
    usage = Asked([("a #### 1", [0.1]), ("b #### 2", [0.9])]).best().usage
    assert {role: cost.forwards for role, cost in usage.by_role.items()} == {"target": 2, "reward": 2}


def test_n_and_many_at_once_are_as_each_alone():
    samples = [(f"{i} #### {i % 3}", [uniform(i, "r")]) for i in range(12)]

    def answers(requests, rows):
        asked = Asked(samples, lambda r: 1 + r.sample % 4)
        for engine in asked.engines.values():
            engine.rows = rows
        strategy = best_of_n.build(best_of_n.Options(n=3, reward="zoo:r"))
        return {key: [r.text for r in (first, *first.others)] for key, first in run(Drive(asked.engines, strategy), requests).items()}

    four = answers({"k": Request("p", Sampling(n=4))}, 100)["k"]
    assert four == [answers({"k": Request("p", sample=i)}, 1)["k"][0] for i in range(4)]
    assert answers({i: Request("p", sample=i) for i in range(4)}, 2) == {i: [text] for i, text in enumerate(four)}


def test_cancelling_in_the_middle_frees_both_engines():
    asked = Asked([("a #### 1", [0.1]), ("b #### 2", [0.9]), ("c #### 3", [0.9])], lambda r: 1 + 3 * (r.sample == 2), lambda r: 9)
    drive = Drive(asked.engines, best_of_n.build(best_of_n.Options(n=3, reward="zoo:r")))
    drive.add("k", Request("p"))
    drive.step()
    drive.step()
    drive.cancel("k")
    assert all(not engine.waiting for engine in asked.engines.values())
    (event,) = drive.step()
    assert event.result.finish_reason == "cancelled"
    assert {role: cost.forwards for role, cost in event.result.usage.by_role.items()} == {"target": 1 + 1 + 2, "reward": 1 + 1}
    assert drive.idle


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"n": 0}, "n=0"),
        ({"aggregate": "lst"}, "did you mean 'last'"),
        ({"extract": "nmber"}, "extract="),
        ({"temperature": 1e9}, "temperature"),
    ],
)
def test_bad_options_are_refused_by_name(options, words):
    with pytest.raises(UserError, match=words):
        best_of_n.Options(reward="zoo:r", **options)


def test_the_reward_model_must_be_named():
    assert best_of_n.roles(best_of_n.Options(reward="zoo:r")) == {"reward": "zoo:r"}
    assert "reward=MODEL" in best_of_n.why_not(best_of_n.Options(), None)
    assert best_of_n.why_not(best_of_n.Options(reward="zoo:r"), None) is None
    for needs_it in (best_of_n.roles, best_of_n.build):
        with pytest.raises(UserError, match="reward=MODEL"):
            needs_it(best_of_n.Options())
