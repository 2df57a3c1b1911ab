"""Every shipped model loads offline and is as good as its card says."""

import json
import math

import pytest
import torch

from hasten import zoo
from hasten.zoo import arith, layerskip, perplexity, prm, python, sample, tokenizer
from hasten.zoo.evaluate import evaluate

N = 100


def shipped():
    folder = zoo.Path(zoo.__file__).parent / "models"
    return [n for n in zoo.NAMES if (folder / n / "card.json").is_file()]


@pytest.mark.parametrize("name", shipped())
def test_loads_offline(name, monkeypatch):
    from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, AutoTokenizer

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    kind = AutoModelForCausalLM if zoo.NAMES[name].kind != "reward" else AutoModelForTokenClassification
    model = kind.from_pretrained(zoo.path(name))
    ids = AutoTokenizer.from_pretrained(zoo.path(name))("a = 7 ; b = a * 3 ; c = b + a ; ? c :", return_tensors="pt")
    with torch.no_grad():
        assert torch.isfinite(model.float()(ids.input_ids).logits).all()


@pytest.mark.parametrize("name", [n for n in shipped() if zoo.NAMES[n].kind == "policy"])
def test_a_policy_reaches_its_card(name):
    card = json.loads((zoo.path(name) / "card.json").read_text())
    share = card["greedy"]
    margin = 3.3 * (max(share * (1 - share), 0.02) / N) ** 0.5  # one in a thousand; K varies from card to sample as well
    assert abs(evaluate(name, n=N, samples=0)["greedy"] - share) <= margin


@pytest.mark.parametrize("name", shipped())
def test_shipped_weights_are_those_of_the_spec(name):
    s = zoo.NAMES[name]
    config = json.loads((zoo.path(name) / "config.json").read_text())
    assert (config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]) == (s.width, s.inner, s.layers)
    assert (config["vocab_size"], config["max_position_embeddings"]) == (s.vocabulary, s.positions)
    record = json.loads((zoo.path(name) / "training.json").read_text())
    assert record["spec"]["seed"] == s.seed and record["steps"] == record["of"]


@pytest.mark.parametrize("name", [n for n in shipped() if zoo.NAMES[n].kind == "reward"])
def test_a_reward_model_reaches_its_card(name):
    card = json.loads((zoo.path(name) / "card.json").read_text())
    got = prm.evaluate(name, n=N)
    for policy in [k for k in got if k.startswith("arith-")]:
        assert abs(got[policy]["step_auc"] - card[policy]["step_auc"]) < 0.1


@pytest.mark.parametrize("name", [n for n in shipped() if zoo.NAMES[n].kind == "text"])
def test_a_text_model_reaches_its_card(name):
    card = json.loads((zoo.path(name) / "card.json").read_text())
    windows = perplexity.windows_of(python.tokenizer(zoo.path(name)), perplexity.SLICE)
    got = math.exp(perplexity.mean_nats(sample.load(name), windows))
    assert got == pytest.approx(card["slice"]["perplexity"], rel=0.15)  # these files differ a little between versions of Python


@pytest.mark.parametrize("name", [n for n in shipped() if zoo.NAMES[n].exit])
def test_an_exit_is_accepted_as_often_as_its_card_says(name):
    card, layers = json.loads((zoo.path(name) / "card.json").read_text()), zoo.NAMES[name].exit
    assert json.loads((zoo.path(name) / "config.json").read_text())["exit_layers"] == layers
    model, ps = sample.load(name), list(arith.problems("test", 30))
    prompts = [tokenizer.encode(p.prompt, bos=True) for p in ps]
    answers = [s[0] for s in sample.sample(model, prompts, 0.0, 0)]
    for exit_, rates in layerskip.agreement(model, prompts, answers).items():
        for rate in ("acceptance", "greedy_acceptance"):
            assert rates[rate] == pytest.approx(card[f"exit {exit_}"][rate], abs=0.04)


@pytest.mark.skipif("python-m" not in shipped(), reason="the pair is not here")
def test_the_pair_shares_its_tokenizer_and_the_larger_is_better():
    small, large = ((zoo.path(name) / "tokenizer.json").read_text() for name in ("python-s", "python-m"))
    assert small == large
    cards = [json.loads((zoo.path(name) / "card.json").read_text()) for name in ("python-s", "python-m")]
    assert cards[0]["bits_per_byte"] > cards[1]["bits_per_byte"]
    assert cards[0]["with python-m"] == cards[1]["with python-s"]


def test_auc_and_calibration_error_on_known_values():
    assert prm.auc([0.1, 0.4, 0.35, 0.8], [False, False, True, True]) == 0.75
    assert prm.auc([0.5, 0.5], [False, True]) == 0.5
    assert prm.calibration_error([0.25, 0.25, 0.25, 0.25], [True, False, False, False]) == 0.0
