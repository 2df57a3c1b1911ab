"""How many next steps each partial solution gets: a width shared out by a softmax of rewards (REBASE, Wu et al. 2024, arXiv:2408.00724).

Every share of the width is a real number and must become a whole one. `largest-remainder` (the default) gives each its whole part and what is
left to the greatest fractions, so the width is kept exactly and equals stay equal. The paper writes `round`, which keeps the width in about half
of all cases only. The released code takes `ceil` one after the other, from the best downwards, of what is left: the best are rounded up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence


def shares(scores: Sequence[float], temperature: float) -> list[float]:
    """softmax(scores / temperature)."""
    most = max(scores)
    weights = [math.exp((s - most) / temperature) for s in scores]
    total = math.fsum(weights)
    return [w / total for w in weights]


def largest_remainder(scores: Sequence[float], width: int, temperature: float) -> list[int]:
    """Whole numbers that sum to width; ties go to the greater score, then to the one that came first."""
    exact = [width * s for s in shares(scores, temperature)]
    out = [math.floor(x + 1e-9) for x in exact]  # 3 * (1 / 3) is 1
    order = sorted(range(len(scores)), key=lambda i: (-round(exact[i] - out[i], 9), -scores[i], i))
    for i in order[: width - sum(out)]:
        out[i] += 1
    return out


def rounded(scores: Sequence[float], width: int, temperature: float) -> list[int]:
    """The nearest whole numbers (halves to the even one), whose sum may be more or less than width."""
    return [round(width * s) for s in shares(scores, temperature)]


def ceilings(scores: Sequence[float], width: int, temperature: float) -> list[int]:
    """From the best downwards: the ceiling of its share of the width that is left, among those that are left."""
    weights = shares(scores, temperature)
    out, left, total = [0] * len(scores), width, math.fsum(weights)
    for i in sorted(range(len(scores)), key=lambda i: (-scores[i], i)):
        if left <= 0 or total <= 0:
            break
        out[i] = min(left, math.ceil(left * weights[i] / total - 1e-9))
        left, total = left - out[i], total - weights[i]
    return out


ROUNDINGS: dict[str, Callable[[Sequence[float], int, float], list[int]]] = {
    "largest-remainder": largest_remainder, "round": rounded, "ceil": ceilings,
}  # fmt: skip
