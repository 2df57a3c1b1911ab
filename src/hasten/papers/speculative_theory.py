"""Yin, Chen, Huang and Wang (2024), "A Theoretical Perspective for Speculative Decoding Algorithm", arXiv:2411.00841.

The paper counts rejections: each costs a pass of the target, so T tokens with N rejections are T / N times as fast where drafting is free.
Theorem 1: the output has the target's law, and E[N] is the sum over positions of the total variation (TV) between draft and target. Theorem 2:
no unbiased rule has fewer. Theorem 3: what several drafts save. Theorems 4 and 5: taking more than is exact trades bias for rejections one for
one, if what is drawn after a rejection is chosen right.

Evidence: random Markov chains as in the paper's figure 2 (7 symbols, 50 steps; theory by `lm/decode/theory.py`, and the algorithm run), random
pairs of laws for the trade-off, and two pairs of the zoo's models in the engine, where each verified position tells its TV.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from hasten import rng
from hasten.lm.decode import theory
from hasten.measure import stats
from hasten.measure.stats import Estimate
from hasten.papers.paper import Absent, Claim, Line, Paper, Run, Settings, exact, median

if TYPE_CHECKING:
    from hasten.lm.decode.draft import Draft
    from hasten.lm.tree import Proposal

# Published: figure 2's chain, and the table's eight cells (two judges, four values of epsilon).
REJECTIONS, SPEEDUP, CELLS = 16.41, 3.05, 8
EPSILONS = (0.1, 0.2, 0.4, 0.8)
WEIGHTS = (1.0, 0.7, 0.4, 0.1)

PAIRS = {"arith": ("zoo:arith-s", "zoo:arith-xs"), "python": ("zoo:python-m", "zoo:python-s")}
SAMPLINGS = {"plain": {"temperature": 1.0}, "cool": {"temperature": 0.7}, "nucleus": {"temperature": 1.0, "top_p": 0.9}}
LOSSY = 0.5  # the weight of the exact rule in the lossy runs
FULL: dict[str, Any] = {"chains": 20, "runs": 20000, "laws": 100, "rounds": 50, "prompts": 8, "tokens": 96, "k": 4}
QUICK: dict[str, Any] = {"chains": 8, "runs": 5000, "laws": 30, "rounds": 16, "prompts": 8, "tokens": 96, "k": 4}
SYMBOLS, STEPS, DRAFTS, MANY = 7, 50, (1, 4, 5), 200


def settings(full: bool) -> dict[str, Any]:
    return FULL if full else QUICK


def collect(run: Run) -> None:
    """Chains, then pairs of laws, then the models: what takes longest last."""
    s = run.settings
    for i in range(s["chains"]):
        if not run.once("chain", i, partial(chain, i, s["runs"])):
            return
    for i in range(s["laws"]):
        if not run.once("laws", i, partial(laws, i)):
            return
    for i in range(s["rounds"]):
        for pair in PAIRS:
            for name in SAMPLINGS:
                for weight in (1.0, LOSSY):
                    if not run.once(f"{pair}, {name}, weight {weight:g}", i, partial(models, pair, name, weight, i, s)):
                        return


# ------------------------------------------------------------------------------------------------------------------- chains


def transitions(seed: int) -> theory.Array:
    """[STEPS, SYMBOLS, SYMBOLS]: rows of uniform numbers, normalised, which is what gives the paper's figure."""
    rows = np.random.default_rng(seed).random((STEPS, SYMBOLS, SYMBOLS))
    return rows / rows.sum(-1, keepdims=True)


def chain(index: int, runs: int) -> Line:
    """One pair of chains: rejections by theory and by running the algorithm, and how far its output's laws are from the target's.

    `off M`: mean number of simulated rejections over the theory's, less one; `error M`: its standard error. `law` and `law, wrong`: mean over
    positions of chi-square over its degrees of freedom (1 for the right law); wrong: drawn from the target itself after a rejection.
    """
    p, q = transitions(2 * index + 10), transitions(2 * index + 11)
    line: dict[str, Any] = {"expected": theory.expected_rejections(p, q), "many": theory.expected_rejections(p, q, drafts=MANY)}
    for m in DRAFTS:
        expected = theory.expected_rejections(p, q, drafts=m)
        found, tokens = theory.simulate(p, q, 0, runs, m, seed=index)
        line |= {f"off {m}": float(found.mean() / expected - 1), f"error {m}": float(found.std() / runs**0.5 / expected)}
        if m == 1:
            line["law"] = misfit(tokens, q)
    return line | {"law, wrong": misfit(biased(p, q, runs, index), q)}


