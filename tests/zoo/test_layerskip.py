"""LayerSkip's training: the shares of its loss, whose layers are left out, and what an exit is."""

import math

import pytest
import torch

from hasten.zoo import layerskip, python
from hasten.zoo.model import Llama, Size

IDS = torch.randint(0, 46, (6, 20), generator=torch.Generator().manual_seed(0))


def model(layers=4):
    return Llama(Size(32, 64, layers, 2), seed=1).eval()


def test_a_steps_shares_rotate_sum_to_one_and_rise_with_depth():
    steps = [layerskip.weights(step, 12) for step in range(layerskip.APART)]
    assert all(sum(share.values()) == pytest.approx(1) and 11 in share for share in steps)
    assert sorted(i for share in steps for i in share if i < 11) == list(range(1, 11))
    for share in steps:
        assert [*share.values()] == sorted(share.values())
    rates = [layerskip.dropout(i, 12) for i in range(12)]
    assert rates[0] == 0 and rates == sorted(rates) and rates[-1] == pytest.approx(layerskip.DROPPED)


def test_states_are_those_of_the_model_and_of_its_cuts():
    m = model()
    with torch.no_grad():
        found = layerskip.states(m, IDS, range(4))
        torch.testing.assert_close(found[3], m(IDS, torch.arange(20), None))
        torch.testing.assert_close(found[1], layerskip.cut(m, 2)(IDS, torch.arange(20), None))
    assert len(m.model.layers) == 4


def test_rows_that_leave_out_a_layer_are_those_that_the_noise_names(monkeypatch):
    m = model(2)
    monkeypatch.setattr(layerskip, "dropout", lambda layer, layers: 0.5 * layer)
    with torch.no_grad():
        first, last = layerskip.states(m, IDS, [0, 1], step=3).values()
        whole = layerskip.states(m, IDS, [1])[1]
    left_out = [torch.equal(a, b) for a, b in zip(first, last, strict=True)]
    assert 0 < sum(left_out) < 6
    for row, out in enumerate(left_out):
        assert out or torch.allclose(last[row], whole[row], atol=1e-6)
    with torch.no_grad():
        assert torch.equal(layerskip.states(m, IDS, [1], step=3)[1], last)


def test_the_loss_teaches_all_layers_and_falls():
    m = Llama(Size(32, 64, 4, 2, vocabulary=64, positions=256), seed=1)
    python.shrink(m)
    tokens = torch.arange(20_000) % 61
    optimizer = torch.optim.Adam(m.parameters(), lr=3e-3)
    losses = []
    for step in range(6):
        loss = layerskip.loss_of(m, tokens, 0, step, 0.0)
        loss.backward()
        assert all(p.grad is not None for p in m.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(64), abs=0.2) and losses[-1] < losses[0] - 0.2
