"""Training whose exits are usable: LayerSkip (Elhoushi et al. 2024, arXiv:2404.16710), for self-speculation through the first layers.

Two things are added to a model's training. Layer dropout: a layer is left out for some rows, deeper ones more often, up to `DROPPED` at the
last. Early-exit loss: hidden states after some layers go through the model's own last norm and head as well, and their losses are added,
weighted by depth; by the rotating curriculum a step asks every `APART`th layer, in turn, and always the last. One head serves all exits.

The model begins as a smaller one with layers behind it that add nothing (`train.grow`), so its first exits are good from the start.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hasten import rng
from hasten.zoo import arith, data, sample, tokenizer
from hasten.zoo.model import Llama

DROPPED = 0.1  # share of rows that leave out the last layer
APART = 3  # layers between the exits that one step asks
ALONE, AGREE = 500, 200  # problems that the card measures exits on
SCALE = 1.0  # how much the exits weigh beside the last layer


def dropout(layer: int, layers: int) -> float:
    """Share of rows that leave out layer 0 .. layers - 1: rises exponentially with depth, from 0 to `DROPPED`."""
    return DROPPED * (math.exp(layer * math.log(2) / (layers - 1)) - 1) if layers > 1 else 0.0


def weights(step: int, layers: int) -> dict[int, float]:
    """{layer: share of the loss} at a step: an exit weighs as the sum of the depths up to its own, the last layer by its depth more."""
    last = layers - 1
    raw = {i: SCALE * i * (i + 1) / 2 for i in range(1, last) if i % APART == step % APART} | {last: last + SCALE * last * (last - 1) / 2}
    return {i: w / sum(raw.values()) for i, w in raw.items()}


def states(
    model: Llama, ids: Tensor, wanted: Collection[int], positions: Tensor | None = None, mask: Tensor | None = None, step: int | None = None
) -> dict[int, Tensor]:
    """ids [B, T] -> {layer: hidden states [B, T, width] after it, normed}. positions [B, T], mask: of packed documents.

    step: names the noise of the layer dropout; None: no layer is left out.
    """
    layers = model.model.layers
    x = model.model.embed_tokens(ids)
    at = torch.arange(ids.shape[1]).expand_as(ids) if positions is None else positions
    rope = (model.cos[at][:, None], model.sin[at][:, None])
    found: dict[int, Tensor] = {}
    for i, layer in enumerate(layers):
        kept = [row for row in range(len(x)) if step is None or rng.uniform(step, i, row, "layer") >= dropout(i, len(layers))]
        if len(kept) == len(x):
            x = layer(x, rope, mask, None)
        elif kept:
            some = layer(x[kept], (rope[0][kept], rope[1][kept]), None if mask is None else mask[kept], None)
            x = x.index_copy(0, torch.tensor(kept), some)
        if i in wanted:
            found[i] = model.model.norm(x)
    return found


def loss_of(model: Llama, b: data.Batch, step: int) -> Tensor:
    """Mean cross-entropy over the solutions' tokens in nats, of the last layer and this step's exits by their weights."""
    share, asked = weights(step, len(model.model.layers)), b.targets != -100
    found = states(model, b.ids, share, b.positions, b.mask(), step)
    return torch.stack([w * F.cross_entropy(model.logits(found[i][asked]), b.targets[asked]) for i, w in share.items()]).sum()


def cut(model: Llama, layers: int) -> Llama:
    """The model up to an exit: its first layers under its norm and head; weights are shared."""
    short = Llama(replace(model.size, layers=layers))
    short.model.embed_tokens, short.model.norm = model.model.embed_tokens, model.model.norm
    short.model.layers = nn.ModuleList(model.model.layers[:layers])
    return short.eval()


@torch.inference_mode()
def agreement(model: Llama, prompts: list[list[int]], answers: list[list[int]]) -> dict[str, dict[str, float]]:
    """{layers: how often the whole model accepts what an exit after so many proposes}, at the answers' tokens, the text before being the same:
    greedy, and drawn from its law (1 - TV)."""
    layers = len(model.model.layers)
    same, overlap, total = [0] * layers, [0.0] * layers, 0
    for prompt, answer in zip(prompts, answers, strict=True):
        at = slice(len(prompt) - 1, len(prompt) + len(answer) - 1)
        found = states(model, torch.tensor([prompt + answer]), range(layers))
        laws = [model.logits(found[i][0, at]).softmax(-1) for i in range(layers)]
        for i, law in enumerate(laws):
            same[i] += int((law.argmax(-1) == laws[-1].argmax(-1)).sum())
            overlap[i] += float(torch.minimum(law, laws[-1]).sum())
        total += len(answer)
    return {
        str(i + 1): {"greedy_acceptance": round(same[i] / total, 4), "acceptance": round(overlap[i] / total, 4)} for i in range(layers - 1)
    }


def evaluate(model: Llama, problems: list[arith.Problem], answers: list[list[int]]) -> dict:
    """What the card says of each exit: accuracy of the first layers alone, greedy, on ALONE problems, and `agreement` on the model's own greedy
    answers to AGREE of them."""
    prompts = [tokenizer.encode(p.prompt, bos=True) for p in problems]
    found = agreement(model, prompts[:AGREE], answers[:AGREE])
    for layers, rates in found.items():
        got = sample.sample(cut(model, int(layers)), prompts[:ALONE], 0.0, 0)
        right = [arith.answer_of(tokenizer.decode(s[0])) == p.answer for s, p in zip(got, problems, strict=False)]
        rates["alone"] = round(sum(right) / len(right), 4)
    return {f"exit {layers}": rates for layers, rates in found.items()}
