"""Training: the loss falls, a stopped run resumes to the same weights, saved models are transformers' own, sampling is right."""

import json

import pytest
import torch

from hasten import zoo
from hasten.zoo import arith, data, prm, reward, sample, tokenizer, train
from hasten.zoo.model import Llama, Size
from hasten.zoo.muon import orthogonalise


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HASTEN_CACHE", str(tmp_path))


def test_loss_falls_and_a_stopped_run_resumes_to_the_same_weights(tmp_path):
    losses = []
    train.train("arith-xs", out=tmp_path / "whole", steps=50, resume=False, progress=lambda p: losses.append(p["loss"]))
    assert losses[-1] < 3.4  # ln 46 = 3.83 at the start
    train.train("arith-xs", out=tmp_path / "parts", steps=50, resume=False, seconds=0.3)
    train.train("arith-xs", out=tmp_path / "parts", steps=50)
    whole, parts = sample.load("arith-xs", tmp_path / "whole"), sample.load("arith-xs", tmp_path / "parts")
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_lean_model_equals_transformers(tmp_path):
    from transformers import LlamaForCausalLM

    train.train("arith-xs", out=tmp_path / "m", steps=1, resume=False)
    theirs, mine = LlamaForCausalLM.from_pretrained(tmp_path / "m").float().eval(), sample.load("arith-xs", tmp_path / "m")
    ids = torch.tensor([data.tokens(arith.sample_problem(0, i, "test", k=3))[0] for i in range(4)])
    with torch.no_grad():
        torch.testing.assert_close(mine.logits(mine(ids, torch.arange(ids.shape[1]), None)), theirs(ids).logits, atol=2e-4, rtol=1e-3)


def test_cached_sampling_equals_recomputing_each_token():
    model = Llama(Size(32, 64, 2, 2), seed=1).eval()
    prompts = [tokenizer.encode(arith.sample_problem(0, i, "test", k=1 + i % 3).prompt, bos=True) for i in range(6)]
    for prompt, (got,) in zip(prompts, sample.sample(model, prompts, 0.0, 0, most=12), strict=True):
        ids = list(prompt)
        while len(ids) < len(prompt) + 12 and tokenizer.EOS not in ids[len(prompt) :]:
            with torch.no_grad():
                ids.append(int(model.logits(model(torch.tensor([ids]), torch.arange(len(ids)), None))[0, -1].argmax()))
        assert got == ids[len(prompt) :]


def test_packed_documents_do_not_see_each_other():
    b = data.batch(0, 0, 2, 3)
    mask = b.mask()[:, 0]
    assert not (mask & (b.documents[:, :, None] != b.documents[:, None, :])).any()
    assert (b.targets != -100).any() and b.positions.max() < data.ROW


def test_orthogonalise_gives_singular_values_near_one():
    values = torch.linalg.svdvals(orthogonalise(torch.randn(3, 16, 40, generator=torch.Generator().manual_seed(0))))
    assert values.min() > 0.5 and values.max() < 1.4


def test_names_that_do_not_exist_get_the_nearest():
    with pytest.raises(ValueError, match="arith-xs'"):
        zoo.path("arith-xxs")


def test_a_grown_model_computes_what_the_small_one_did():
    small, grown = Llama(Size(48, 96, 2, 4), seed=4).eval(), Llama(Size(48, 96, 6, 4), seed=5).eval()
    train.grow(grown, small)
    ids = torch.tensor([data.tokens(arith.sample_problem(0, 0, "test", k=2))[0]])
    with torch.no_grad():
        a, b = (m.logits(m(ids, torch.arange(ids.shape[1]), None)) for m in (small, grown))
    torch.testing.assert_close(a, b)


def test_new_weights_do_not_keep_an_old_card(tmp_path):
    out = train.train("arith-xs", out=tmp_path / "m", steps=1, resume=False)
    (out / "card.json").write_text("{}")
    train.train("arith-xs", out=out, steps=1, resume=False)
    assert not (out / "card.json").exists() and (out / "training.json").exists()