def misfit(tokens: np.ndarray, q: theory.Array) -> float:
    """Mean over positions of chi-square of the tokens' frequencies [runs, T] over its degrees of freedom."""
    law, found = np.eye(SYMBOLS)[0], []
    for n, step in enumerate(q):
        law = law @ step
        want = law * len(tokens)
        found.append(((np.bincount(tokens[:, n], minlength=SYMBOLS) - want) ** 2 / want).sum() / (SYMBOLS - 1))
    return float(np.mean(found))


def biased(p: theory.Array, q: theory.Array, runs: int, seed: int) -> np.ndarray:
    """What comes of drawing from the target, not from what the draft has left over, after a rejection: [runs, T]."""
    noise = np.random.default_rng(seed)
    last, out = np.zeros(runs, np.int64), []
    for p_n, q_n in zip(p, q, strict=True):
        b = theory.over_acceptance(p_n, q_n, 0.0)
        edges = theory.output_law(b, p_n, q_n).cumsum(-1)
        last = (noise.random((runs, 1)) * edges[last][:, -1:] >= edges[last]).sum(-1)
        out.append(last)
    return np.stack(out, -1)


# --------------------------------------------------------------------------------------------------------- the trade-off


def laws(seed: int) -> Line:
    """A random pair of laws: how far rejections plus least bias are from TV over all lossy rules, and what the careless choice costs.

    `line`: the largest distance; `careless`: the least excess of bias over the optimum, in the paper's cells, of drawing from the target.
    """
    p, q = np.random.default_rng(seed).dirichlet(np.ones(8), 2)
    whole = float(theory.tv(p, q))
    rules = [theory.over_acceptance(p, q, e) for e in (0.0, *EPSILONS)] + [theory.ensemble_acceptance(p, q, w) for w in WEIGHTS]
    sums = [float(((1 - b) * p).sum() + reached(b, p, q, theory.optimal_residual(b, p, q))) for b in rules]
    cells = [theory.over_acceptance(p, q, e) for e in (0.0, *EPSILONS)]
    excess = [reached(b, p, q, q) - reached(b, p, q, theory.optimal_residual(b, p, q)) for b in cells if ((1 - b) * p).sum() > 1e-9]
    return {"line": max(abs(x - whole) for x in sums), "careless": min(excess), "exact": excess[0]}


def reached(b: theory.Array, p: theory.Array, q: theory.Array, after: theory.Array) -> float:
    """TV between the target and what comes out with acceptance b and that law after a rejection."""
    return float(theory.tv(theory.output_law(b, p, after), q))


# ------------------------------------------------------------------------------------------------------------- real models


def models(pair: str, sampling: str, weight: float, index: int, s: Settings) -> Line:
    """Rejections of a pair of the zoo, the sum of TV over the positions that were verified, and of their variances TV (1 - TV)."""
    from hasten import load
    from hasten.lm.decode.draft import Options
    from hasten.lm.engine import TokenEngine
    from hasten.values import Request, Sampling

    target, small = (_loaded(name, load) for name in PAIRS[pair])
    options = Options(model=PAIRS[pair][1], k=s["k"], mode="rejection", ensemble_weight=weight)
    watched = watching(options, small.model, target.facts.vocabulary)
    engine = TokenEngine(target.model, target.tokenizer, decode=watched)
    for i, prompt in enumerate(prompts(pair, index, s["prompts"])):
        seed = rng.integer(1 << 31, pair, sampling, str(weight), index, i)  # one each: answers that share their noise would err together
        engine.add(i, Request(prompt, Sampling(max_tokens=s["tokens"], seed=seed, **SAMPLINGS[sampling])))  # type: ignore[arg-type]
    while not engine.idle:
        engine.step()
    return dict(zip(("rejections", "tv", "variance", "positions"), watched.counted.tolist(), strict=True))


