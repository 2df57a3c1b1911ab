"""Liu et al. (2024), "PEARL: Parallel Speculative Decoding with Adaptive Draft Length", arXiv:2408.11850 (ICLR 2025).

Draft and target work at the same time on devices of their own. The paper's rivals have one device less: plain decoding and ordinary speculation
leave the draft's device, or the target's, idle. So speed is measured twice, with rivals on one core (the paper's comparison) and on all cores
that PEARL has (what a user gains). Its scripts are greedy throughout; the released code's samples are judged by its seeds.

Evidence: counts on the zoo's python pair with held-out prompts; seconds on a pair made here, a Llama of random weights whose later layers add
little, so that its first layers alone are a draft that agrees with it often (`pair`). In each repeat all arms run once on the same prompt, in an
order that is turned round from repeat to repeat. Ordinary speculation is tried with every length, and the best one is its figure.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from hasten import rng
from hasten.cpu import topology
from hasten.lm.decode.theory import pearl_tokens, tv
from hasten.measure.stats import Estimate
from hasten.papers.paper import Absent, Claim, Line, Paper, Run, Settings, median, ratio, values

OVER_PLAIN, OVER_SPECULATION = 4.43, 1.50  # published, "up to"
STEP = 0.005  # seconds of a target's step under which it is too small to matter: two processes need some 0.1 ms to meet

# The pair: the target's first `few` layers are the draft; what the others add is scaled by `later`.
SHAPE: dict[str, Any] = {
    "vocab_size": 8192, "max_position_embeddings": 1024, "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
QUICK_SHAPE = SHAPE | {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 16, "num_attention_heads": 8}
FULL_SHAPE = SHAPE | {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 12}
COMMON: dict[str, Any] = {"few": 3, "later": 0.05, "sharpness": 8.0, "window": 4, "prompts": 8, "answer": 160, "chains": 3000}
FULL = COMMON | {"repeats": 11, "tokens": 128, "lengths": [1, 2, 3, 4, 5, 6, 8], "windows": [1, 2, 3, 4, 5, 6, 8], "shape": FULL_SHAPE}
QUICK = COMMON | {"repeats": 6, "tokens": 48, "lengths": [2, 4, 6], "windows": [2, 6], "shape": QUICK_SHAPE}

ALL, ONE = "all cores", "one core"
PLAIN, DRAFT, PEARL, FIXED = "plain, {}", "draft, {}", "pearl", "pearl, fixed"
OF = "{} at {}"  # an arm whose length is set
COUNTS, RELEASED, OURS = "counts", "released seeds", "our seeds"


def settings(full: bool) -> dict[str, Any]:
    return (FULL if full else QUICK) | {"cores": topology().cores}


def rivals(s: Settings, target: str, draft: str) -> dict[str, tuple[str, int]]:
    """Recipe and threads of each; pearl's draft takes one of the cores."""
    native, where = f"{target} +native", ((ALL, s["cores"]), (ONE, 1))
    plain = {PLAIN.format(name): (native, n) for name, n in where}
    drafts = {DRAFT.format(name): (f"{native} +draft(model={draft},schedule=constant)", n) for name, n in where}
    return plain | drafts | dict.fromkeys((FIXED, PEARL), (f"{native} +pearl(model={draft})", s["cores"]))


def arms(s: Settings) -> list[tuple[str, str, int]]:
    """What one repeat measures: the arm, which rival it is, and with what length (0: its own)."""
    drafts = [(OF.format(name, k), name, k) for name in (DRAFT.format(ALL), DRAFT.format(ONE)) for k in s["lengths"]]
    fixed = [(OF.format(FIXED, k), FIXED, k) for k in s["windows"]]
    return [(name, name, 0) for name in (PLAIN.format(ALL), PLAIN.format(ONE))] + drafts + fixed + [(PEARL, PEARL, 0)]


# ------------------------------------------------------------------------------------------------------------- collecting


def collect(run: Run) -> None:
    """Seeds first, then counts, then rounds of all arms, forwards and backwards in turn."""
    s = run.settings
    for repeat in range(s["repeats"]):
        for name, number in ((RELEASED, released), (OURS, ours)):
            if not run.once(name, repeat, partial(biased, s["chains"], repeat, number)):
                return
    if s["cores"] > 1 and _counts(run):
        with tempfile.TemporaryDirectory() as folder:
            _rounds(run, *pair(s, Path(folder)))


def _counts(run: Run) -> bool:
    import hasten

    with hasten.load(f"zoo:python-m +pearl(model=zoo:python-s,window={run.settings['window']})", device="cpu") as lm:
        return all(run.once(COUNTS, repeat, partial(counted, lm, run.settings, repeat)) for repeat in range(run.settings["repeats"]))


def counted(lm: Any, s: Settings, repeat: int) -> Line:
    """Tokens, iterations, and drafted tokens that were kept and refused, of greedy answers to held-out prompts."""
    from hasten.values import Sampling
    from hasten.zoo import python

    pearl = lm.engines["target"].decode
    before = (pearl.iterations, pearl.kept, pearl.refused)
    asked = python.prompts("test", s["prompts"] * s["repeats"], 64)[repeat :: s["repeats"]]
    made = sum(len(r.tokens) for r in lm.generate(asked, Sampling(max_tokens=s["answer"], ignore_eos=True)))
    after = (pearl.iterations, pearl.kept, pearl.refused)
    return {"tokens": made, **{n: b - a for n, a, b in zip(("iterations", "kept", "refused"), before, after, strict=True)}}


