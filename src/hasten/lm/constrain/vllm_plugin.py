"""A logits processor for vLLM's V1 engine that keeps requests to an item set.

    LLM(model, logits_processors=[TrieProcessor], additional_config={"hasten_tries": {"week": "DIR"}})
    SamplingParams(extra_args={"trie": "week"})

Sets are artifacts (`hasten.lm.constrain.trie.build(...).save(DIR)`), read once when the server starts. A request that names none is left alone.
vLLM's own speculative decoding does not take custom processors. Written for the interface of vllm.v1.sample.logits_processor (BatchUpdate:
removed, added, moved, in this order); its newer model runner has another one.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.sample.logits_processor import LogitsProcessor

from hasten.lm.constrain import trie as tries
from hasten.lm.constrain.processor import Places

OPTION = "trie"


class TrieProcessor(LogitsProcessor):
    """One of a server; `Places` knows where each request stands."""

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """ValueError where `extra_args` names the set with anything but a word; whether there is such a set is seen when the request is added."""
        name = (sampling_params.extra_args or {}).get(OPTION)
        if name is not None and not isinstance(name, str):
            raise ValueError(f"extra_args: {OPTION}={name!r} is not the name of an item set")

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        model = vllm_config.model_config
        named = (vllm_config.additional_config or {}).get("hasten_tries", {})
        self.sets = {name: tries.load(path, model.get_vocab_size(), device) for name, path in named.items()}
        ends = model.hf_config.eos_token_id
        self.end_ids = [ends] if isinstance(ends, int) else list(ends)
        self.places = Places()

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: Any) -> None:
        """Rows that left, came and moved; tokens need no update, for the lists of the requests grow by themselves."""
        if batch_update is None:
            return
        for row in batch_update.removed:
            self.places.drop(row)
        for row, params, _, tokens in batch_update.added:
            name = (params.extra_args or {}).get(OPTION)
            if name is None:
                self.places.drop(row)
            elif name in self.sets:
                self.places.put(row, self.sets[name], tokens)
            else:
                raise ValueError(f"extra_args: there is no item set {name!r}; there are: {', '.join(sorted(self.sets)) or 'none'}")
        for a, b, how in batch_update.moved:
            self.places.move(a, b, swap=how.name == "SWAP")

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        return self.places.masked(logits, self.end_ids)
