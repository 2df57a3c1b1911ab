"""Plain autoregressive decoding: one token a forward pass. The yardstick of every other technique."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hasten.lm.decode import Decode


@dataclass(frozen=True)
class Options:
    """Nothing to set."""


class Plain(Decode):
    """Proposes nothing."""


def build(options: Options, target: Any = None) -> Plain:
    return Plain()