def _rounds(run: Run, target: str, draft: str) -> None:
    import hasten
    from hasten.load import Models

    models, s = Models(), run.settings
    with contextlib.ExitStack() as open_:
        loaded = {}
        for name, (recipe, threads) in rivals(s, target, draft).items():
            loaded[name] = open_.enter_context(hasten.load(recipe, threads=threads, models=models, device="cpu", dtype="float32"))
            spoken(loaded[name], 0, s, 0, s["tokens"])  # warm, and pearl's times measured
        for repeat in range(s["repeats"]):
            for arm, rival, length in reversed(arms(s)) if repeat % 2 else arms(s):
                if not run.once(arm, repeat, partial(spoken, loaded[rival], length, s, repeat, s["tokens"])):
                    return


def spoken(lm: Any, length: int, s: Settings, repeat: int, tokens: int) -> Line:
    """Tokens a second of one answer, drawn at temperature 1: greedy text of random weights repeats itself."""
    from hasten.measure.machine import Watch
    from hasten.values import Sampling

    technique = lm.engines["target"].decode
    if length:  # `draft` and `pearl` name theirs differently
        setattr(*((technique.window, "fixed") if hasattr(technique, "window") else (technique.schedule, "k")), length)
    prompt = np.random.default_rng(repeat).integers(1, s["shape"]["vocab_size"], 16).tolist()
    lm.forget()
    with Watch(children=lm.processor_seconds) as watch:
        began = time.perf_counter()
        lm.generate([prompt], Sampling(max_tokens=tokens, temperature=1.0, seed=repeat, ignore_eos=True))
        seconds = time.perf_counter() - began
    return {"rate": tokens / seconds, "contended": watch.contended}


def pair(s: Settings, folder: Path) -> tuple[str, str]:
    """Directories of the target and of its first layers."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from hasten import hf

    hf.quiet()
    torch.manual_seed(0)
    target = LlamaForCausalLM(LlamaConfig(**s["shape"]))
    with torch.no_grad():
        for p in (p for p in target.parameters() if p.dim() > 1):
            p.normal_(0, p.shape[-1] ** -0.5)
        target.model.embed_tokens.weight.normal_()
        target.lm_head.weight *= s["sharpness"]
        for layer in target.model.layers[s["few"] :]:
            layer.self_attn.o_proj.weight *= s["later"]
            layer.mlp.down_proj.weight *= s["later"]
    draft = LlamaForCausalLM(LlamaConfig(**s["shape"] | {"num_hidden_layers": s["few"]}))
    draft.load_state_dict({name: p for name, p in target.state_dict().items() if name in draft.state_dict()})
    for name, model in (("target", target), ("draft", draft)):
        model.save_pretrained(folder / name)
    return str(folder / "target"), str(folder / "draft")


# ------------------------------------------------------------------------------------------------------------------ seeds

P, Q = np.array([0.5, 0.3, 0.15, 0.05]), np.array([0.35, 0.25, 0.2, 0.2])  # laws of a draft and a target, the same at every position
Number = Callable[[int, int, int], float]  # (seed, position, 1 in post-verify) -> the number that judges it


def released(seed: int, position: int, post: int) -> float:
    """Pre-verify takes the seed of its position, post-verify that of the position before."""
    return rng.uniform(seed, position - post)


def ours(seed: int, position: int, post: int) -> float:
    return rng.uniform(seed, position, "accept")


def biased(chains: int, repeat: int, number: Number) -> Line:
    """Total variation from the target's law, of the tokens that are the first of a post-verify after a pre-verify that kept its token."""
    counts = np.zeros(len(P))
    for seed in range(repeat * chains, (repeat + 1) * chains):
        drafted = [int(np.searchsorted(P.cumsum(), rng.uniform(seed, at, "draft"))) for at in (0, 1)]
        if number(seed, 0, 0) * P[drafted[0]] < Q[drafted[0]]:
            counts[_judged(drafted[1], number(seed, 1, 1), rng.uniform(seed, 1, "after"))] += 1
    return {"tv": float(tv(counts / counts.sum(), Q))}


def _judged(token: int, accept: float, after: float) -> int:
    left = np.maximum(Q - P, 0).cumsum()
    return token if accept * P[token] < Q[token] else int(np.searchsorted(left, after * left[-1]))


# ----------------------------------------------------------------------------------------------------- what the claims read

Find = Callable[[Sequence[Line], Settings], Estimate | Absent]


def _testable(find: Find) -> Find:
    """Where there are two cores, and a target's step is long enough for the processes' meeting not to matter."""

    def found(lines: Sequence[Line], s: Settings) -> Estimate | Absent:
        if s["cores"] < 2:
            return Absent("there is a single core")
        steps = [1 / rate for rate in values(lines, PLAIN.format(ONE), "rate").values()]
        if steps and median(steps).value < STEP:
            return Absent(f"a step of the target takes {1e3 * median(steps).value:.1f} ms on one core, under {1e3 * STEP:g} ms")
        return find(lines, s)

    return found


