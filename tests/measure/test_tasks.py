"""Tasks from files: what is read, what is refused and with which words, and how they are split."""

import json
from pathlib import Path

import pytest

from hasten.measure.quality import grade, outcome, same_prefix, summary
from hasten.measure.tasks import Item, load_task, read_task
from hasten.values import Result, UserError


def written(path: Path, *lines: object) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n", "utf-8")
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "prompts.jsonl"


def every(file: Path) -> dict[str, str | None]:
    return {str(i.prompt): i.answer for items in read_task(file).items.values() for i in items}


def test_own_fields_gsm8k_and_math(file: Path) -> None:
    assert every(written(file, {"prompt": "p", "answer": 7}, {"prompt": "q", "answer": " 1,000 "})) == {"p": "7", "q": "1000"}
    assert every(written(file, {"question": "q", "answer": "so 2 + 2\n#### 4"}, {"question": "r", "answer": "#### 5"}))["q"] == "4"
    lines = [{"problem": p, "solution": rf"thus $\boxed{{{a}}}$.", "level": "Level 5"} for p, a in (("x", r"\frac{1}{2}"), ("y", "3"))]
    assert every(written(file, *lines)) == {"x": "1/2", "y": "3"}


def test_chat_messages_without_answers(file: Path) -> None:
    message = [{"role": "user", "content": "hi"}]
    task = read_task(written(file, {"messages": message}, {"messages": [*message, *message]}))
    assert task.quality == "agreement"
    assert {len(i.prompt) for items in task.items.values() for i in items} == {1, 2}


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ((), "holds no items"),
        (({"prompt": "a"}, '{"prompt": '), "line 2: not JSON"),
        (({"prompt": "a"}, "", [1]), "line 3: must be a JSON object, not list"),
        (({"text": "a"},), "line 1: no 'prompt'"),
        (({"prompt": ""},), "line 1: 'prompt' must be text"),
        (({"messages": [{"role": "user"}]},), "line 1: 'messages' must be"),
        (({"prompt": "a", "answer": "1"}, {"prompt": "b"}), "line 2: this item has no answer but line 1 has"),
        (({"prompt": "a"}, {"prompt": "b", "answer": 2}), "line 2: this item has an answer but line 1 has none"),
        (({"problem": "a", "solution": "forgot"},), "line 1: the solution has no"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence_with_the_line(file: Path, lines: tuple[object, ...], words: str) -> None:
    with pytest.raises(UserError) as error:
        read_task(written(file, *lines))
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_unknown_task_names_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'arith'"):
        load_task("aritth")


def test_split_is_a_property_of_each_line(file: Path) -> None:
    lines = [{"prompt": f"p{i}"} for i in range(60)]
    one = read_task(written(file, *lines, lines[0])).items
    other = read_task(written(file, *reversed(lines[:40]))).items
    assert sum(map(len, one.values())) == 60  # the repeated line counts once
    assert 15 < len(one["test"]) < 45
    for split in one:
        known = {item.id for item in one[split]}
        assert {item.id for item in other[split]} <= known


def test_few_lines_still_fill_both_splits(file: Path) -> None:
    for n in range(1, 6):
        items = read_task(written(file, *({"prompt": f"p{i}"} for i in range(n)))).items
        assert items["test"]
        assert items["calibration"] or n == 1


def test_arith_has_disjoint_splits_and_its_solutions_are_right() -> None:
    from hasten.zoo import arith

    task = load_task("arith")
    prompts = {split: {i.prompt for i in items} for split, items in task.items.items()}
    assert not prompts["calibration"] & prompts["test"]
    problem, item = next(arith.problems("test")), task.items["test"][0]
    assert grade(item, Result(problem.solution), task) == 1.0
    assert grade(item, Result(problem.solution.replace("####", "##")), task) == 0.0


def test_python_has_disjoint_splits_and_no_answers() -> None:
    from hasten import zoo

    try:
        zoo.path("python-s")
    except UserError:
        pytest.skip("the tokenizer is not here")
    task = load_task("python")
    prompts = {split: {i.prompt for i in items} for split, items in task.items.items()}
    assert not task.answered and not prompts["calibration"] & prompts["test"]
    assert load_task("python").digest == task.digest


def test_every_item_has_a_random_stream_of_its_own() -> None:
    task = load_task("arith")
    seeds = {task.request(item).sampling.seed for item in task.items["test"][:500]}
    assert len(seeds) == 500
    assert min(seeds) >= 0


def test_agreement_without_answers(file: Path) -> None:
    task = read_task(written(file, {"prompt": "a"}, {"prompt": "b"}))
    tokens = {"a": ((1, 2, 3, 4), (1, 2, 9, 4)), "b": ((5,), (5,))}
    reference, changed = ({name: outcome(Item(name, name), Result(tokens=t[k]), task) for name, t in tokens.items()} for k in (0, 1))
    found = summary(task.quality, changed, reference, [0.1, 0.3])
    assert (found["name"], found["value"], found["n"]) == ("agreement", 0.5, 2)
    assert found["token_agreement"]["value"] == pytest.approx(0.75)
    assert found["kl"]["value"] == pytest.approx(0.2)
    assert same_prefix((), ()) == 1.0
    assert same_prefix((1,), (1, 2)) == 0.5
