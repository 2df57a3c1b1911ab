"""Batched sampling with a key-value cache, for rollouts and for measuring a card.

Problems of one K have prompts of one length, so rows are grouped by length and nothing is padded; a group's rows end within a few tokens of
each other. Finished rows leave the batch when half of it is done.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from hasten.zoo import path, spec, tokenizer
from hasten.zoo.model import Llama, Size

BATCH = 512
SHAPE = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
    "max_position_embeddings",
)  # config.json's names of Size's fields


def load(name: str, directory: str | Path | None = None) -> Llama:
    """A shipped model's weights (or those in `directory`) in the lean Llama, fp32; a reward model has `score` [1, width] as well."""
    from safetensors.torch import load_file

    folder = Path(directory or path(name))
    c = json.loads((folder / "config.json").read_text())
    model = Llama(Size(*(c[field] for field in SHAPE)))
    if spec(name).kind == "reward":
        model.score = torch.nn.Linear(model.size.width, 1)
    model.load_state_dict({k: v.float() for k, v in load_file(folder / "model.safetensors").items() if k != "lm_head.weight"})
    return model.eval()


@torch.inference_mode()
def sample(
    model: Llama, prefixes: list[list[int]], temperature: float, seed: int, copies: int = 1, most: int = 110
) -> list[list[list[int]]]:
    """Continue each prefix `copies` times, to <eos> or `most` tokens: [prefix][copy] -> new token ids. temperature 0 is greedy."""
    out: list[list[list[int]]] = [[] for _ in prefixes]
    groups: dict[int, list[int]] = {}
    for i, p in enumerate(prefixes):
        groups.setdefault(len(p), []).append(i)
    generator = torch.Generator().manual_seed(seed)
    rows = max(1, BATCH // copies)
    for length in sorted(groups):
        for start in range(0, len(groups[length]), rows):
            part = groups[length][start : start + rows]
            ids = torch.tensor([prefixes[i] for i in part])
            for n, tokens in enumerate(_group(model, ids, temperature, generator, copies, min(most, model.size.positions - length))):
                out[part[n // copies]].append(tokens)
    return out


def _group(model: Llama, ids: Tensor, temperature: float, generator: torch.Generator, copies: int, most: int) -> list[list[int]]:
    b, t = ids.shape
    size = model.size
    shape = (b, size.heads, t + most, size.width // size.heads)
    caches = [(torch.empty(shape), torch.empty(shape)) for _ in range(size.layers)]
    hidden = model(ids, torch.arange(t), None, [(k, v, 0) for k, v in caches])[:, -1]
    if copies > 1:
        caches = [(k.repeat_interleave(copies, 0), v.repeat_interleave(copies, 0)) for k, v in caches]
        hidden = hidden.repeat_interleave(copies, 0)
    done: list[list[int]] = [[] for _ in range(b * copies)]
    rows = torch.arange(b * copies)  # which result each live row belongs to
    written = torch.empty(b * copies, 0, dtype=torch.int64)
    for i in range(most):
        token = _choose(model.logits(hidden), temperature, generator)
        written = torch.cat([written, token[:, None]], 1)
        live = ~(written == tokenizer.EOS).any(1)
        if i + 1 == most or not live.any() or live.sum() * 2 < len(live):
            for r, tokens in zip(rows.tolist(), written.tolist(), strict=True):
                done[r] = tokens[: tokens.index(tokenizer.EOS) + 1] if tokenizer.EOS in tokens else tokens
            if i + 1 == most or not live.any():
                break
            rows, written, token = rows[live], written[live], token[live]
            caches = [(k[live], v[live]) for k, v in caches]
        hidden = model(token[:, None], torch.tensor([t + i]), None, [(k, v, t + i) for k, v in caches])[:, -1]
    return done


def _choose(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    if temperature == 0:
        return logits.argmax(-1)
    return torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)[:, 0]
