"""The theory of speculative decoding as functions on arrays: what rejections must cost, and what any lossy knob can gain.

p is the draft's distribution and q the target's, as in Yin, Chen, Huang and Wang 2024 (arXiv:2411.00841), whose theorems these are; chains are
arrays [T, V, V] of transition rows, position n's law given the token before it. TV is total variation.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def tv(p: Array, q: Array) -> Array:
    """Total variation along the last axis: [..., V] -> [...]; 1 - TV is the probability that a drafted token is accepted."""
    return 0.5 * np.abs(p - q).sum(-1)


def residual(p: Array, q: Array) -> Array:
    """What a rejected token is drawn from: (q - p)+ normalised, and q itself where nothing is left. [..., V] -> [..., V]."""
    left = np.maximum(q - p, 0.0)
    mass = left.sum(-1, keepdims=True)
    return np.where(mass > 0, left / np.where(mass > 0, mass, 1.0), q)


def expected_rejections(p: Array, q: Array, start: int = 0, drafts: int = 1) -> float:
    """E[rejections] of T tokens drafted to the end each time: theorem 1 (one draft) and theorem 3 (M drafts, the first position after a
    rejection tries each in turn). p, q [T, V, V].

    The recursion carries two measures over the last token: its law under q, and that of being output at a rejection (`fresh`).
    """
    at, fresh = np.eye(q.shape[-1])[start], np.eye(q.shape[-1])[start]
    total = 0.0
    for p_n, q_n in zip(p, q, strict=True):
        first = tv(p_n, q_n)
        every, last = _all_rejected(p_n, q_n, drafts)
        total += float((at - fresh) @ first + fresh @ every)
        fresh = ((at - fresh) * first) @ residual(p_n, q_n) + (fresh * every) @ last
        at = at @ q_n
    return total


def _all_rejected(p: Array, q: Array, drafts: int) -> tuple[Array, Array]:
    """Probability that each of M independent drafts is rejected in turn, and what is drawn then: [V], [V, V]."""
    every, left = np.ones(q.shape[:-1]), q
    for _ in range(drafts):
        every = every * tv(p, left)
        left = residual(p, left)
    return every, left


def simulate(p: Array, q: Array, start: int, runs: int, drafts: int = 1, seed: int = 0) -> tuple[Array, NDArray[np.int64]]:
    """The algorithm itself, `runs` times side by side: (rejections [runs], the tokens [runs, T])."""
    rng = np.random.default_rng(seed)
    last, fresh = np.full(runs, start), np.ones(runs, bool)
    rejections, out = np.zeros(runs), np.empty((runs, len(q)), np.int64)
    for n, (p_n, q_n) in enumerate(zip(p, q, strict=True)):
        draft, target = p_n[last], q_n[last]
        token, done = np.zeros(runs, np.int64), np.zeros(runs, bool)
        for m in range(drafts):
            tried = np.nonzero(~done & (fresh | (m == 0)))[0]
            x = _drawn(rng, draft[tried])
            ok = rng.random(len(tried)) * draft[tried, x] < target[tried, x]
            token[tried[ok]], done[tried[ok]] = x[ok], True
            target[tried[~ok]] = residual(draft[tried[~ok]], target[tried[~ok]])
        token[~done] = _drawn(rng, target[~done])
        rejections += ~done
        out[:, n], last, fresh = token, token, ~done
    return rejections, out


def _drawn(rng: np.random.Generator, laws: Array) -> NDArray[np.int64]:
    """One token a row of [N, V]."""
    edges = laws.cumsum(-1)
    return (rng.random((len(laws), 1)) * edges[:, -1:] >= edges).sum(-1)


# --- one position, lossy acceptance (theorems 4 and 5) -----------------------------------------------------------------------------------


def over_acceptance(p: Array, q: Array, epsilon: float) -> Array:
    """The paper's lossy knob: b(x) = min(1, (q(x) + epsilon) / p(x)); epsilon = 0 is the exact rule."""
    return np.minimum(1.0, (q + epsilon) / np.where(p > 0, p, 1.0))


def ensemble_acceptance(p: Array, q: Array, weight: float) -> Array:
    """transformers' `assistant_ensemble_weight` w: b(x) = min(1, 1 - w + w q(x) / p(x)); w = 1 is the exact rule, 0 takes everything."""
    return np.minimum(1.0, 1.0 - weight + weight * q / np.where(p > 0, p, 1.0))


def output_law(b: Array, p: Array, rejected: Array) -> Array:
    """The law of what is emitted with acceptance b and `rejected` as the law after a rejection: b p + rejected P(rejection)."""
    return b * p + rejected * ((1 - b) * p).sum(-1, keepdims=True)


def least_bias(b: Array, p: Array, q: Array) -> Array:
    """The least TV from q that any law after a rejection can reach with acceptance b (theorem 4)."""
    return 0.5 * np.abs(q - b * p).sum(-1) - 0.5 * ((1 - b) * p).sum(-1)


def optimal_residual(b: Array, p: Array, q: Array) -> Array:
    """One law after a rejection that reaches `least_bias`: (q - b p)+ normalised; for the exact b it is `residual`."""
    return residual(b * p, q)


# --- what a schedule is worth ------------------------------------------------------------------------------------------------------------


def tokens_a_round(acceptance: float, k: int) -> float:
    """Tokens of one round with k drafted ones, each accepted independently (Leviathan et al. 2023, arXiv:2211.17192): (1 - a^(k+1)) / (1 - a)."""
    return float(k + 1) if acceptance >= 1 else (1 - acceptance ** (k + 1)) / (1 - acceptance)


def speedup(acceptance: float, k: int, ratio: float, verify: float = 1.0) -> float:
    """Over one token a pass: ratio = target's time over draft's; verify = time of a pass over k + 1 tokens, in passes over one."""
    return tokens_a_round(acceptance, k) / (k / ratio + verify)


def pearl_tokens(acceptance: float, k: int) -> float:
    """Tokens an iteration of PEARL (Liu et al. 2024, arXiv:2408.11850), from its state machine: 1/(1-a) a rejection, 1 + a/(1-a^k) iterations."""
    if acceptance >= 1:
        return float(k)
    return 1 / (1 - acceptance) / (1 + acceptance / (1 - acceptance**k)) if acceptance > 0 else 1.0
