"""The command line: what it passes on, what it prints where, and how it ends."""

import errno
import json
import sys
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from hasten import cli
from hasten.answering import SAMPLING, answer
from hasten.cli import app
from hasten.values import Event, Request, Result, Sampling, UserError

MEASURED = {
    "recipe": {"model": "zoo:arith-xs", "techniques": []},
    "recipe_text": "zoo:arith-xs",
    "task": "arith",
    "quality": {"name": "accuracy", "value": 0.5, "ci": [0.4, 0.6], "n": 100},
    "cost": {"seconds": 0.25, "tokens": 30.0, "flops": float("nan"), "joules": None},
    "machine": {},
    "contended": False,
}
PICKED = {"picked": MEASURED, "baseline": MEASURED, "frontier": [MEASURED], "measurements": [MEASURED], "budget": {"seconds": 1.0}}
PICKED |= {"why": "It is the best inside the budget.", "out": "there"}


def hasten(*words, **more):
    return CliRunner().invoke(app, words, **more)


def says(result, sentence, code=2):
    """The run ended with this code and one line on stderr that holds the sentence; nothing on stdout."""
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    [line] = result.stderr.splitlines()
    assert line.startswith("hasten: ")
    assert sentence in line


@pytest.fixture
def calls(monkeypatch):
    """Stand-ins for the library's pick and measure, which note how they were called."""
    seen = []

    def pick(source=None, **options):
        print("noise that some library prints")
        options["progress"].log("measuring")
        options["progress"].update("work", 1, 2)
        seen.append((source, options))
        return PICKED

    def measure(recipes, **options):
        seen.append((recipes, options))
        return [MEASURED]

    monkeypatch.setitem(sys.modules, "hasten.measure.pick", SimpleNamespace(pick=pick))
    monkeypatch.setitem(sys.modules, "hasten.measure.measure", SimpleNamespace(measure=measure))
    return seen


def test_pick_without_arguments(calls):
    assert hasten("pick").exit_code == 0
    [(source, options)] = calls
    del options["progress"]
    assert source is None
    assert options == {
        "task": None, "techniques": (), "budgets": {}, "targets": {}, "lossless": False, "concurrency": 1, "dry_run": False,
        "out": "hasten-out", "template": "auto", "device": "auto", "dtype": "auto", "threads": "auto",
    }  # fmt: skip


def test_pick_passes_everything_on(calls, tmp_path):
    words = ["pick", "m", "--task", "t.jsonl", "--with", "ngram(k=4)", "--with", "vote", "--budget", "seconds=1", "--budget", "flops=2e9"]
    words += ["--target", "accuracy=0.9", "--lossless", "--concurrency", "4", "--dry-run", "--out", str(tmp_path), "--template", "off"]
    assert hasten(*words, "--device", "cpu", "--dtype", "float64", "--threads", "2").exit_code == 0
    [(source, options)] = calls
    del options["progress"]
    assert source == "m"
    assert options == {
        "task": "t.jsonl", "techniques": ("ngram(k=4)", "vote"), "budgets": {"seconds": 1.0, "flops": 2e9}, "targets": {"accuracy": 0.9},
        "lossless": True, "concurrency": 4, "dry_run": True, "out": str(tmp_path), "template": "off", "device": "cpu", "dtype": "float64",
        "threads": "2",
    }  # fmt: skip


def test_json_is_one_document_and_the_rest_is_on_stderr(calls):
    result = hasten("pick", "--json")
    document = json.loads(result.stdout)
    assert document["why"] == PICKED["why"]
    assert document["picked"]["cost"]["flops"] is None  # JSON has no NaN
    assert "measuring" in result.stderr
    assert "noise" in result.stderr


def test_pick_for_people(calls):
    out = hasten("pick").stdout
    assert "picked: zoo:arith-xs" in out
    assert "It is the best inside the budget." in out
    assert "there/report.html" in out