_ENGINES: dict[str, Any] = {}


def _loaded(name: str, load: Callable[..., Any]) -> Any:
    """The engine of a model, with native steps where this machine has them: the law is the same, and it takes half the time."""
    from hasten.native import build

    if name not in _ENGINES:
        _ENGINES[name] = load(name if build.why_not() else f"{name} +native").engines["target"]
    return _ENGINES[name]


def prompts(pair: str, index: int, n: int) -> list[str]:
    """Those of round `index`: none is used twice."""
    from hasten.zoo import arith, python

    if pair == "arith":
        return [p.prompt for p in arith.problems("test", n, start=n * index)]
    return python.prompts("test", n * (index + 1), 48)[-n:]


def watching(options: Any, model: Any, vocabulary: int) -> Any:
    """A draft technique that notes, at each position that its verifier judges, whether it was rejected and the TV of the two laws.

    `counted`: [rejections, sum of TV, sum of TV (1 - TV), positions].
    """
    import torch

    from hasten.lm import sampler
    from hasten.lm.decode import draft

    class Watching(draft.Draft):
        counted = np.zeros(4)

        def verify(self, row: Any, proposal: Proposal, chosen: Sequence[int], logits: torch.Tensor) -> list[int]:
            kept = super().verify(row, proposal, chosen, logits)
            judged = min(len(kept), len(proposal))
            if judged:
                q = sampler.laws(logits[:judged], [row.request.sampling] * judged).numpy()
                tv = theory.tv(torch.stack(row.decode_state.laws[:judged]).numpy(), q)
                self.counted = self.counted + np.array([len(kept) <= len(proposal), tv.sum(), (tv * (1 - tv)).sum(), judged])
            return kept

    technique: Draft = Watching(options, draft.quick(model), draft.Vocabulary(vocabulary))
    return technique


# --------------------------------------------------------------------------------------------------- what the claims read

Find = Callable[[Sequence[Line], Settings], Estimate | Absent]


def column(lines: Sequence[Line], what: str, field: str) -> list[float]:
    return [line[field] for line in lines if line["what"] == what]


def distance(off: float, error: float, n: int) -> Estimate:
    """How far a figure is from another, in per cent, with the 95 % interval that its standard error leaves."""
    low, high = abs(off) - 1.96 * error, abs(off) + 1.96 * error
    return Estimate(100 * abs(off), 100 * max(0.0, low), 100 * high, n)


def simulated(*drafts: int) -> Find:
    """Simulated over expected rejections, of all chains together; of several numbers of drafts the one that is furthest off."""

    def find(lines: Sequence[Line], s: Settings) -> Estimate:
        found = []
        for m in drafts:
            off, error = column(lines, "chain", f"off {m}"), column(lines, "chain", f"error {m}")
            n = max(1, len(off))
            found.append(distance(sum(off) / n, sum(e * e for e in error) ** 0.5 / n if error else np.inf, len(off)))
        return max(found, key=lambda e: e.high)

    return find


def mean_of(field: str) -> Find:
    return lambda lines, s: stats.mean(column(lines, "chain", field))


def speedup(lines: Sequence[Line], s: Settings) -> Estimate:
    return median([STEPS / x for x in column(lines, "chain", "expected")])


def floor(lines: Sequence[Line], s: Settings) -> Estimate:
    """Rejections that are left with very many drafts, as a share of those with one."""
    return median([m / x for m, x in zip(column(lines, "chain", "many"), column(lines, "chain", "expected"), strict=True)])


def worst(field: str, choose: Callable[[list[float]], float]) -> Find:
    """The worst of all pairs of laws: arithmetic, so without an interval."""

    def find(lines: Sequence[Line], s: Settings) -> Estimate:
        values = column(lines, "laws", field)
        return exact(choose(values), choose(values), choose(values)) if values else Estimate(np.nan, -np.inf, np.inf, 0)

    return find


