"""Text of the standard library: splits, tokenizer, batches and prompts; and what is measured on it, against formulas written out."""

import json
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.zoo import perplexity, python, sample, train
from hasten.zoo.model import Llama, Size

FEW = ["bisect.py", "codeop.py", "netrc.py"]


@pytest.fixture(scope="module")
def words():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(python, "files", lambda split: FEW)
        return python.build()


def test_a_file_belongs_to_one_split_whatever_else_there_is():
    found = {split: set(python.files(split)) for split in ("train", "calibration", "test")}
    assert not found["train"] & found["test"] and not found["calibration"] & found["test"] and not found["train"] & found["calibration"]
    assert set(perplexity.SLICE) <= found["calibration"] and "argparse.py" in found["test"] and "inspect.py" in found["train"]
    assert not [f for f in python.library() if "test" in f.split("/") or f.startswith("_sysconfigdata")]
    assert len(found["train"]) > 5 * len(found["test"]) > 100
    with pytest.raises(ValueError, match="no split 'dev'"):
        python.files("dev")


@settings(deadline=None, max_examples=60)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_decoding_restores_any_text(words, text):
    ids = words.encode(text).ids
    assert ids[0] == python.BOS and words.decode(ids) == text
    assert perplexity.sizes(words)[torch.tensor(ids)].sum() == len(text.encode())


def test_special_words_inside_a_text_are_text(words, tmp_path):
    from transformers import PreTrainedTokenizerFast

    python.fast(words).save_pretrained(tmp_path)
    mine, theirs = python.tokenizer(tmp_path), PreTrainedTokenizerFast.from_pretrained(tmp_path)
    for text in ("<eos> x <bos>", "def f(x):\n\treturn  x\n\n", " . , n't 's"):
        ids = theirs(text).input_ids
        assert mine.encode(text).ids == ids and ids.count(python.BOS) == 1 and python.EOS not in ids
        assert theirs.decode(ids, skip_special_tokens=True) == text


def test_an_epoch_sees_every_window_once_and_targets_are_the_tokens_that_follow():
    tokens = torch.arange(70 * 256 + 9)
    per = python.BATCH // 256
    seen = [python.batch(tokens, 5, step, 256) for step in range(12)]
    first = Counter(ids[:, 0].tolist()[i] for step, (ids, _) in enumerate(seen) for i in range(per) if step * per + i < 70)
    assert first == dict.fromkeys(range(0, 70 * 256, 256), 1)
    for (ids, following), (again, _) in zip(seen, [python.batch(tokens, 5, step, 256) for step in range(12)], strict=True):
        assert torch.equal(following, ids + 1) and torch.equal(ids, again)
    assert not torch.equal(seen[0][0], python.batch(tokens, 6, 0, 256)[0])


def test_loss_falls_and_a_stopped_run_resumes_to_the_same_weights(tmp_path, monkeypatch):
    monkeypatch.setenv("HASTEN_CACHE", str(tmp_path))
    monkeypatch.setattr(python, "files", lambda split: FEW)
    monkeypatch.setattr(python, "BATCH", 1024)
    made = {}
    for name, parts in (("whole", [None]), ("parts", [0.1, None])):
        for i, seconds in enumerate(parts):
            train.train("python-s", out=tmp_path / name, steps=5, resume=i > 0, seconds=seconds)
        made[name] = sample.load("python-s", tmp_path / name)
    for a, b in zip(made["whole"].parameters(), made["parts"].parameters(), strict=True):
        assert torch.equal(a, b)
    record = json.loads((tmp_path / "whole" / "training.json").read_text())
    assert record["tokens"] == 5 * 1024 and record["text"]["train"]["files"] == len(FEW)
    cut = perplexity.windows_of(python.tokenizer(tmp_path / "whole"), FEW[:1])
    assert perplexity.mean_nats(made["whole"], cut) < 6.5  # ln 1024 = 6.93


def test_perplexity_and_acceptance_are_what_the_formulas_say():
    a, b = (Llama(Size(32, 64, 1, 2, vocabulary=1024, positions=1024), seed).eval() for seed in (1, 2))
    cut = torch.randint(0, 1024, (3, perplexity.WINDOW + 1), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        p, q = (m.logits(m(cut[:, :-1], torch.arange(perplexity.WINDOW), None)).softmax(-1) for m in (a, b))
    nats = -p.gather(-1, cut[:, 1:, None]).log().mean()
    assert perplexity.mean_nats(a, cut) == pytest.approx(nats.item(), rel=1e-4)
    overlap, same = perplexity.acceptance(a, b, cut)
    assert overlap == pytest.approx(1 - 0.5 * (p - q).abs().sum(-1).mean().item(), rel=1e-4)
    assert same == pytest.approx((p.argmax(-1) == q.argmax(-1)).float().mean().item())
    assert perplexity.acceptance(a, a, cut) == (pytest.approx(1.0, abs=1e-4), 1.0)


def test_prompts_have_the_length_asked_for_and_come_from_their_split(words, monkeypatch):
    monkeypatch.setattr(python, "tokenizer", lambda: words)
    found = python.prompts("test", 150, tokens=32)
    assert len(set(found)) > 140
    texts = [python.text(file) for file in python.files("test")]
    assert all(any(prompt in text for text in texts) for prompt in found[::10])
    assert sum(len(words.encode(p).ids) == 33 for p in found) > 140
    with pytest.raises(ValueError, match="not 1000000"):
        python.prompts("test", 1_000_000, tokens=512)