def random_labels(n, seed=0):
    """Labelled solutions without any model: true solutions, one step in some of them spoilt."""
    rows = []
    for i in range(n):
        p = arith.sample_problem(seed, i, "train")
        prompt, solution = tokenizer.encode(p.prompt, bos=True), tokenizer.encode(p.solution, eos=True)
        at = reward.delimiters(prompt, solution)
        rows.append(reward.Labelled(prompt + solution, at, [float(i % 3 > 0 or j < p.k // 2) for j in range(len(at))], p.k))
    return rows


def test_rewards_stand_at_the_ends_of_steps():
    for r in random_labels(20):
        assert len(r.at) == r.k + 1 == len(r.labels) and r.at[-1] == len(r.ids) - 1
        assert all(r.ids[j] == tokenizer.STEP_END for j in r.at[:-1])


def test_batches_hold_rows_of_similar_length_and_every_row_at_most_once_an_epoch():
    rows = random_labels(2 * prm.BATCH * 16 + 5)
    order = prm.batches(rows, seed=1)
    assert len(order) == prm.EPOCHS * 32 and all(len(b) == prm.BATCH for b in order)
    first = [id(r) for b in order[:32] for r in b]
    assert len(first) == len(set(first))
    spread = [max(len(r.ids) for r in b) - min(len(r.ids) for r in b) for b in order]
    assert sum(spread) / len(spread) < 30
    early, late = (sum(r.k for b in part for r in b) for part in (order[:16], order[16:32]))
    assert early < late


def test_labels_are_made_once_and_again_for_other_weights(tmp_path, monkeypatch):
    small = Llama(Size(32, 64, 1, 2), seed=1).eval()
    made = []
    monkeypatch.setattr(sample, "load", lambda name: small)
    monkeypatch.setattr(reward, "_digest", lambda policy: "one")
    monkeypatch.setattr(reward, "CHUNK", 3)
    whole = reward.label
    monkeypatch.setattr(reward, "label", lambda *a: made.append(a[0]) or whole(*a, size=3))
    first = reward.labels("arith-prm-s", range(2))
    assert reward.labels("arith-prm-s", range(2)) == first and made == [0, 1]
    monkeypatch.setattr(reward, "_digest", lambda policy: "two")
    reward.labels("arith-prm-s", range(1))
    assert made == [0, 1, 0]


def test_a_reward_model_trains_on_labels_and_is_saved_as_transformers_own(tmp_path, monkeypatch):
    rows = random_labels(prm.BATCH * 16)
    monkeypatch.setattr(reward, "labels", lambda *a: [rows, rows[:40]])
    monkeypatch.setattr(prm, "SPOT", 2)
    out = prm.train("arith-prm-s", out=tmp_path / "prm", steps=2, resume=False)
    record = json.loads((out / "training.json").read_text())
    assert record["solutions"] == len(rows) and 0 <= record["held_out_label_auc"] <= 1
    assert sample.load("arith-prm-s", out).score.weight.shape == (1, zoo.spec("arith-prm-s").width)


def test_replaced_results_are_where_they_are_said_to_be():
    clean, (b, replaced) = data.batch(3, 5, train.ROWS, 6), reward.spoilt(3, 5, 1.0)
    assert torch.equal(b.ids != clean.ids, replaced) and 15 <= replaced.sum() <= 40
    row, at = (int(i) for i in replaced.nonzero()[0])
    assert b.ids[row, at + 1] == tokenizer.STEP_END and b.ids[row, at - 1] == tokenizer.IDS["="]
    model = Llama(Size(32, 64, 3, 2), seed=1)
    loss = reward.spotting_loss(model, prm.topped(model, Llama(Size(32, 64, 1, 2), seed=2), 0), 3, 5, 1.0)
    loss.backward()
    assert 1.2 < loss.item() < 1.7  # two balanced questions, not learnt yet
    assert model.model.layers[0].mlp.up_proj.weight.grad is None and model.model.layers[1].mlp.up_proj.weight.grad is not None