def real(weight: float) -> Find:
    """How far the models' rejections are from `weight` times the sum of TV at the positions judged; their errors form a martingale."""

    def find(lines: Sequence[Line], s: Settings) -> Estimate:
        some = [line for line in lines if line["what"].endswith(f"weight {weight:g}")]
        rejections, tv, variance, positions = (sum(line[f] for line in some) for f in ("rejections", "tv", "variance", "positions"))
        if not tv:
            return Estimate(np.nan, -np.inf, np.inf, 0)
        spread = weight * variance + weight * (1 - weight) * (tv - variance)  # w TV (1 - w TV), where the sum of TV^2 is tv - variance
        return distance(rejections / (weight * tv) - 1, spread**0.5 / (weight * tv), int(positions))

    return find


def judges(lines: Sequence[Line], s: Settings) -> Absent:
    return Absent("it needs pythia-2.8b and 70m, Alpaca-Farm's prompts and two judges, none of which ship with hasten")


# -------------------------------------------------------------------------------------------------------------- the claims

CLAIMS = (
    Claim(
        "rejections", "Expected rejections are the sum of the total variations (theorem 1)", None, "% off", 0.5, "below",
        "random chains, mean of simulated over expected rejections; published: 16.41 on the paper's chain, theory and simulation alike", simulated(1),
    ),
    Claim(
        "speed-up", "50 tokens of a 7-symbol chain take 16.41 rejections: 3.05 times as fast", SPEEDUP, "x", 3.0, "above",
        "median over random chains of 50 over the expected rejections; the paper's own chain is not published", speedup,
    ),
    Claim(
        "unbiased", "The output has the target's law (theorem 1)", None, "chi2/dof", 1.1, "below",
        "mean over chains and positions of chi-square over its degrees of freedom, which is 1 for the right law", mean_of("law"),
    ),
    Claim(
        "control", "A rule that draws from the target itself after a rejection has not", None, "chi2/dof", 1.1, "above",
        "the same of that rule: shows that the test above can fail", mean_of("law, wrong"),
    ),
    Claim(
        "batch", "Rejections with 4 and 5 drafts are theorem 3's", None, "% off", 0.5, "below",
        "as `rejections`, the worse of the two; each position after a rejection tries the drafts in turn", simulated(4, 5),
    ),
    Claim(
        "limit", "More drafts do not drive rejections to zero (proposition 1)", None, "of one draft's", 0.5, "above",
        f"expected rejections with {MANY} drafts over those with one: only positions after a rejection gain", floor,
    ),
    Claim(
        "trade-off", "Rejections and least bias add up to the total variation, for every lossy rule (theorem 5)", None, "TV", 1e-9, "below",
        "largest distance over random pairs of laws, of the paper's rule at five epsilons and of transformers' ensemble weight at four",
        worst("line", max),
    ),
    Claim(
        "residual", "Drawing from the target after a rejection (UNO) is never better than the optimum (OPT)", None, "TV", -1e-9, "above",
        "least excess of bias over random pairs of laws and the table's epsilons", worst("careless", min),
    ),
    Claim(
        "residual-exact", "With the exact rule of acceptance it is plainly worse", None, "TV", 0.0, "above",
        "least bias of drawing from the target with epsilon 0, over random pairs of laws", worst("exact", min),
    ),
    Claim(
        "models", "Theorem 1 holds for language models", None, "% off", 5.0, "below",
        "arith-s drafted by arith-xs and python-m by python-s, three ways of sampling: rejections over the sum of TV at the positions judged",
        real(1.0),
    ),
    Claim(
        "models-lossy", "A lossy rule's rejections are its point on the line", None, "% off", 5.0, "below",
        f"the same with an ensemble weight of {LOSSY:g}: rejections over {LOSSY:g} times the sum of TV; the rest of it is bias", real(LOSSY),
    ),
    Claim(
        "judges", "On Alpaca, judges prefer the answers of OPT to those of UNO in all eight cells", float(CELLS), "cells", 7.5, "above",
        "win rates of pythia-2.8b drafted by pythia-70m", judges,
    ),
)  # fmt: skip

PAPER = Paper(
    "speculative-theory", "A Theoretical Perspective for Speculative Decoding Algorithm", "arXiv:2411.00841", CLAIMS, settings, collect
)
