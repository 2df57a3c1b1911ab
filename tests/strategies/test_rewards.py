"""How samples become score requests, with the reward model's tokenizer or the target's own ids."""

import pytest

from hasten.strategies import rewards
from hasten.values import Request, Result, UserError

SAMPLE = Result("b c", (7, 8, 2), prompt_tokens=(1, 5))


class Words:
    """A tokenizer of whole words; `<s>` in front of a text of its own."""

    def __init__(self, words, chat_template=None):
        self.ids = {word: i for i, word in enumerate(["<s>", *words])}
        self.all_special_tokens, self.chat_template = ["<s>", "<|user|>"], chat_template

    def get_vocab(self):
        return dict(self.ids)

    def encode(self, text, add_special_tokens=True):
        return [0] * add_special_tokens + [self.ids[word] for word in text.split()]

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        assert not tokenize
        assert add_generation_prompt
        return " ".join(["<s>", *(m["content"] for m in messages), "->"])


TARGET, LARGER, OTHER = Words("abc"), Words("abcd"), Words("cba")


@pytest.mark.parametrize("tokenizers", [{}, {"target": TARGET}, {"target": TARGET, "reward": TARGET}, {"target": TARGET, "reward": LARGER}])
def test_ids_are_scored_as_drawn_where_the_reward_model_reads_them_alike(tokenizers):
    score = rewards.scorer(tokenizers)(Request([1, 5]))
    assert score(SAMPLE) == Request((1, 5, 7, 8, 2), role="reward", score=True, score_from=2)


def test_another_tokenizer_gets_the_text():
    score = rewards.scorer({"target": TARGET, "reward": OTHER})(Request("a b"))
    assert score(SAMPLE) == Request((0, 3, 2, 2, 1), role="reward", score=True, score_from=3)
    with pytest.raises(KeyError):  # `d` is no word of the smaller tokenizer: had the ids been passed on, nothing would have failed
        rewards.scorer({"target": LARGER, "reward": TARGET})(Request("d"))


def test_chat_messages_go_through_the_reward_models_template():
    chat = Words(["c", "b", "a", "->"], chat_template="some")
    score = rewards.scorer({"target": TARGET, "reward": chat})(Request([{"role": "user", "content": "a"}]))
    assert score(SAMPLE) == Request((0, 3, 4, 2, 1), role="reward", score=True, score_from=3)


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ([1, 5], "not token ids"),
        ("<|user|> a", "special token '<|user|>'".replace("|", r"\|")),
        ([{"role": "user", "content": "a"}], "no chat template"),
    ],
)
def test_what_another_tokenizer_cannot_read_is_refused_before_anything_is_drawn(prompt, words):
    with pytest.raises(UserError, match=words):
        rewards.scorer({"target": TARGET, "reward": OTHER})(Request(prompt))


def test_an_engine_that_hides_the_prompts_ids_is_refused():
    with pytest.raises(UserError, match="which ids"):
        rewards.scorer({})(Request("a"))(Result("b", (7,)))


@pytest.mark.parametrize(("name", "value"), [("last", 0.5), ("min", 0.2), ("prod", 0.08), ("mean", 0.5)])
def test_aggregates(name, value):
    assert rewards.aggregate(name, (0.8, 0.2, 0.5)) == pytest.approx(value)
    assert rewards.aggregate(name, (0.3,)) == pytest.approx(0.3)
    assert rewards.aggregate(name, ()) == rewards.aggregate(name, None) == 0
