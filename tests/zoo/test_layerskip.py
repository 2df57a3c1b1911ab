"""LayerSkip's training: the shares of its loss, whose layers are left out, and what an exit is."""

import pytest
import torch

from hasten.zoo import arith, data, layerskip, sample, tokenizer, train
from hasten.zoo.model import Llama, Size
from hasten.zoo.muon import Muon

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


def test_packed_documents_do_not_see_each_other_at_an_exit_either():
    m, b = model(), data.batch(0, 0, 2, 3)
    with torch.no_grad():
        got = layerskip.states(m, b.ids, [3], b.positions, b.mask())[3]
        torch.testing.assert_close(got, m(b.ids, b.positions, b.mask()))


def test_the_loss_teaches_all_layers_and_falls():
    m = Llama(Size(32, 64, 4, 2), seed=1)
    optimizer = Muon(m, lr=0.004)
    losses = []
    for step in range(8):
        loss = layerskip.loss_of(m, data.batch(0, step, 2, 1), step)
        loss.backward()
        assert all(p.grad is not None for p in m.parameters())
        optimizer.step(1.0)
        m.zero_grad(set_to_none=True)
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1


def test_a_model_grown_in_front_answers_as_the_small_one_at_its_exit():
    small, grown = Llama(Size(32, 64, 2, 2), seed=1).eval(), Llama(Size(32, 64, 6, 2), seed=2).eval()
    train.grow(grown, small, front=True)
    prompts = [tokenizer.encode(arith.sample_problem(0, i, "test", k=1).prompt, bos=True) for i in range(2)]
    answers = [s[0] for s in sample.sample(small, prompts, 0.0, 0, most=8)]
    found = layerskip.agreement(grown, prompts, answers)
    assert {layers: (r["greedy_acceptance"], r["acceptance"]) for layers, r in found.items() if int(layers) > 1} == dict.fromkeys(
        "2345", (1, 1)
    )
    assert found["1"]["acceptance"] < 1