def test_measure(calls):
    result = hasten("measure", "zoo:arith-xs +vote(n=4)", "zoo:arith-xs", "--task", "arith", "--json")
    assert [m["recipe_text"] for m in json.loads(result.stdout)] == ["zoo:arith-xs"]
    [(recipes, options)] = calls
    assert list(map(str, recipes)) == ["zoo:arith-xs +vote(n=4)", "zoo:arith-xs"]
    assert options["task"] == "arith"
    assert "0.4" in hasten("measure", "zoo:arith-xs").stdout


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["pick", "--budget", "1"], "--budget '1': write it as NAME=NUMBER, for example --budget seconds=1"),
        (["pick", "--budget", "seconds=fast"], "'fast' is not a number"),
        (["pick", "--budget", "seconds=-1"], "not below 0"),
        (["pick", "--budget", "seconds=nan"], "must be a finite number"),
        (["pick", "--target", "accuracy=1", "--target", "accuracy=2"], "--target accuracy is given twice"),
        (["measure", "m +vot"], "unknown technique 'vot'; did you mean 'vote'?"),
        (["measure", "m +vote(m=1)"], "unknown option 'm'"),
        (["measure", "none.json"], "none.json: no such recipe file"),
        (["run", "m"], "either --prompt TEXT or --messages FILE"),
        (["run", "m", "--prompt", "x", "--top-p", "2"], "top_p=2.0: must lie between"),
        (["run", "m", "--prompt", "x", "--logit-bias", "5"], "TOKEN=BIAS"),
        (["run", "m", "--messages", "none.json"], "none.json: No such file or directory"),
        (["run", "no/such/place", "--prompt", "x"], "no/such/place"),
        (["run", "zoo:arith-xq", "--prompt", "x"], "did you mean 'arith-xs'?"),
        (["zoo", "train", "arithxs"], "no model 'arithxs'; did you mean 'arith-xs'?"),
        (["zoo", "eval", "arith"], "no model 'arith'"),
    ],
)
def test_what_the_user_can_mend_is_one_sentence(calls, words, sentence):
    says(hasten(*words), sentence)


@pytest.mark.parametrize("words", [["pik"], ["pick", "--bugdet", "seconds=1"], ["pick", "--concurrency", "0"], ["zoo", "trian"]])
def test_wrong_verbs_and_options_end_with_2(words):
    result = hasten(*words)
    assert result.exit_code == 2
    assert result.stdout == ""


def failing(monkeypatch, error):
    def pick(*_, **__):
        raise error

    monkeypatch.setitem(sys.modules, "hasten.measure.pick", SimpleNamespace(pick=pick))


def test_a_full_disk_is_one_sentence(monkeypatch):
    failing(monkeypatch, OSError(errno.ENOSPC, "No space left on device", "out/report.html"))
    says(hasten("pick"), "out/report.html: No space left on device")


def test_a_traceback_on_demand_only(monkeypatch):
    failing(monkeypatch, UserError("no such\n thing"))
    says(hasten("pick"), "no such thing")
    result = hasten("pick", env={"HASTEN_TRACEBACK": "1"})
    assert result.exit_code == 2
    assert "Traceback" in result.stderr


def test_our_own_errors_keep_their_traceback(monkeypatch):
    failing(monkeypatch, ZeroDivisionError())
    assert isinstance(hasten("pick").exception, ZeroDivisionError)


def test_ctrl_c_says_what_was_kept(monkeypatch, tmp_path):
    failing(monkeypatch, KeyboardInterrupt())
    says(hasten("pick", "--out", str(tmp_path)), "interrupted; nothing was measured yet", 130)
    (tmp_path / "measurements.jsonl").write_text("{}\n{}\n")
    says(hasten("pick", "--out", str(tmp_path)), f"2 measurements kept in {tmp_path}/measurements.jsonl", 130)


def test_techniques_as_json():
    rows = {row["name"]: row for row in json.loads(hasten("techniques", "--json").stdout)}
    assert rows["ngram"]["slot"] == "decode"
    assert {"name", "slot", "family", "exactness", "options", "why_not", "paper"} <= rows["ngram"].keys()
    assert rows["ngram"]["options"][0] == {"name": "k", "type": "int", "default": 8, "doc": "tokens proposed at most", "required": False}
    assert rows["ngram"]["why_not"] is None
    assert "reward model" in rows["best-of-n"]["why_not"]
    assert "best-of-n" in hasten("techniques").stdout


def test_every_sampling_field_is_an_option():
    assert set(SAMPLING) == set(Sampling.__dataclass_fields__)
    listed = hasten("run", "--help", env={"COLUMNS": "200"}).stdout
    assert [name for name in SAMPLING if f"--{name.replace('_', '-')}" not in listed] == []


