"""Grigaliunas and Lukosevicius (2024), "Inference acceleration for large language models using "stairs" assisted greedy generation",
arXiv:2407.19947.

A smaller model drafts greedily, the large one checks k tokens as k + 1 rows of a batch, each a token longer (`lm/decode/stairs.py`). The paper
reports T5 models on a GPU. What is measured here is the ratio that each claim is about, on python-m drafted by python-s; and what the paper
has no control for: the same drafts checked in one row with one output a position.

Evidence: in each repeat every arm answers the same prompts, one after the other, in an order that is turned round from repeat to repeat. A line
holds `seconds` of the repeat's prompts, batch 1, and `differing`, the answers that are not those of plain decoding.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from typing import Any

from hasten.measure import stats
from hasten.measure.stats import Estimate
from hasten.papers.paper import Absent, Claim, Line, Paper, Run, Settings, median, values

LARGE, SMALLER = 17.24, 9.58  # inference time saved, in per cent: T5-large and T5-3B over themselves alone
RANGE = 2.0  # "up to": throughput between the best and the worst number of drafted tokens

TARGET, DRAFT = "zoo:python-m", "zoo:python-s"
PLAIN, STAIRS, CAUSAL, ASSISTED = "plain", "stairs", "causal", "transformers' assisted generation"
KS = (1, 2, 4, 8, 16)
K = 4  # where no other is said; transformers' own default is another, and is left to it
FULL: dict[str, Any] = {"repeats": 25, "prompts": 4, "prompt": 64, "tokens": 128}
QUICK: dict[str, Any] = {"repeats": 9, "prompts": 2, "prompt": 64, "tokens": 64}


def settings(full: bool) -> dict[str, Any]:
    """The form's, and whether small steps are one call into C++."""
    from hasten.native import build

    return (FULL if full else QUICK) | {"native": build.why_not() is None}


def named(k: int) -> str:
    return STAIRS if k == K else f"{STAIRS}, k={k}"


def recipes(s: Settings) -> dict[str, str]:
    """What answers in each arm; all steps native, or none."""
    base = TARGET + (" +native" if s["native"] else "")
    options = f"model={DRAFT},schedule=constant"
    return {PLAIN: base, CAUSAL: f"{base} +draft({options},k={K})"} | {named(k): f"{base} +stairs({options},k={k})" for k in KS}


def collect(run: Run) -> None:
    """Rounds of all arms, forwards and backwards in turn; the first prompts of each arm are not measured."""
    arms = Arms(run.settings)
    for repeat in range(run.settings["repeats"]):
        names = [*recipes(run.settings), ASSISTED]
        for name in reversed(names) if repeat % 2 else names:
            if not run.once(name, repeat, partial(arms.line, name, repeat)):
                return


class Arms:
    """The models, loaded when first asked, and plain decoding's answers to compare with."""

    def __init__(self, s: Settings) -> None:
        self.settings, self._loaded, self._answers = s, {}, {}  # type: ignore[var-annotated]

    def line(self, name: str, repeat: int) -> Line:
        """One repeat of one arm."""
        from hasten.measure.machine import Watch

        asked, wanted = self._prompts(repeat + 1), self._plain(repeat)
        answers = self._answering(name)
        with Watch() as watch:
            began = time.perf_counter()
            got = answers(asked)
            seconds = time.perf_counter() - began
        differing = sum(a != b for a, b in zip(got, wanted, strict=True))
        return {"seconds": seconds, "differing": differing, "answers": len(got), "contended": watch.contended}

    def _plain(self, repeat: int) -> list[tuple[int, ...]]:
        if repeat not in self._answers:
            self._answers[repeat] = self._answering(PLAIN)(self._prompts(repeat + 1))
        return self._answers[repeat]

    def _prompts(self, index: int) -> list[str]:
        """Those of repeat index - 1; index 0: the ones to warm up with."""
        from hasten.zoo import python

        n = self.settings["prompts"]
        return python.prompts("test", n * (index + 1), self.settings["prompt"])[-n:]

    def _answering(self, name: str) -> Any:
        """The arm, loaded and warm."""
        if name not in self._loaded:
            self._loaded[name] = self._theirs() if name == ASSISTED else self._ours(name)
            self._loaded[name](self._prompts(0))
        return self._loaded[name]

    def _ours(self, name: str) -> Any:
        from hasten import load
        from hasten.values import Sampling

        loaded, sampling = load(recipes(self.settings)[name]), Sampling(max_tokens=self.settings["tokens"], ignore_eos=True)

        def answers(prompts: Sequence[str]) -> list[tuple[int, ...]]:
            loaded.forget()
            return [loaded.generate(p, sampling)[0].tokens for p in prompts]

        return answers

    def _theirs(self) -> Any:
        """transformers' generate with an assistant model, as it comes."""
        import torch
        from transformers import AutoModelForCausalLM

        from hasten import hf

        models = [AutoModelForCausalLM.from_pretrained(hf.resolve(name), dtype=torch.float32).eval() for name in (TARGET, DRAFT)]
        words, tokens = hf.load_tokenizer(hf.resolve(TARGET)), self.settings["tokens"]

        @torch.inference_mode()
        def answers(prompts: Sequence[str]) -> list[tuple[int, ...]]:
            out = []
            for prompt in prompts:
                ids = torch.tensor([words(prompt)["input_ids"]])
                limits = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
                full = models[0].generate(ids, attention_mask=torch.ones_like(ids), assistant_model=models[1], **limits)
                out.append(tuple(full[0, ids.shape[1] :].tolist()))
            return out

        return answers


