"""PEARL with its draft in a process of its own: the same tokens, its end in mid-run, what cannot start, and where it cannot be."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

import hasten
from hasten import cpu, techniques
from hasten.cpu import Topology
from hasten.lm.decode import drafter
from hasten.lm.decode.pearl import Options, started
from hasten.recipe import Recipe
from hasten.values import Request, Sampling, UserError
from tiny_directory import save


def say(text: str) -> list[str]:
    return [sys.executable, "-c", text]


@pytest.fixture
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two cores for whoever asks, though they be one."""
    here = min(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    monkeypatch.setattr(cpu, "topology", lambda: Topology((((here,), (here,)),)))


def test_a_draft_in_its_own_process_and_its_end_in_mid_run(two_cores: None, tmp_path: Path) -> None:
    target, draft = save(tmp_path / "target"), save(tmp_path / "draft", num_hidden_layers=1)
    s = Sampling(max_tokens=40, temperature=0.8, ignore_eos=True, seed=3)
    asked = [[5, 6, 7, 8, 9], [9, 8, 7], list(range(5, 25))]
    want = [r.tokens for r in hasten.load(str(target)).generate(asked, s)]
    lm = hasten.load(f"{target} +pearl(model={draft}, window=3)")
    assert lm.threads == 1
    got = lm.generate(asked, s)
    assert [r.tokens for r in got] == want
    assert all(r.usage.by_role["draft"].generated > 20 for r in got)
    technique: Any = lm.engines["target"].decode
    process = technique.drafter._child.process
    for i, prompt in enumerate(asked):
        lm.engine.add(i, Request(prompt, s))
    for _ in range(4):
        lm.engine.step()
    process.kill()
    done: dict[Any, Any] = {}

    def finish() -> None:
        while not lm.engine.idle:
            done.update({event.key: event.result.tokens for event in lm.engine.step() if event.result})

    with pytest.warns(RuntimeWarning, match="killed by SIGKILL.*goes on without a draft") as warned:
        finish()
    assert len(warned) == 1 and [done[i] for i in range(3)] == want
    assert [r.tokens for r in lm.generate(asked, s)] == want  # and without a word, plainly
    lm.close()
    assert process.returncode is not None


def test_a_draft_that_cannot_start_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="pearl: no such weights"):
        started({}, say("""print('{"error": "no such weights"}')"""))
    with pytest.raises(UserError, match="the draft's process ended with code 3"):
        started({}, say("raise SystemExit(3)"))
    monkeypatch.setattr(drafter, "PATIENCE", 0.1)
    with pytest.raises(UserError, match=r"did not answer within 0.1 seconds"):
        started({}, say("import time; time.sleep(60)"))


def test_where_it_cannot_be(monkeypatch: pytest.MonkeyPatch, two_cores: None, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"pearl\(model=MODEL\)"):
        hasten.load("zoo:arith-s +pearl")
    with pytest.raises(UserError, match="python-s has another tokenizer than the target: use draft"):
        hasten.load("zoo:arith-s +pearl(model=zoo:python-s)")
    assert "needs 3 cores, and this process may use 2 cores" in str(techniques.why_not(Recipe.parse("m +pearl(cores=2)")))
    monkeypatch.setattr(cpu, "topology", lambda: Topology((((0,),),)))
    with pytest.raises(UserError, match="needs 2 cores, and this process may use a single core"):
        hasten.load("zoo:arith-s +pearl(model=zoo:arith-xs)")


@pytest.mark.parametrize(
    ("wrong", "words"), [({"mode": "block"}, "no such mode"), ({"window": -1}, "window >= 0"), ({"cores": 0}, "cores >= 1")]
)
def test_bad_options(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Options(model="x", **wrong)


def test_a_recipe_is_as_exact_as_the_mode() -> None:
    assert techniques.exactness(Recipe.parse("m +pearl(model=x)")) == "identical"
    assert techniques.exactness(Recipe.parse("m +pearl(model=x, mode=rejection)")) == "distribution"
