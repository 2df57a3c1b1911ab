"""transformers as a rival (`serving`): the forward pass that `generate` does at each step, without what `generate` adds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from serving import Rival, main
from transformers import AutoModelForCausalLM, DynamicCache


class Transformers(Rival):
    def __init__(self, folder: Path, kind: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.facts = {"version": f"transformers {transformers.__version__}", "weights": "fp32", "cache": "fp32"}

    def forget(self) -> None:
        self.cache = DynamicCache(config=self.model.config)

    def prompt(self, rows: Sequence[Sequence[int]]) -> None:
        self.infer(torch.tensor(rows))
        self.choose()

    def forward(self) -> None:
        self.infer(torch.tensor(self.tokens)[:, None])

    def infer(self, ids: torch.Tensor) -> None:
        with torch.inference_mode():
            out = self.model(ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.logits = out.logits[:, -1].numpy()


if __name__ == "__main__":
    main(Transformers)