# --------------------------------------------------------------------------------------------------- what the claims read


def over(lines: Sequence[Line], a: str, b: str) -> list[float]:
    """Seconds of a over those of b, repeat by repeat."""
    mine, theirs = values(lines, a, "seconds"), values(lines, b, "seconds")
    return [mine[i] / theirs[i] for i in sorted(mine.keys() & theirs.keys())]


def identical(lines: Sequence[Line], s: Settings) -> Estimate:
    some = [line for line in lines if line["what"].startswith(STAIRS)]
    share = stats.wilson(sum(line["differing"] for line in some), sum(line["answers"] for line in some))
    return Estimate(100 * share.value, 100 * share.low, 100 * share.high, share.n)


def saved(lines: Sequence[Line], s: Settings) -> Estimate:
    return median([100 * (1 - x) for x in over(lines, STAIRS, PLAIN)])


def price(lines: Sequence[Line], s: Settings) -> Estimate:
    return median(over(lines, STAIRS, CAUSAL))


def rival(lines: Sequence[Line], s: Settings) -> Estimate:
    return median(over(lines, ASSISTED, STAIRS))


def spread(lines: Sequence[Line], s: Settings) -> Estimate:
    """The slowest number of drafted tokens over the quickest, both by their medians over all repeats."""
    times = {k: stats.median([*values(lines, named(k), "seconds").values()]).value for k in KS}
    known = {k: t for k, t in times.items() if t == t}
    if not known:
        return median([])
    return median(over(lines, named(max(known, key=lambda k: known[k])), named(min(known, key=lambda k: known[k]))))


def t5(lines: Sequence[Line], s: Settings) -> Absent:
    return Absent("it needs T5-large and T5-3B; the token engine runs decoder-only models")


# -------------------------------------------------------------------------------------------------------------- the claims

CLAIMS = (
    Claim(
        "identical", "Nothing is lost in accuracy", None, "% of answers", 5.0, "below",
        "answers of all numbers of drafted tokens that are not plain greedy decoding's (near-ties in fp32 could be); published: BLEU of 75 to 100",
        identical,
    ),
    Claim(
        "faster", "It takes 17.24 % less time than the large model alone", LARGE, "% saved", SMALLER, "above",
        f"python-m drafted by python-s, {K} tokens, batch 1; published: T5-large (T5-3B, 9.58 %, is the threshold)", saved,
    ),
    Claim(
        "causal", "The staircase pays: checking in one row with an output at each position is no quicker", None, "x", 1.0, "below",
        "seconds with a staircase over those with causal verification of the same drafts; the paper has no such control", price,
    ),
    Claim(
        "draft-length", "The number of drafted tokens changes throughput by up to 2 times", RANGE, "x", 1.5, "above",
        "the slowest of 1, 2, 4, 8 and 16 drafted tokens over the quickest; half of what is published would be a change", spread,
    ),
    Claim(
        "transformers", "It is quicker than Hugging Face's assisted generation, sometimes", None, "x", 1.0, "above",
        "seconds of transformers' assisted generation, as it comes, over ours; another engine, so the staircase is not all of the difference", rival,
    ),
    Claim("t5", "The same of T5-large and T5-3B on a GPU", LARGE, "% saved", SMALLER, "above", "inference time over the model alone", t5),
)  # fmt: skip

PAPER = Paper(
    "stairs", 'Inference acceleration for large language models using "stairs" assisted greedy generation', "arXiv:2407.19947", CLAIMS, settings,
    collect,
)  # fmt: skip
