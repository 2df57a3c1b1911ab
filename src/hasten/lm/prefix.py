"""Prefix reuse: what another request has computed already is never prefilled again (vLLM's and SGLang's prefix caching).

It is on by default, exact, and free; `+prefix(share=false)` turns it off, to measure what it brings.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Options:
    """share: reuse the longest common prefix with any running or retained row. retained: finished rows kept for that at most."""

    share: bool = True
    retained: int = 32


def build(options: Options, target: Any = None) -> dict[str, Any]:
    """Keyword arguments of `TokenEngine`."""
    return {"share": options.share, "retained": options.retained if options.share else 0}
