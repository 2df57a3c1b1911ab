"""The whole of `pick` over fake models, where the right answer is known, and once over a real model in a user's directory."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from fake_models import FakeLoaded, fake_load, make_task

from hasten.measure import machine, rounds, trial
from hasten.measure import measure as measuring
from hasten.measure import pick as picking
from hasten.measure.candidates import Candidates, candidates, parse_use
from hasten.measure.measure import measure
from hasten.measure.pick import pick
from hasten.recipe import Recipe, Use, load_recipe
from hasten.values import UserError


class Lines:
    """A progress that remembers."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def log(self, text: str) -> None:
        self.lines.append(text)

    def update(self, name: str, done: float, total: float) -> None:
        assert 0 <= done <= total


VOTES = [Use("vote", {"n": n}) for n in (2, 8, 16)]


@pytest.fixture
def faked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two models, three votes and n-gram speculation, whose skills and seconds are written down in `fake_models`."""
    first = [Recipe(model, uses) for uses in ((), *((vote,) for vote in VOTES)) for model in ("large", "small")]
    plan = Candidates((*first, Recipe("small", (Use("vote", {"temperature": 1.0}),))), (Use("ngram"),), Recipe("large"))
    monkeypatch.setattr(picking, "candidates", lambda *args: plan)
    monkeypatch.setattr(measuring, "loader", lambda *args: fake_load)
    monkeypatch.setattr(trial, "weights", lambda recipe: [])
    monkeypatch.setattr(machine, "describe", lambda device, threads: {"cpu": "none", "threads": 1})


def run(out: Path, **changes: Any) -> dict[str, Any]:
    return pick(**{"task": make_task(), "out": str(out), "progress": Lines(), **changes})


@pytest.mark.usefixtures("faked")
class TestPick:
    def test_best_for_the_price_of_the_baseline(self, tmp_path: Path) -> None:
        document = run(tmp_path)
        # 4 s is the budget; large +vote(n=16) +ngram costs 5.4 s, large +vote(n=8) +ngram 4.2 s, large +vote(n=2) +ngram 3.3 s
        assert document["budget"] == {"seconds": pytest.approx(4.0)}
        assert document["picked"]["recipe_text"] in ("large +ngram +vote(n=2)", "large +ngram")
        assert document["baseline"]["recipe_text"] == "large"
        assert document["picked"]["cost"]["seconds"] <= 4.0
        assert document["picked"]["split"] == document["baseline"]["split"] == "test"
        assert document["picked"]["quality"]["n"] == 400
        assert document["picked"]["recipe_text"] in document["why"]
        assert document["why"].count(". ") == 0

    def test_a_larger_budget_buys_more_votes_and_the_gain_is_beyond_the_noise(self, tmp_path: Path) -> None:
        document = run(tmp_path, budgets={"seconds": 6.0})
        assert document["picked"]["recipe_text"] == "large +ngram +vote(n=16)"
        assert document["confirmation"]["ci"][0] > 0
        assert document["confirmation"]["slowdown"] == pytest.approx(1.35)

    def test_files_are_whole_and_agree(self, tmp_path: Path) -> None:
        document = run(tmp_path)
        assert load_recipe(tmp_path / "recipe.json").to_json() == document["picked"]["recipe"]
        lines = [json.loads(line) for line in (tmp_path / "measurements.jsonl").read_text().splitlines()]
        assert {m["recipe_text"] for m in document["measurements"]} <= {m["recipe_text"] for m in lines}
        page = (tmp_path / "report.html").read_text()
        data = json.loads(re.search(r"const D = (.*);\n", page)[1])  # type: ignore[index]
        assert data["picked"]["text"] == document["picked"]["recipe_text"]
        assert len(data["points"]) == len(document["measurements"])
        assert not re.search(r"(?:src|href)=|https?://(?!www\.w3\.org/2000/svg)|@import|fetch\(", page)
        assert not list(tmp_path.glob("*.tmp"))
        json.dumps(document, allow_nan=False)

    def test_the_hopeless_answer_less(self, tmp_path: Path) -> None:
        items = {m["recipe_text"]: m["quality"]["n"] for m in run(tmp_path)["measurements"]}
        assert items["small"] < items["large"] == rounds.ITEMS[-1]

    def test_what_cannot_run_is_refused_with_its_reason_and_the_rest_goes_on(self, tmp_path: Path) -> None:
        document = run(tmp_path)
        assert [r["why_not"] for r in document["refused"]] == ["small +vote(temperature=1.0): cannot run here"]

    def test_target_takes_the_cheapest_that_reaches_it(self, tmp_path: Path) -> None:
        document = run(tmp_path, targets={"accuracy": 0.55})
        assert document["picked"]["recipe_text"].startswith("small")
        assert "16" in document["picked"]["recipe_text"]

    @pytest.mark.parametrize(
        ("aim", "words"),
        [
            ({"budgets": {"seconds": 0.1}}, "nothing fits seconds=0.1: the least seconds measured is 1, of small"),
            ({"budgets": {"joules": 5}}, "joules cannot be measured on this machine|the least joules"),
            ({"targets": {"accuracy": 1.0}}, "no recipe reaches 1: the best measured is"),
            ({"budgets": {"secnds": 1}}, "unknown budget 'secnds'; did you mean 'seconds'"),
            ({"budgets": {"seconds": -1}}, "must be more than 0"),
            ({"targets": {"agreement": 0.5}}, "the quality of task 'echo' is 'accuracy'"),
            ({"targets": {"accuracy": 90}}, "must lie between 0 and 1"),
            ({"concurrency": 0}, "concurrency=0"),
        ],
    )
    def test_impossible_wishes_are_one_sentence_and_leave_no_recipe(self, tmp_path: Path, aim: dict[str, Any], words: str) -> None:
        with pytest.raises(UserError, match=words):
            run(tmp_path, **aim)
        assert not (tmp_path / "recipe.json").exists()

    def test_interrupted_and_resumed_gives_the_same(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        count = 0

        def load(recipe: Recipe) -> FakeLoaded:
            nonlocal count
            count += 1
            loaded = fake_load(recipe)
            loaded.engine.fail_after = 5 if count == 26 else None
            return loaded

        monkeypatch.setattr(measuring, "loader", lambda *args: load)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "a")
        kept = len((tmp_path / "a" / "outcomes.jsonl").read_text().splitlines())
        assert kept > 20
        monkeypatch.setattr(measuring, "loader", lambda *args: fake_load)
        resumed, whole = run(tmp_path / "a"), run(tmp_path / "b")
        assert resumed["picked"]["recipe_text"] == whole["picked"]["recipe_text"]
        assert resumed["picked"]["quality"] == whole["picked"]["quality"]

    def test_a_finished_run_is_read_more_than_run(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        loads: list[Recipe] = []

        def load(recipe: Recipe) -> FakeLoaded:
            loads.append(recipe)
            return fake_load(recipe)

        monkeypatch.setattr(measuring, "loader", lambda *args: load)
        first = run(tmp_path)["picked"]
        count = len(loads)
        assert run(tmp_path)["picked"]["recipe_text"] == first["recipe_text"]
        assert len(loads) - count < count / 2

    def test_out_of_time_it_still_answers(self, tmp_path: Path) -> None:
        document = run(tmp_path, minutes=0.0)
        assert document["picked"]["recipe_text"] == "large"
        assert "stays as it is" in document["why"]

    def test_speedups_are_tried_on_the_model(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        lines = Lines()
        setting = measuring.make_setting(make_task(), 1, str(tmp_path), "auto", "auto", "auto")
        assert picking.applying(setting, Recipe("large"), lines) == []
        assert "no C++ compiler" in lines.lines[0]
        setting.load = lambda recipe: fake_load(recipe, compiler=True)
        assert picking.applying(setting, Recipe("large", (Use("native", {"rows": 8}),)), lines) == [Use("native")]

    def test_first_line_is_the_baseline(self, tmp_path: Path) -> None:
        lines = Lines()
        run(tmp_path, progress=lines)
        assert lines.lines[1].endswith("large")  # after what does not apply here

    def test_dry_run_measures_nothing(self, tmp_path: Path) -> None:
        document = run(tmp_path / "none", dry_run=True)
        texts = [row["recipe_text"] for row in document["candidates"]]
        assert {"large +ngram +vote(n=16)", "large +native +ngram +vote(n=16)"} & set(texts)
        assert not (tmp_path / "none").exists()


def test_candidates_of_a_directory() -> None:
    plan = candidates("./model", ("ngram(k=6)", "+vote(n=2)"))
    texts = [str(recipe) for recipe in plan.first]
    assert texts == ["./model", "./model +vote(n=4)", "./model +vote", "./model +vote(n=16)", "./model +vote(n=2)"]
    assert Recipe("./model", (Use("ngram", {"k": 6}), Use("vote", {"n": 2}))) in plan.all
    assert not [r for r in candidates("./model", answered=False).all if any(use.name == "vote" for use in r.uses)]


def test_speedups_go_with_everything_but_the_models_themselves() -> None:
    plan = candidates("./model", ("vote(n=2)",), speedups=[Use("native")])
    plain = [str(r) for r in plan.first if "native" not in str(r)]
    assert plain == ["./model"] == [str(plan.baseline)]
    assert {"./model +native", "./model +native +vote(n=2)"} <= {str(r) for r in plan.first}
    assert "./model +native +ngram" in {str(r) for r in plan.all}
    named = candidates("./model +native(rows=8)", (), speedups=[Use("native")])
    assert all(str(r).count("native") == 1 for r in named.all)


def test_lossless_keeps_only_what_keeps_the_output() -> None:
    plan = candidates("./model", ("vote(n=2)",), lossless=True)
    assert {use.name for recipe in plan.all for use in recipe.uses} == {"ngram"}


def test_a_recipe_keeps_what_it_says() -> None:
    plan = candidates("./model +vote(n=3)", ())
    assert all(Use("vote", {"n": 3}) in recipe.uses for recipe in plan.all)


@pytest.mark.parametrize("text", ["ngrm", "ngram +vote", ""])
def test_with_takes_one_known_technique(text: str) -> None:
    with pytest.raises(UserError):
        parse_use(text)


def test_a_directory_with_a_chat_template_and_prompts_without_answers(chat_model: Path, tmp_path: Path) -> None:
    """No label anywhere: quality is agreement with the unmodified model, and speculation that is identical agrees in full."""
    task = tmp_path / "prompts.jsonl"
    task.write_text("\n".join(json.dumps({"messages": [{"role": "user", "content": f"say {i % 10} a b c {i}"}]}) for i in range(24)))
    found = measure(
        [Recipe(str(chat_model)), Recipe(str(chat_model), (Use("ngram"),))], task=str(task), n=6, blocks=1, out=str(tmp_path / "o")
    )
    for measurement in found:
        assert measurement["quality"]["name"] == "agreement"
        assert measurement["quality"]["value"] == 1.0
        assert measurement["quality"]["kl"]["value"] == 0.0
        assert measurement["cost"]["seconds"] > 0


def test_an_unlike_model_disagrees(chat_model: Path, tmp_path: Path) -> None:
    """The negative control: another model's answers are not identical and its KL is above zero."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    other, task = tmp_path / "other", tmp_path / "prompts.jsonl"
    model = AutoModelForCausalLM.from_pretrained(chat_model)
    torch.manual_seed(5)
    for weight in model.parameters():
        weight.data += 0.5 * torch.randn_like(weight)
    model.save_pretrained(other)
    AutoTokenizer.from_pretrained(chat_model).save_pretrained(other)
    task.write_text("\n".join(json.dumps({"prompt": f"a b c {i}"}) for i in range(24)))
    same, unlike = measure([Recipe(str(chat_model)), Recipe(str(other))], task=str(task), n=6, blocks=1, out=str(tmp_path / "o"))
    assert unlike["quality"]["value"] < 1.0 == same["quality"]["value"]
    assert unlike["quality"]["kl"]["ci"][0] > 0


def test_pick_on_a_directory_with_a_chat_template(chat_model: Path, tmp_path: Path) -> None:
    task = tmp_path / "qa.jsonl"
    task.write_text("\n".join(json.dumps({"prompt": f"say {i}", "answer": i % 10}) for i in range(20)))
    document = pick(str(chat_model), task=str(task), budgets={"tokens": 1e6}, out=str(tmp_path / "o"), minutes=0.05)
    assert document["picked"]["recipe"]["model"] == str(chat_model)
    assert (tmp_path / "o" / "report.html").is_file()


def test_a_model_that_is_trained_to_draft_for_itself_is_no_candidate() -> None:
    assert {str(r).split()[0] for r in candidates(None).all} == {"zoo:arith-xs", "zoo:arith-s", "zoo:arith-m"}
