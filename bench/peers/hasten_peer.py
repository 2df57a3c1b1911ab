"""hasten as a rival of itself and of the others (`serving`): steps of the public TokenEngine; KIND: plain, native, bf16, int8 or int4."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from serving import Rival, main

import hasten
from hasten.lm.engine import TokenEngine
from hasten.native import build
from hasten.recipe import Recipe, Use
from hasten.values import Request, Sampling

ENDLESS = 1024  # tokens, more than a benchmark asks for


class Hasten(Rival):
    def __init__(self, folder: Path, kind: str, threads: int) -> None:
        recipe = Recipe(str(folder), () if kind == "plain" else (Use("native", {"dtype": "bf16"}) if kind == "bf16" else Use(kind),))
        engine = hasten.load(recipe, device="cpu", max_rows=32, threads=threads).engine
        assert isinstance(engine, TokenEngine)
        self.engine, self.rows = engine, 0
        self._watch()
        weights = kind if kind in ("bf16", "int8", "int4") else "fp32"
        self.facts = {
            "version": f"hasten {hasten.__version__}", "weights": weights, "cache": "fp32", "compiled_seconds": build.seconds,
            "fused": getattr(engine.model, "small_step", None) is not None,
        }  # fmt: skip

    def forget(self) -> None:
        for key in range(self.rows):
            self.engine.cancel(key)
        while not self.engine.idle:
            self.engine.step()
        self.engine.cache.forget()
        self.rows = 0

    def prompt(self, rows: Sequence[Sequence[int]]) -> None:
        self.rows = len(rows)
        for key, row in enumerate(rows):
            self.engine.add(key, Request(row, Sampling(max_tokens=ENDLESS, ignore_eos=True)))
        begun: set[Any] = set()
        while len(begun) < len(rows):
            begun |= self._step()

    def step(self) -> float:
        before = self.engine.forward_seconds
        self._step()
        return self.engine.forward_seconds - before

    def _step(self) -> set[Any]:
        """One step of the engine; the keys of rows that got a token."""
        events = self.engine.step()
        self.tokens = [event.tokens[-1] for event in events if event.tokens]
        return {event.key for event in events if event.tokens}

    def _watch(self) -> None:
        """Keep the logits of each pass, which the engine's users do not get."""
        forward = self.engine._forward

        def kept(works: Any) -> torch.Tensor:
            logits = forward(works)
            self.logits = logits.numpy()
            return logits

        object.__setattr__(self.engine, "_forward", kept)


if __name__ == "__main__":
    main(Hasten)
