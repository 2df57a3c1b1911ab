"""Training: the loss falls, a stopped run resumes to the same weights, saved models are transformers' own, sampling is right."""

import pytest
import torch

from hasten import zoo
from hasten.zoo import arith, data, sample, tokenizer, train
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
    small, grown = sample.load("arith-s"), Llama(train.size(zoo.spec("arith-m")), seed=5)
    train.grow(grown, "arith-s")
    ids = torch.tensor([data.tokens(arith.sample_problem(0, 0, "test", k=2))[0]])
    with torch.no_grad():
        a, b = (m.logits(m(ids, torch.arange(ids.shape[1]), None)) for m in (small, grown))
    torch.testing.assert_close(a, b)
