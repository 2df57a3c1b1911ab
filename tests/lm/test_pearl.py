"""The same tokens as plain decoding, whatever the draft, the window and the batch, its messages and its ledger; with the draft in this process."""

from __future__ import annotations

import copy
import json
from collections import deque
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from conftest import CONFIGS, make, reference
from test_engine import MAX, answers, prompts

from hasten import hf
from hasten.engine import run
from hasten.lm import sampler
from hasten.lm.cache import common_prefix
from hasten.lm.constrain.allowed import Allowed
from hasten.lm.decode.drafter import Gone, Rows, law_of
from hasten.lm.decode.pearl import Options, Pearl
from hasten.lm.engine import TokenEngine
from hasten.lm.scheduler import Row
from hasten.values import Request, Sampling


class Here:
    """A drafter in this process, asked as one in another process is."""

    def __init__(self, rows: Rows) -> None:
        self.rows, self.said = rows, deque[str]()
        self.messages: list[dict[str, Any]] = []

    def send(self, message: Mapping[str, Any]) -> None:
        self.messages.append(json.loads(json.dumps(message)))
        self.said.append(json.dumps(self.rows.answer(self.messages[-1])))

    def receive(self) -> dict[str, Any]:
        return json.loads(self.said.popleft())

    def processor_seconds(self) -> float:
        return 0.0

    def close(self) -> None:
        self.said.clear()


@pytest.fixture(scope="module")
def drafts(pairs: Any) -> Any:
    """A draft of each kind for a target: itself, a stranger, and itself with noise (which agrees about half of the time)."""
    made: dict[Any, Any] = {}

    def get(family: str, kind: str) -> Any:
        if (family, kind) not in made:
            model = copy.deepcopy(pairs(family)[0]) if kind != "stranger" else make("llama", seed=9)
            if kind == "near":
                torch.manual_seed(1)
                for p in model.parameters():
                    p.data += 0.08 * p.data.std() * torch.randn_like(p)
            made[family, kind] = hf.prepare(model)
        return made[family, kind]

    return get


def pearl(model: Any, ends: tuple[int, ...] = (2,), **options: Any) -> Pearl:
    chosen = Options(model="x", **{"window": 4, **options})
    return Pearl(chosen, lambda rows: Here(Rows(model, 97, chosen.mode, rows, ends)))


# --- the same tokens ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["itself", "stranger", "near"])
@pytest.mark.parametrize("family", CONFIGS)
def test_greedy_is_identical(pairs: Any, drafts: Any, family: str, kind: str) -> None:
    model, ours = pairs(family)
    asked = prompts(1)
    technique = pearl(drafts(family, kind))
    engine = TokenEngine(ours, decode=technique, max_rows=4, step_tokens=30)
    assert answers(engine, asked) == reference(model, asked, MAX)
    beside: Any = technique.drafter
    assert not beside.rows.rows and beside.rows.draft.cache.active == 0
    if kind == "itself":
        assert technique.refused == 0 and engine.steps < MAX + 4


@pytest.mark.parametrize("window", [0, 1, 3, 7])
@pytest.mark.parametrize("mode", ["coupled", "rejection"])
def test_samples_depend_on_neither_window_nor_batch_nor_room(pairs: Any, drafts: Any, window: int, mode: str) -> None:
    _, ours = pairs("llama")
    s = {"temperature": 0.9, "top_k": 30, "top_p": 0.95, "repetition_penalty": 1.2, "presence_penalty": 0.3, "min_tokens": 4, "seed": 5}
    asked = prompts(6)
    near = drafts("llama", "near")
    plain = answers(TokenEngine(ours, decode=pearl(near, mode=mode, window=2) if mode == "rejection" else None), asked, **s)
    engine = TokenEngine(
        ours, decode=pearl(near, mode=mode, window=window), memory=400 * TokenEngine(ours).cache.shape.bytes_per_position, max_rows=5
    )
    assert answers(engine, asked, **s) == plain


@pytest.mark.parametrize("mode", ["coupled", "rejection"])
@pytest.mark.parametrize("rows", [1, 2, 8, 32])
def test_ragged_batches_with_allowed_tokens(pairs: Any, drafts: Any, rows: int, mode: str) -> None:
    _, ours = pairs("qwen3")
    asked, s = prompts(5, rows), {"max_tokens": 12}
    plain = TokenEngine(ours, constraint=Allowed(range(10, 40)), max_rows=rows)
    technique = pearl(drafts("qwen3", "near"), window=3, mode=mode)
    engine = TokenEngine(ours, constraint=Allowed(range(10, 40)), max_rows=rows, decode=technique)
    assert answers(engine, asked, **s) == answers(plain, asked, **s)  # greedy: the same tokens in both modes
    if mode == "coupled":
        assert answers(engine, asked, **s, temperature=1.0) == answers(plain, asked, **s, temperature=1.0)
    elif rows == 8:
        alone = TokenEngine(ours, constraint=Allowed(range(10, 40)), max_rows=1, decode=pearl(drafts("qwen3", "near"), window=5, mode=mode))
        assert answers(engine, asked, **s, temperature=1.0) == answers(alone, asked, **s, temperature=1.0)


def test_a_row_that_the_draft_has_no_room_for_is_decoded_plainly(pairs: Any, drafts: Any) -> None:
    model, ours = pairs("phi3")
    technique = pearl(drafts("phi3", "itself"))
    engine = TokenEngine(ours, decode=technique)
    beside: Any = technique.drafter
    beside.rows.draft.cache.max_len = 30
    assert answers(engine, prompts(3, 5)) == reference(model, prompts(3, 5), MAX)


