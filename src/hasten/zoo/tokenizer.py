"""The tasks' tokenizer: one token a word, as an ordinary Hugging Face fast tokenizer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hasten.zoo import arith

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<bos>", "<eos>"]
PAD, BOS, EOS = range(3)
WORDS = [*SPECIAL, ";", "=", *arith.OPERATORS, "?", ":", "####", *arith.NAMES, *map(str, range(arith.MODULUS))]
IDS = {word: i for i, word in enumerate(WORDS)}
STEP_END = IDS[";"]


def encode(text: str, bos: bool = False, eos: bool = False) -> list[int]:
    """Text -> token ids, without transformers: one id a word. Raises KeyError for a word outside the vocabulary."""
    ids = [IDS[word] for word in text.split()]
    return [BOS] * bos + ids + [EOS] * eos


def decode(ids: list[int]) -> str:
    """Token ids -> text; stops at <eos> and leaves out the special tokens."""
    if EOS in ids:
        ids = ids[: ids.index(EOS)]
    return " ".join(WORDS[i] for i in ids if i > EOS)


def build() -> PreTrainedTokenizerFast:
    """The tokenizer that every model of the zoo is saved with: <bos> in front by default, decoding restores the text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel(dict(IDS), unk_token=None))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.post_processor = processors.TemplateProcessing(single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", BOS)])
    raw.decoder = decoders.WordPiece(prefix="\x00", cleanup=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        model_max_length=256,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
