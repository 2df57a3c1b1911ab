"""The ledger: what a request cost, for each model it touched.

Counts are additive, so a strategy's usage is the sum of what it asked for. Seconds are not summed: they are wall time of the outermost request.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields


@dataclass(frozen=True, slots=True)
class Cost:
    """What one model did for one request.

    prompt: prompt positions asked for; reused: those of them found in a cache, not computed; generated: tokens committed;
    scored: positions scored; forwards: forward passes this request took part in; flops: analytic, attention and head included;
    bytes: what those passes had to read: the weights, shared evenly by the rows of a pass, and the request's own cache.
    proposed, accepted: speculative tokens sent to a forward pass, and those that were kept.
    saved: forward passes that were not needed, because what they would have chosen was forced.
    """

    prompt: int = 0
    reused: int = 0
    generated: int = 0
    scored: int = 0
    forwards: int = 0
    flops: float = 0.0
    bytes: float = 0.0
    proposed: int = 0
    accepted: int = 0
    saved: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


@dataclass(frozen=True, slots=True)
class Usage:
    """Costs by role ("target", "draft", "reward"), wall `seconds`, `ttft` (time to first token) and `tpot` (time per later token), in seconds."""

    by_role: Mapping[str, Cost] = field(default_factory=dict)
    seconds: float = 0.0
    ttft: float = 0.0
    tpot: float = 0.0
    peak_bytes: int = 0

    @property
    def total(self) -> Cost:
        return sum(self.by_role.values(), Cost())


def add_costs(usages: Iterable[Usage]) -> dict[str, Cost]:
    """Sum of the costs of several usages, role by role."""
    out: dict[str, Cost] = {}
    for usage in usages:
        for role, cost in usage.by_role.items():
            out[role] = out.get(role, Cost()) + cost
    return out
