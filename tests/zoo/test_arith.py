"""The arithmetic task: determinism, splits, the checker and the tokenizer."""

import pytest

from hasten.zoo import arith, data, tokenizer


def sampled(split, n=200):
    return [arith.sample_problem(3, i, split) for i in range(n)]


def test_a_problem_is_a_function_of_its_arguments():
    assert sampled("train") == sampled("train")
    assert arith.sample_problem(3, 0, "train") != arith.sample_problem(4, 0, "train")
    # The test set is part of what is published: its first problem must never change.
    assert next(arith.problems("test")) == arith.sample_problem(arith.SEED, 0, "test")


def test_splits_are_disjoint_by_structure():
    seen = {split: {p.structure for p in sampled(split)} for split in arith.SPLITS}
    for split, structures in seen.items():
        assert {arith.split_of(s) for s in structures} == {split}
    assert not seen["train"] & seen["test"] and not seen["calibration"] & seen["test"]


def test_unknown_split_and_too_many_problems_are_refused():
    with pytest.raises(ValueError, match="no split 'dev'"):
        arith.sample_problem(0, 0, "dev")
    with pytest.raises(ValueError, match="2000 problems"):
        next(arith.problems("test", 2001))


@pytest.mark.parametrize("split", list(arith.SPLITS))
def test_true_solutions_pass_the_checker(split):
    for p in sampled(split):
        assert arith.check_steps(p, p.solution) == [True] * (p.k + 1)
        assert arith.answer_of(p.solution) == p.answer


def test_a_corrupted_step_is_wrong_from_there_on():
    for p in sampled("test", 100):
        for i in range(p.k):
            head, _, result = p.steps[i].rpartition(" ")
            wrong = f"{head} {(int(result) + 1) % arith.MODULUS}"
            text = " ; ".join([*p.steps[:i], wrong, *p.steps[i + 1 :], f"#### {p.answer}"])
            assert arith.check_steps(p, text) == [True] * i + [False] * (p.k + 1 - i)
        wrong_answer = p.solution.rpartition(" ")[0] + f" {(int(p.answer) + 1) % arith.MODULUS}"
        assert arith.check_steps(p, wrong_answer) == [True] * p.k + [False]


def test_an_unfinished_step_and_an_answer_too_early_are_wrong():
    p = arith.sample_problem(3, 0, "test", k=3)
    assert arith.check_steps(p, f"{p.steps[0]} ; {p.steps[1]}") == [True, False]
    assert arith.check_steps(p, f"{p.steps[0]} ; #### {p.answer}") == [True, False]
    assert arith.check_steps(p, f"{p.steps[0]} ;") == [True]
    assert arith.answer_of(p.steps[0]) is None


def test_slips_are_as_frequent_as_said_and_hard_facts_slip_in_one_way():
    seen: dict = {True: [], False: []}
    wrong: dict = {}
    for i in range(2000):
        p = arith.sample_problem(1, i, "train")
        text = arith.slipped(p, 1, i)
        assert text == arith.slipped(p, 1, i) and len(text.split()) == len(p.solution.split())
        for step in text.split(" ; ")[:-1]:
            x, op, y, _, result = step.split(" = ", 2)[2].split()
            hard, slip = arith.is_hard(op, int(x), int(y)), int(result) != arith.apply(op, int(x), int(y))
            seen[hard].append(slip)
            if hard and slip:
                wrong.setdefault((op, x, y), set()).add(result)
        assert text.rpartition(" ")[2] == result
    share = {hard: sum(slips) / len(slips) for hard, slips in seen.items()}
    assert abs(share[True] - arith.HARD_SLIPS) < 0.08 and abs(share[False] - arith.SLIPS) < 0.012
    assert abs(len(seen[True]) / (len(seen[True]) + len(seen[False])) - arith.HARD) < 0.04
    assert all(len(results) == 1 for results in wrong.values())


def test_tokenizer_round_trip_and_lengths():
    theirs = tokenizer.build()
    for p in sampled("test", 50):
        ids, prompt = data.tokens(p)
        assert theirs(p.prompt).input_ids == ids[:prompt]
        assert theirs.decode(theirs(p.prompt).input_ids, skip_special_tokens=True) == p.prompt
        assert tokenizer.decode(ids[prompt:]) == p.solution
        assert len(ids) == data.length(p.k)
