"""Measuring a model of the zoo on the fixed test set: what its card says, and nothing that its card does not say."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

from hasten.zoo import arith, data, sample, spec, tokenizer
from hasten.zoo.model import Llama


def evaluate(
    name: str,
    n: int = 2000,
    samples: int = 16,
    seed: int = 0,
    directory: str | Path | None = None,
    reward: Llama | None = None,
    sampled: int = 500,
) -> dict:
    """Re-measure a card: greedy on the first n test problems, and what needs samples on the first `sampled` of them; writes nothing.

    A policy: accuracy greedy and of one sample, vote@k, pass@k, how often a wrong vote was a majority's, and with a reward model best-of-k.
    A policy with exits: what they answer alone, and how often they agree (`layerskip.evaluate`).
    A reward model: AUC a step against the true checker and calibration error, on solutions of every policy that is there.
    A text model: perplexity on n windows of held-out files, see `perplexity.py`.
    """
    if spec(name).kind == "text":
        from hasten.zoo import perplexity

        return perplexity.evaluate(name, n=n, directory=directory)
    if spec(name).kind == "reward":
        from hasten.zoo import prm as module

        return module.evaluate(name, n=n, seed=seed, directory=directory)
    model = sample.load(name, directory)
    ps = list(arith.problems("test", n))
    prompts = [tokenizer.encode(p.prompt, bos=True) for p in ps]
    start = time.process_time()
    best = sample.sample(model, prompts, 0.0, seed)
    greedy = [arith.answer_of(tokenizer.decode(s[0])) == p.answer for p, s in zip(ps, best, strict=True)]
    by_k = {k: _mean([g for g, p in zip(greedy, ps, strict=True) if p.k == k]) for k in range(1, arith.MAX_STEPS + 1)}
    result = {"name": name, "n": n, "greedy": _mean(greedy), "greedy_by_k": by_k}
    if spec(name).exit and samples:
        from hasten.zoo import layerskip

        result |= layerskip.evaluate(model, ps, [s[0] for s in best])
    if samples:
        ps = ps[:sampled]
        drawn = sample.sample(model, prompts[:sampled], 1.0, seed, copies=samples)
        result |= {"sampled_n": len(ps)} | votes(ps, drawn) | (best_of(ps, drawn, reward) if reward else {})
    return result | {"cpu_seconds": round(time.process_time() - start, 1)}


def votes(ps: list[arith.Problem], drawn: list[list[list[int]]]) -> dict:
    """Accuracy of one sample, of the majority and of any; and where the vote is wrong, its winner's mean share of the votes."""
    answers = [[arith.answer_of(tokenizer.decode(s)) for s in d] for d in drawn]
    k = len(answers[0])
    top = [Counter(a).most_common(1)[0] for a in answers]
    wrong = [count / k for (answer, count), p in zip(top, ps, strict=True) if answer != p.answer]
    return {
        "samples": k,
        "one_sample": _mean([a == p.answer for row, p in zip(answers, ps, strict=True) for a in row]),
        f"vote@{k}": 1 - len(wrong) / len(ps),
        f"pass@{k}": _mean([p.answer in a for a, p in zip(answers, ps, strict=True)]),
        "modal_wrong_share": _mean(wrong),
        "wrong_votes_with_half": _mean([w >= 0.5 for w in wrong]),
    }


def best_of(ps: list[arith.Problem], drawn: list[list[list[int]]], reward: Llama) -> dict:
    """Best-of-k by the reward at the end, by the least reward of a step, and the vote weighted by the reward at the end."""
    k = len(drawn[0])
    prompts = [tokenizer.encode(p.prompt, bos=True) for p in ps for _ in range(k)]
    rewards = iter(step_rewards(reward, prompts, [s for d in drawn for s in d]))
    last = least = weighted = 0
    for p, d in zip(ps, drawn, strict=True):
        answers = [arith.answer_of(tokenizer.decode(s)) for s in d]
        scores = [next(rewards) for _ in d]
        last += answers[max(range(k), key=lambda i: scores[i][-1])] == p.answer
        least += answers[max(range(k), key=lambda i: min(scores[i]))] == p.answer
        weight: Counter = Counter()
        for a, s in zip(answers, scores, strict=True):
            weight[a] += s[-1]
        weighted += weight.most_common(1)[0][0] == p.answer
    n = len(ps)
    return {f"best_of_{k}_last": last / n, f"best_of_{k}_min": least / n, f"weighted_vote@{k}": weighted / n}


@torch.inference_mode()
def step_rewards(reward: Llama, prompts: list[list[int]], solutions: list[list[int]]) -> list[list[float]]:
    """The reward at every delimiter of each solution, the last one at its last token."""
    out: list[list[float]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]) + len(solutions[i]))
    for start in range(0, len(order), 256):
        part = order[start : start + 256]
        rows = [(prompts[i] + solutions[i])[: data.ROW] for i in part]
        ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
        for row, tokens in zip(ids, rows, strict=True):
            row[: len(tokens)] = torch.tensor(tokens)
        scores = reward.score(reward(ids, torch.arange(ids.shape[1]), None))[..., 0].sigmoid().tolist()
        for i, tokens, score in zip(part, rows, scores, strict=True):
            begin, end = len(prompts[i]), len(tokens) - 1
            out[i] = [score[j] for j in range(begin, end) if tokens[j] == tokenizer.STEP_END] + [score[end]]
    return out


def _mean(values: list) -> float:
    return round(sum(values) / len(values), 4) if values else 0.0


def main(names: list[str], report: Callable[[dict], None]) -> None:
    torch.set_num_threads(1)
    for name in names:
        report(evaluate(name))


if __name__ == "__main__":
    import json
    import sys

    main(sys.argv[1:], lambda r: print(json.dumps(r), flush=True))
