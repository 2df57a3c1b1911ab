"""Training whose exits are usable: LayerSkip (Elhoushi et al. 2024, arXiv:2404.16710), for self-speculation through the first layers.

Two things are added to a model's training. Layer dropout: a layer is left out for some rows, deeper ones more often, up to `DROPPED` at the
last. Early-exit loss: hidden states after some layers go through the model's own last norm and head as well, and their losses are added,
weighted by depth; by the rotating curriculum a step asks every `APART`th layer, in turn, and always the last. One head serves all exits.

The model begins as a smaller one with layers behind it that add nothing (`train.grow`), so its first exits are good from the start.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from hasten import rng
from hasten.zoo import arith, data, sample, tokenizer
from hasten.zoo.model import Llama

DROPPED = 0.1  # share of rows that leave out the last layer
APART = 3  # layers between the exits that one step asks
SCALE = 1.0  # how much the exits weigh beside the last layer


def dropout(layer: int, layers: int) -> float:
    """Share of rows that leave out layer 0 .. layers - 1: rises exponentially with depth, from 0 to `DROPPED`."""
    return DROPPED * (math.exp(layer * math.log(2) / (layers - 1)) - 1) if layers > 1 else 0.0


def weights(step: int, layers: int) -> dict[int, float]:
    """{layer: share of the loss} at a step: exits weigh by the sum of the depths up to theirs, the last layer its depth more; sums to one."""
    sums = {i: SCALE * i * (i + 1) / 2 for i in range(layers - 1) if i % APART == step % APART}
    last = layers - 1 + SCALE * (layers - 2) * (layers - 1) / 2
    whole = sum(sums.values()) + last
    return {i: w / whole for i, w in sums.items() if w} | {layers - 1: last / whole}


def states(
    model: Llama, ids: Tensor, wanted: Sequence[int], positions: Tensor | None = None, mask: Tensor | None = None, step: int | None = None
) -> dict[int, Tensor]:
    """{layer: hidden states [B, T, width] after it, normed}. ids [B, T]; positions, mask: of packed documents.

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
            at = torch.tensor(kept)
            x = x.index_copy(0, at, layer(x[at], (rope[0][at], rope[1][at]), None if mask is None else mask[at], None))
        if i in wanted:
            found[i] = model.model.norm(x)
    return found


def loss_of(model: Llama, b: data.Batch, step: int) -> Tensor:
    """Mean cross-entropy over the solutions' tokens in nats, of the last layer and this step's exits by their weights."""
    asked = b.targets != -100
    found = states(model, b.ids, [*weights(step, len(model.model.layers))], b.positions, b.mask(), step)
    return _weighted(model, {i: x[asked] for i, x in found.items()}, b.targets[asked], step)


def text_loss_of(model: Llama, ids: Tensor, following: Tensor, step: int) -> Tensor:
    """The same of text: ids and the tokens that follow them [B, T]."""
    found = states(model, ids, [*weights(step, len(model.model.layers))], step=step)
    return _weighted(model, {i: x.flatten(0, 1) for i, x in found.items()}, following.flatten(), step)


def _weighted(model: Llama, found: dict[int, Tensor], targets: Tensor, step: int) -> Tensor:
    share = weights(step, len(model.model.layers))
    return torch.stack([w * F.cross_entropy(model.logits(found[i]), targets) for i, w in share.items()]).sum()


def cut(model: Llama, layers: int) -> Llama:
    """The model up to an exit: its first layers, its norm and head; weights are shared."""
    from dataclasses import replace

    short = Llama.__new__(Llama)
    torch.nn.Module.__init__(short)
    short.size, short.cos, short.sin = replace(model.size, layers=layers), model.cos, model.sin
    short.model = torch.nn.Module()
    short.model.embed_tokens, short.model.norm = model.model.embed_tokens, model.model.norm
    short.model.layers = model.model.layers[:layers]
    return short


@torch.inference_mode()
def agreement(model: Llama, prompts: list[list[int]], answers: list[list[int]]) -> dict[str, float]:
    """{layers: share of the answers' tokens that an exit after so many layers would have chosen as well}, the text before it being the same:
    the chance that a greedy proposal is kept. answers: the model's own greedy ones."""
    right, total = dict.fromkeys(range(len(model.model.layers)), 0), 0
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([prompt + answer])
        wanted = ids[0, len(prompt) :]
        for i, x in states(model, ids, [*right]).items():
            right[i] += int((model.logits(x[0, len(prompt) - 1 : -1]).argmax(-1) == wanted).sum())
        total += len(answer)
    return {str(i + 1): round(n / total, 4) for i, n in right.items()}


def evaluate(model: Llama, problems: list[arith.Problem], answers: list[list[int]], exits: int = 500, texts: int = 200) -> dict:
    """What the card says of the exits: greedy accuracy of each alone on the first `exits` problems, and `agreement` on `texts` answers."""
    prompts = [tokenizer.encode(p.prompt, bos=True) for p in problems]
    alone = {}
    for layers in range(1, len(model.model.layers)):
        got = sample.sample(cut(model, layers), prompts[:exits], 0.0, 0)
        right = [arith.answer_of(tokenizer.decode(s[0])) == p.answer for s, p in zip(got, problems, strict=False)]
        alone[str(layers)] = round(sum(right) / len(right), 4)
    return {"exit_greedy": alone, "exit_agreement": agreement(model, prompts[:texts], answers[:texts])}