def test_scores_stops_and_cancelled_requests(pairs: Any, drafts: Any) -> None:
    _, ours = pairs("llama")
    technique = pearl(drafts("llama", "near"))
    engine, plain = TokenEngine(ours, decode=technique, step_tokens=9), TokenEngine(ours)
    beside: Any = technique.drafter
    long, short = Request(prompts(1)[2], Sampling(max_tokens=30, ignore_eos=True)), Request([5, 6, 7], Sampling(max_tokens=0))
    asked = {0: long, 1: Request([5, 6, 7, 8], score=True), 2: short, 3: Request([9, 8], Sampling(max_tokens=6, prompt_logprobs=0))}
    engine.add("cancelled", long)
    for _ in range(6):
        engine.step()
    engine.cancel("cancelled")
    assert engine.step()[-1].result.finish_reason == "cancelled" and not beside.rows.rows
    got, want = run(engine, asked), run(plain, asked)
    assert [(r.tokens, r.finish_reason) for r in got.values()] == [(r.tokens, r.finish_reason) for r in want.values()]
    assert got[1].scores == want[1].scores and len(got[3].prompt_logprobs or ()) == 2
    assert not beside.rows.rows


def test_messages_are_tiny_and_the_ledger_has_the_draft(pairs: Any, drafts: Any) -> None:
    _, ours = pairs("llama")
    technique = pearl(drafts("llama", "itself"), window=4)
    prompt = list(range(5, 45))
    got = run(TokenEngine(ours, decode=technique), {0: Request(prompt, Sampling(max_tokens=17, ignore_eos=True))})[0]
    target, draft = got.usage.by_role["target"], got.usage.by_role["draft"]
    # the prompt's step judges the first token drafted beside it; then four a step, all of them drafted
    assert (target.forwards, target.proposed, target.accepted) == (5, 12, 12)
    assert (draft.prompt, draft.reused, draft.generated, draft.forwards) == (40, 0, 16, 16) and draft.flops > 0 < draft.bytes
    beside: Any = technique.drafter
    rounds = [m for m in beside.messages if m["do"] == "go_on"]
    assert [m["rows"][0][3] for m in rounds] == [prompt, [], [], []]  # the prompt once, and not one id after it


class Dying(Here):
    """A drafter that ends instead of giving its n-th answer."""

    def __init__(self, rows: Rows, left: int) -> None:
        super().__init__(rows)
        self.left = left

    def receive(self) -> dict[str, Any]:
        self.left -= 1
        if self.left < 0:
            raise Gone("it has ended")
        return super().receive()


@pytest.mark.parametrize("mode", ["coupled", "rejection"])
def test_whenever_the_drafter_ends_no_request_is_lost(pairs: Any, drafts: Any, mode: str) -> None:
    _, ours = pairs("llama")
    asked, s = prompts(9, 4), {"temperature": 0.9, "max_tokens": 14, "ignore_eos": True}
    want = answers(TokenEngine(ours), asked, **s)
    seen = set()
    for left in range(14 if mode == "coupled" else 24):  # answers of a whole run are some more
        rows = Rows(drafts("llama", "near"), 97, mode, 4, (2,))
        technique = Pearl(Options(model="x", window=3, mode=mode), lambda _, rows=rows, left=left: Dying(rows, left))  # type: ignore[misc]
        engine = TokenEngine(ours, decode=technique, max_rows=4)
        beside: Any = technique.drafter
        with pytest.warns(RuntimeWarning, match="it has ended; decoding goes on without a draft") as warned:
            got = answers(engine, asked, **s)
        assert len(warned) == 1 and [len(tokens) for tokens in got] == [14] * 4
        assert mode == "rejection" or got == want
        seen.add(beside.messages[-1]["do"])
    assert seen >= {"open", "go_on"} and (mode == "coupled" or "law" in seen)


def test_refusals_are_as_many_as_total_variation_says(pairs: Any, drafts: Any) -> None:
    """The z-test of a real pair: refusals minus the sum of TV at the prefixes visited, in standard deviations (Yin et al. 2024, theorem 1)."""
    _, ours = pairs("llama")
    sums = [0.0, 0.0, 0.0]  # refusals, TV, variance

    class Counting(Pearl):
        def _rejection(self, row: Row, assumed: list[int], logits: torch.Tensor) -> list[int]:
            new = super()._rejection(row, assumed, logits)
            q, kept = sampler.laws(logits, [row.request.sampling] * len(logits)), common_prefix(new, assumed)
            for i in range(min(kept + 1, len(assumed))):
                self._say(do="law", row=row.decode_state.number, position=len(row.tokens) + i)
                tv = float((q[i] - law_of(self._hear())).abs().sum() / 2)
                sums[0], sums[1], sums[2] = sums[0] + (i == kept), sums[1] + tv, sums[2] + tv * (1 - tv)
            return new

    near = drafts("llama", "near")
    technique = Counting(Options(model="x", mode="rejection", window=3), lambda rows: Here(Rows(near, 97, "rejection", rows, (2,))))
    answers(TokenEngine(ours, decode=technique), prompts(8, 20), temperature=2.0, max_tokens=40, ignore_eos=True)
    assert sums[1] > 50 and abs(sums[0] - sums[1]) / sums[2] ** 0.5 < 4
