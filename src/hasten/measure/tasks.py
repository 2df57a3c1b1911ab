"""Tasks: prompts, answers where there are any, and the split into items that choose (calibration) and items that confirm (test).

A task is a built-in name or a JSONL file. A line holds `prompt` (text) or `messages` (chat), and `answer` where there is one; GSM8K's own
fields (`question`, `answer` that ends in `#### x`; Cobbe et al. 2021) and MATH's (`problem`, `solution` with `\\boxed{x}`; Hendrycks et al.
2021) are read too. The split is by a hash of the line, so it never depends on the order of the file or on its other lines.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hasten import rng
from hasten.strategies import answers
from hasten.values import Prompt, Request, Sampling, UserError, did_you_mean

SPLITS = ("calibration", "test")
Extract = Callable[[str], "str | None"]


@dataclass(frozen=True, slots=True)
class Item:
    """One prompt. answer: the right one in its normal form, or None where the task has none."""

    id: str
    prompt: Prompt
    answer: str | None = None


@dataclass(frozen=True, slots=True)
class Task:
    """items: by split, in an order that is fixed and random enough to be cut anywhere. quality: "accuracy" or "agreement".

    extract: the answer in a text, in its normal form. digest: names the task's content, so that measurements of another one are not reused.
    """

    name: str
    items: Mapping[str, Sequence[Item]]
    sampling: Sampling
    quality: str
    extract: Extract
    digest: str

    @property
    def answered(self) -> bool:
        return self.quality == "accuracy"

    def request(self, item: Item, prompt: Prompt | None = None) -> Request:
        """The item as a request with a random stream of its own (`prompt`: as the model expects it, see `Loaded.ask`)."""
        seed = rng.key(self.sampling.seed, item.id) >> 1
        return Request(item.prompt if prompt is None else prompt, self.sampling.but(seed=seed), id=item.id)


def load_task(name_or_path: str | Path) -> Task:
    """A built-in task by name, or a JSONL file. UserError says what is wrong with it, with the line number."""
    name = str(name_or_path)
    if name in BUILT_IN:
        return BUILT_IN[name]()
    path = Path(name).expanduser()
    if not path.is_file():
        raise UserError(f"task {name!r}: no such file, nor a built-in task{did_you_mean(name, BUILT_IN)}")
    return read_task(path)


def read_task(path: Path) -> Task:
    """A task from a JSONL file. UserError for a line that is not a JSON object, has no prompt, or breaks the others' pattern of answers."""
    try:
        lines = path.read_text("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    found = [(number, _item(_parsed(path, number, line), f"{path}, line {number}")) for number, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise UserError(f"{path}: this file holds no items; a line is {{'prompt': '…', 'answer': '…'}} with double quotes")
    answered = found[0][1].answer is not None
    for number, item in found:
        if (item.answer is not None) != answered:
            has, first = ("no answer", "an answer") if answered else ("an answer", "none")
            raise UserError(
                f"{path}, line {number}: this item has {has} but line {found[0][0]} has {first}; all items need one or none may"
            )
    items = _split([item for _, item in found])
    quality = "accuracy" if answered else "agreement"
    return Task(path.stem, items, Sampling(max_tokens=None), quality, answers.extract, _digest(lines))


def _parsed(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        document = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {number}: not JSON ({error.msg} at character {error.pos + 1})") from None
    if not isinstance(document, dict):
        raise UserError(f"{path}, line {number}: must be a JSON object, not {type(document).__name__}")
    return document


def _item(document: Mapping[str, Any], where: str) -> Item:
    identity = hashlib.blake2b(json.dumps(document, sort_keys=True).encode(), digest_size=8).hexdigest()
    prompt, answer = _prompt(document, where), document.get("answer")
    if "question" in document and isinstance(answer, str) and "####" in answer:
        answer = answers.hashed(answer)
    elif answer is None and isinstance(document.get("solution"), str):
        answer = answers.boxed(document["solution"])
        if answer is None:
            raise UserError(f"{where}: the solution has no \\boxed{{}} answer")
    return Item(identity, prompt, None if answer is None else answers.normalise(_spelled(answer)))


def _spelled(answer: Any) -> str:
    """An answer as text: JSON's numbers and truth values as JSON writes them."""
    return answer if isinstance(answer, str) else json.dumps(answer)


def _prompt(document: Mapping[str, Any], where: str) -> Prompt:
    """The first of the fields that hold a prompt."""
    for field in ("prompt", "question", "problem"):
        if field in document:
            if not isinstance(document[field], str) or not document[field]:
                raise UserError(f"{where}: {field!r} must be text that is not empty")
            return str(document[field])
    messages = document.get("messages")
    if messages is None:
        fields = ", ".join(map(repr, document)) or "nothing"
        raise UserError(f"{where}: no 'prompt' (or 'messages', 'question', 'problem'); there is {fields}")
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in messages):
        raise UserError(f"{where}: 'messages' must be a list of objects that have 'role' and 'content'")
    return tuple(messages)


def _split(items: Sequence[Item]) -> dict[str, list[Item]]:
    """Halves by hash, each in the order of its hashes; identical lines count once. A lone item serves as both (there is nothing to hold out)."""
    ordered = sorted({item.id: item for item in items}.values(), key=lambda item: item.id)
    halves = {split: [item for item in ordered if int(item.id, 16) % 2 == i] for i, split in enumerate(SPLITS)}
    for split, other in (SPLITS, SPLITS[::-1]):
        if not halves[split]:
            keep = halves[other]
            halves = {other: keep[: max(1, len(keep) // 2)], split: keep[len(keep) // 2 :]}
    return halves


def _digest(lines: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()[:16]


def _arith() -> Task:
    """Chained arithmetic modulo 23 (`hasten.zoo.arith`): 1,000 problems to calibrate on, 2,000 to test on, disjoint by structure."""
    from hasten.zoo import arith

    items = {
        split: [Item(f"{split}-{i}", p.prompt, answers.normalise(p.answer)) for i, p in enumerate(arith.problems(split))]
        for split in SPLITS
    }
    return Task("arith", items, Sampling(max_tokens=128), "accuracy", answers.extractor("hash"), f"arith-{arith.SEED}")


def _python() -> Task:
    """Pieces of held-out source of the standard library to go on from (`hasten.zoo.python`), about 500 to a split; there are no answers."""
    from hasten.zoo import python

    texts = {split: python.prompts(split, 500, tokens=64) for split in SPLITS}
    texts["calibration"] = [text for text in texts["calibration"] if text not in texts["test"]]  # headers that files share
    items = {split: [Item(f"{split}-{i}", text) for i, text in enumerate(found)] for split, found in texts.items()}
    digest = _digest([text for found in texts.values() for text in found])
    return Task("python", items, Sampling(max_tokens=64), "agreement", answers.extract, digest)


BUILT_IN: dict[str, Callable[[], Task]] = {"arith": _arith, "python": _python}
