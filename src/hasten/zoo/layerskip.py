"""Training that makes a model's exits usable: LayerSkip (Elhoushi et al. 2024, arXiv:2404.16710), for self-speculation through its first layers.

Two things are added to the training of a text model. Layer dropout: a layer is left out for some rows, deeper ones more often, up to `DROPPED`
at the last. Early-exit loss: hidden states after some layers go through the model's own last norm and head as well, and their losses are
added, weighted by depth; by the rotating curriculum a step asks every `APART`th layer, in turn, and always the last. One head serves all exits.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hasten import rng
from hasten.zoo import python
from hasten.zoo.model import Llama

DROPPED = 0.1  # share of rows that leave out the last layer
APART = 3  # layers between the exits that one step asks
SCALE = 1.0  # how much the exits weigh beside the last layer


def dropout(layer: int, layers: int) -> float:
    """Share of rows that leave out layer 0 .. layers - 1: rises exponentially with depth, from 0 to `DROPPED`."""
    return DROPPED * (math.exp(layer * math.log(2) / (layers - 1)) - 1) if layers > 1 else 0.0


def weights(step: int, layers: int) -> dict[int, float]:
    """{layer: share of the loss} at a step: an exit weighs as the sum of the depths up to its own, the last layer by its depth more."""
    last = layers - 1
    raw = {i: SCALE * i * (i + 1) / 2 for i in range(1, last) if i % APART == step % APART} | {last: last + SCALE * last * (last - 1) / 2}
    return {i: w / sum(raw.values()) for i, w in raw.items()}


def states(model: Llama, ids: Tensor, wanted: Collection[int], step: int | None = None) -> dict[int, Tensor]:
    """ids [B, T] -> {layer: hidden states [B, T, width] after it, normed}. step: names the noise of the layer dropout; None: none is left out."""
    layers, t = model.model.layers, ids.shape[1]
    x, rope = model.model.embed_tokens(ids), (model.cos[:t], model.sin[:t])
    found: dict[int, Tensor] = {}
    for i, layer in enumerate(layers):
        kept = [row for row in range(len(x)) if step is None or rng.uniform(step, i, row, "layer") >= dropout(i, len(layers))]
        if len(kept) == len(x):
            x = layer(x, rope, None, None)
        elif kept:
            x = x.index_copy(0, torch.tensor(kept), layer(x[kept], rope, None, None))
        if i in wanted:
            found[i] = model.model.norm(x)
    return found


def loss_of(model: Llama, tokens: Tensor, seed: int, step: int, done: float) -> Tensor:
    """Mean cross-entropy in nats of a step's batch, after a share `done` of training: of the last layer and this step's exits by their weights."""
    ids, following = python.batch(tokens, seed, step, python.length(done))
    share = weights(step, len(model.model.layers))
    found = states(model, ids, share, step)
    return torch.stack([w * F.cross_entropy(model.logits(found[i]).flatten(0, 1), following.flatten()) for i, w in share.items()]).sum()


def cut(model: Llama, layers: int) -> Llama:
    """The model up to an exit: its first layers under its norm and head; weights are shared."""
    short = Llama(replace(model.size, layers=layers))
    short.model.embed_tokens, short.model.norm = model.model.embed_tokens, model.model.norm
    short.model.layers = nn.ModuleList(model.model.layers[:layers])
    return short.eval()
