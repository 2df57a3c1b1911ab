"""Acceptance by coupling: the target chooses at every position with that position's own noise; a proposal is kept while it agrees.

What is committed is exactly what the target would have chosen one token at a time with the same noise, so the output is identical to
plain decoding at any temperature and whatever was proposed (the rule transformers uses for proposals without probabilities, made
reproducible by position-keyed noise).
"""

from __future__ import annotations

from collections.abc import Sequence


def coupled(proposal: Sequence[int], chosen: Sequence[int]) -> list[int]:
    """The agreed part of the proposal and the target's first choice after it; len(chosen) = len(proposal) + 1."""
    kept = 0
    while kept < len(proposal) and proposal[kept] == chosen[kept]:
        kept += 1
    return list(chosen[: kept + 1])