class Scripted:
    """An engine and tokenizer whose tokens are the characters of a text, a few each step."""

    def __init__(self, text, final=None, parts=3):
        self.text, self.final, self.parts, self.requests = text, text if final is None else final, parts, []
        self.engine = self.tokenizer = self
        self.startup = {"load": 1.0, "compile": 7.0}
        self.templated, self.recipe = False, SimpleNamespace(to_json=lambda: {"model": "m", "techniques": []})

    def ask(self, prompt):
        return prompt

    def add(self, key, request):
        self.requests.append(request)
        self.events = [Event(key, tuple(map(ord, self.text[i : i + self.parts]))) for i in range(0, len(self.text), self.parts)]
        self.events.append(Event(key, result=Result(self.final, others=(Result("other"),) * (request.sampling.n - 1))))

    def step(self):
        return [self.events.pop(0)]

    def decode(self, tokens, skip_special_tokens):
        return "".join(map(chr, tokens))


@pytest.mark.parametrize(
    ("text", "final", "stop", "pieces"),
    [
        ("abcdef", None, (), ["abc", "def", "\n"]),
        ("abcdefghi", "abcde", ("fgh",), ["a", "bcd", "e", "\n"]),  # what may become a stop string is held back
        ("abcde\ufffd", "abcdeé", (), ["abc", "de", "é\n"]),  # half a character is held back
        ("abcdef", "another sample", (), ["abc", "def", "\nanother sample\n"]),
    ],
)
def test_an_answer_streams_only_what_is_certain(text, final, stop, pieces):
    shown = []
    result = answer(Scripted(text, final), Request("p", Sampling(stop=stop)), shown.append)
    assert [piece for piece in shown if piece] == pieces
    assert result.text == (final or text)


def test_run(monkeypatch, tmp_path):
    scripted = Scripted("hello")
    monkeypatch.setitem(sys.modules, "hasten.load", SimpleNamespace(load=lambda recipe, **_: scripted))
    result = hasten("run", "m", "--prompt", "hi", "--max-tokens", "7", "--stop", "x", "--stop", "y", "--logit-bias", "5=-100")
    assert result.stdout == "hello\n"
    assert "first token" in result.stderr and "compiling took 7 s" in result.stderr
    assert scripted.requests[0].sampling == Sampling(max_tokens=7, stop=("x", "y"), logit_bias={5: -100.0})
    assert hasten("run", "m", "--prompt", "-", input="from stdin").exit_code == 0
    assert scripted.requests[1].prompt == "from stdin"
    (tmp_path / "chat.json").write_text('[{"role": "user", "content": "hi"}]')
    assert hasten("run", "m", "--messages", str(tmp_path / "chat.json")).exit_code == 0
    assert scripted.requests[2].prompt == [{"role": "user", "content": "hi"}]
    document = json.loads(hasten("run", "m", "--prompt", "hi", "--n", "2", "--json").stdout)
    assert [r["text"] for r in document["results"]] == ["hello", "other"]
    assert "--- 2 of 2\nother" in hasten("run", "m", "--prompt", "hi", "--n", "2").stdout
    (tmp_path / "chat.json").write_text('{"role": "user"}')
    says(hasten("run", "m", "--messages", str(tmp_path / "chat.json")), "must hold a list of messages")


def test_zoo(monkeypatch, tmp_path):
    rows = json.loads(hasten("zoo", "list", "--json").stdout)
    assert "arith-xs" in [row["name"] for row in rows]
    asked = []

    def train(name, out, resume, progress):
        progress({"step": 50, "steps": 100, "loss": 1.0, "seconds": 2.0})
        asked.append((name, out, resume))
        return tmp_path

    def evaluate(name, n):
        return {"name": name, "n": n, "greedy": 0.5}

    monkeypatch.setitem(sys.modules, "hasten.zoo.train", SimpleNamespace(train=train))
    monkeypatch.setitem(sys.modules, "hasten.zoo.evaluate", SimpleNamespace(evaluate=evaluate))
    assert hasten("zoo", "train", "zoo:arith-s", "--fresh").stdout == f"{tmp_path}\n"
    assert asked == [("arith-s", None, False)]
    assert json.loads(hasten("zoo", "eval", "arith-s", "--n", "5", "--json").stdout) == {"name": "arith-s", "n": 5, "greedy": 0.5}


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("hasten pi", "pick"),
        ("hasten zoo train arith-x", "arith-xs"),
        ("hasten pick --with n", "ngram"),
        ("hasten run zoo:arith-x", "zoo:arith-xs"),
    ],
)
def test_shell_completion(typed, offered):
    environment = {"_HASTEN_COMPLETE": "complete_zsh", "_TYPER_COMPLETE_ARGS": typed}
    shown = CliRunner().invoke(app, [], prog_name="hasten", env=environment).stdout
    assert offered in shown.replace("\\", "")


def test_the_entry_point_is_the_app(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["hasten", "--version"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 0