def best(lines: Sequence[Line], names: Sequence[str]) -> str:
    """The name of the arm with the greatest median rate."""
    return max(names, key=lambda name: median(list(values(lines, name, "rate").values()) or [0.0]).value)


def over_plain(where: str) -> Find:
    return _testable(lambda lines, s: ratio(lines, PEARL, PLAIN.format(where), "rate"))


def over_speculation(where: str) -> Find:
    def find(lines: Sequence[Line], s: Settings) -> Estimate | Absent:
        return ratio(lines, PEARL, best(lines, [OF.format(DRAFT.format(where), k) for k in s["lengths"]]), "rate")

    return _testable(find)


def chosen_window(lines: Sequence[Line], s: Settings) -> Estimate | Absent:
    return ratio(lines, PEARL, best(lines, [OF.format(FIXED, k) for k in s["windows"]]), "rate")


def from_counts(number: Callable[[Line, Settings], float]) -> Find:
    """The median of something that each line of counts gives."""

    def find(lines: Sequence[Line], s: Settings) -> Estimate | Absent:
        if s["cores"] < 2:
            return Absent("there is a single core")
        return median([number(line, s) for line in lines if line["what"] == COUNTS])

    return find


def away(line: Line, s: Settings) -> float:
    """Tokens an iteration, in per cent from the state machine's closed form at the acceptance of the same answers."""
    acceptance = line["kept"] / (line["kept"] + line["refused"])
    return 100 * abs(line["tokens"] / line["iterations"] / pearl_tokens(acceptance, s["window"]) - 1)


def beyond(line: Line, s: Settings) -> float:
    """Tokens a refusal, beyond 1 / (1 - acceptance)."""
    return (line["tokens"] - line["kept"] - line["refused"]) / max(1, line["refused"])


def bias(name: str) -> Find:
    return lambda lines, s: median(list(values(lines, name, "tv").values()))


# -------------------------------------------------------------------------------------------------------------- the claims

CLAIMS = (
    Claim(
        "tokens-an-iteration", "An iteration gains as many tokens as the state machine's closed form says",
        None, "% away", 10.0, "below",
        "python-m with python-s, window 4, greedy on held-out files: tokens an iteration against 1/(1-a) / (1 + a/(1-a^k)) at the acceptance a of "
        "the same answers, as if each token were kept independently; the paper has no such formula",
        from_counts(away),
    ),
    Claim(
        "theorem-2", "A run between two refusals has 1/(1-a) + 1 tokens",
        1.0, "tokens more", 0.5, "above",
        "the same answers: tokens a refusal beyond 1/(1-a), the refusal's own token counted; there is no bonus token, so next to none are left",
        from_counts(beyond),
    ),
    Claim(
        "theorem-1", "The best window is the ratio of speeds, so the one set from measured times is as good as the best fixed one",
        1.0, "x", 0.95, "above", "tokens a second with the measured window over the best fixed one, which is chosen afterwards",
        _testable(chosen_window),
    ),
    Claim(
        "over-plain-with-one-core-more", "PEARL is faster than plain decoding, up to 4.43 times",
        OVER_PLAIN, "x", 1.0, "above", "one core each for draft and target over plain decoding with one core: the draft's is extra, as in the paper",
        over_plain(ONE),
    ),
    Claim(
        "over-speculation-with-one-core-more", "PEARL is faster than ordinary speculation, up to 1.50 times",
        OVER_SPECULATION, "x", 1.0, "above", "the same over ordinary speculation of the best length, whose draft and target share one core",
        over_speculation(ONE),
    ),
    Claim(
        "over-plain", "PEARL is faster than plain decoding on the same cores",
        None, "x", 1.0, "above", "over plain decoding with all the cores that PEARL has; the paper has no such comparison",
        over_plain(ALL),
    ),
    Claim(
        "over-speculation", "PEARL is faster than ordinary speculation on the same cores",
        None, "x", 1.0, "above", "over ordinary speculation of the best length, with all cores for draft and target in turn; the paper has none such",
        over_speculation(ALL),
    ),
    Claim(
        "lossless-as-released", "PEARL is lossless: the released code's samples have the target's law",
        0.0, "TV", 0.05, "below",
        "its schedule of seeds on laws of four tokens: the first token judged in post-verify reuses the number that has just let pre-verify's pass; "
        "total variation there, 0.125 by arithmetic; harmless in its scripts, which are all greedy",
        bias(RELEASED),
    ),
    Claim(
        "lossless", "It is with a number of its own for every position and purpose",
        0.0, "TV", 0.05, "below", "the same with our schedule; the law of `pearl` itself is tested by chi-square at every position type",
        bias(OURS),
    ),
)  # fmt: skip

PAPER = Paper("pearl", "PEARL: Parallel Speculative Decoding with Adaptive Draft Length", "arXiv:2408.11850", CLAIMS, settings, collect)
