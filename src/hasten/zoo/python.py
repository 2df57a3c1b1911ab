"""The Python standard library's own source as text: a corpus that every machine has, its splits, its tokenizer and prompts from it.

A file belongs to the split that the hash of its path says, so that a file held out under one version of Python is held out under all.
Left out are tests, idlelib, what was installed beside the library, and what is no program: `encodings` (tables of characters),
`pydoc_data` (documentation) and files that a build of Python writes about its machine. Versions differ, so a model's record tells the
version and a digest of the text.

The tokenizer is byte-level BPE (Sennrich et al. 2016, 1508.07909; the bytes as in Radford et al. 2019) with 1,024 tokens.

Learning rates were chosen by short runs of python-s, 0.8 million tokens each; held-out nats a token:

    Muon 0.01, AdamW 0.003   3.82        Muon 0.02, AdamW 0.003   3.77        Muon 0.02, AdamW 0.008   3.65

python-m, grown from python-s (2.94), has after its first 0.08 million tokens 2.58 in training with Muon 0.01 and 2.62 with 0.02.
"""

from __future__ import annotations

import hashlib
import os
import platform
import sysconfig
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from hasten.rng import key
from hasten.zoo import arith, path
from hasten.zoo.model import Llama
from hasten.zoo.tokenizer import BOS, EOS, SPECIAL

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

OUT = {"test", "tests", "idlelib", "site-packages", "dist-packages", "encodings", "pydoc_data", "__pycache__"}
VOCABULARY = 1024
BATCH = 4096  # tokens a step
SHORT, LONG, LONG_SHARE = 256, 1024, 0.2  # tokens a row: short ones first, which cost less, long ones in the last share of training


def root() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def split_of(file: str) -> str:
    """The split of a file, by its path below the library's root: one tenth test, one calibration."""
    return arith.split_of(hashlib.blake2b(file.encode(), digest_size=8).hexdigest())


def files(split: str) -> list[str]:
    """The split's files. Raises ValueError for an unknown split."""
    if split not in arith.SPLITS:
        raise ValueError(f"no split {split!r}: choose from {', '.join(arith.SPLITS)}")
    return [file for file in library() if split_of(file) == split]


@cache
def library() -> list[str]:
    """All files but those left out, by their paths below the library's root with / between folders, sorted."""
    found: list[str] = []
    for folder, folders, names in os.walk(root()):
        folders[:] = set(folders) - OUT
        found += [(Path(folder) / name).relative_to(root()).as_posix() for name in names if name.endswith(".py")]
    return sorted(file for file in found if not file.startswith(("_sysconfigdata", "config-")))


def text(file: str) -> str:
    return (root() / file).read_text("utf-8", errors="replace")


def record() -> dict:
    """What the text was: version of Python, and for each split the number of files, of bytes, and a digest."""
    return {"python": platform.python_version()} | {split: _record(split) for split in arith.SPLITS}


def _record(split: str) -> dict:
    data = [f"{file}\n{text(file)}".encode() for file in files(split)]
    size = sum(len(text(file).encode()) for file in files(split))
    return {"files": len(data), "bytes": size, "digest": hashlib.sha256(b"\0".join(data)).hexdigest()[:16]}


def build() -> Tokenizer:
    """A tokenizer trained on the training split: <bos> in front by default, and decoding restores any text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=SPECIAL, initial_alphabet=letters, show_progress=False)
    words.train_from_iterator((text(file) for file in files("train")), trainer)
    words.post_processor = processors.TemplateProcessing(single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", BOS)])
    return words


def tokenizer(directory: str | Path | None = None) -> Tokenizer:
    """The tokenizer in a model's directory; by default that of python-s, which python-m shares."""
    from tokenizers import Tokenizer

    words = Tokenizer.from_file(str(Path(directory or path("python-s")) / "tokenizer.json"))
    words.encode_special_tokens = True  # a special token's name inside a text is text
    return words


def fast(words: Tokenizer) -> PreTrainedTokenizerFast:
    """The same tokenizer as transformers saves it."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        model_max_length=LONG,
        clean_up_tokenization_spaces=False,
        padding_side="left",
        split_special_tokens=True,
    )


def stream(words: Tokenizer, some: Sequence[str]) -> Tensor:
    """[N] int64: <bos>, the tokens and <eos> of each file, one after the other."""
    ids: list[int] = []
    for found in words.encode_batch_fast([text(file) for file in some]):
        ids += [*found.ids, EOS]
    return torch.tensor(ids)


def windows(tokens: Tensor, length: int) -> Tensor:
    """[n, length + 1]: the stream cut into windows, each with the token after it; what is left at the end is dropped."""
    return tokens[: (len(tokens) - 1) // length * length + 1].unfold(0, length + 1, length)


def batch(tokens: Tensor, seed: int, step: int, length: int) -> tuple[Tensor, Tensor]:
    """ids and the tokens that follow them, each [BATCH / length, length], of one step of training: a pure function of its arguments.

    Each epoch sees every window of the stream once, in an order of its own.
    """
    cut = windows(tokens, length)
    rows = BATCH // length
    epochs = [divmod(step * rows + row, len(cut)) for row in range(rows)]
    picked = cut[torch.tensor([_order(seed, epoch, len(cut))[i] for epoch, i in epochs])]
    return picked[:, :-1], picked[:, 1:]


@cache
def _order(seed: int, epoch: int, n: int) -> list[int]:
    return torch.randperm(n, generator=torch.Generator().manual_seed(key(seed, epoch) >> 1)).tolist()


def shrink(model: Llama) -> None:
    """Make the embeddings of a new model small: tied as they are, large ones begin by predicting every token after itself, at 20 nats."""
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(0.1)


def loss_of(model: Llama, tokens: Tensor, seed: int, step: int, done: float) -> Tensor:
    """Mean cross-entropy in nats of a step's batch, after a share `done` of training."""
    ids, following = batch(tokens, seed, step, LONG if done >= 1 - LONG_SHARE else SHORT)
    logits = model.logits(model(ids, torch.arange(ids.shape[1]), None))
    return F.cross_entropy(logits.flatten(0, 1), following.flatten())


def prompts(split: str, n: int, tokens: int, stride: int = 4) -> list[str]:
    """n texts of `tokens` tokens from held-out files, each from the start of a line: first every file's beginning, then, around and
    around, from a place about `stride` times `tokens` tokens further on. Raises ValueError where the split has fewer.
    """
    words = tokenizer()
    found: list[str] = []
    rests = [text(file) for file in files(split)]
    while rests and len(found) < n:
        kept = []
        for rest in rests:
            ids = words.encode(rest[: 16 * tokens], add_special_tokens=False).ids[:tokens]
            if len(ids) == tokens:
                found.append(words.decode(ids))
                kept.append(rest[stride * len(found[-1]) :].partition("\n")[2])
        rests = kept
    if len(found) < n:
        raise ValueError(f"the {split} files hold {len(found)} prompts of {tokens} tokens, not {n}")
    return found[:n]
