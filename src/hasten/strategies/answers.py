"""The final answer in a solution's text, in a normal form in which equal answers are equal strings: what votes are counted by.

Formats: GSM8K's `#### x` (the first one, as in its authors' `extract_answer`; https://github.com/openai/grade-school-math), MATH's
`\\boxed{x}` (the last one, braces nested; Hendrycks et al. 2021 and Lewkowycz et al. 2022 for the normal form), `The answer is x` (the last
one; Wei et al. 2022), and the last number. Equality is by string after normalising, not by algebra.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TypeAlias

from hasten.values import UserError, did_you_mean

Extractor: TypeAlias = Callable[[str], str | None]

_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
_NUMBER = re.compile(rf"(?:(?<![\w)\]}}])-)?(?:{_DIGITS})")
_PLAIN_NUMBER = re.compile(r"([+-]?)([0-9]*)\.?([0-9]*)")
_HASH = re.compile(r"####[ \t]*([^\n]*)")
_HASH_NUMBER = re.compile(rf"####[ \t]*\$?[ \t]*(-?\$?(?:{_DIGITS})(?:/[0-9]+)?)(?![\w.:)]*[ \t]*[:)])(?!\.[ \t]*\w)")
_ANSWER_IS = re.compile(r"\banswer(?:\s+is|\s*:)[\s:*]*", re.IGNORECASE)
_SENTENCE_END = re.compile(r"[.!?](?=\s|$)")
_WORDED_NUMBER = re.compile(rf"\$?(-?\$?(?:{_DIGITS}))\s*[^\W\d_][^\d\\^/*+=({{]*")  # `18 dollars`, `$1,000 a week`

_LATEX = (
    (re.compile(r"\\[!,;: ]|\\left|\\right|\\(?:quad|qquad)\b|\^\{?\\circ\}?|\\%|%|\\\$|\$"), ""),
    (re.compile(r"\\[dt]frac"), r"\\frac"),
    (re.compile(r"\\frac([0-9])([0-9])"), r"\\frac{\1}{\2}"),
    (re.compile(r"\\(?:text|mathrm|textbf|mathbf|mbox)\{([^{}]*)\}"), r"\1"),
    (re.compile(r"\\frac\{(-?[0-9]+)\}\{([0-9]+)\}"), r"\1/\2"),
)


def normalise(answer: str) -> str:
    """The normal form: lower case, without $, %, spacing commands, thousands commas, trailing dot, `x =` in front; `7.0` is `7`, `\\frac12` `1/2`."""
    for pattern, replacement in _LATEX:
        answer = pattern.sub(replacement, answer)
    answer = re.sub(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))", "", answer.replace("\u2212", "-"))
    answer = re.sub(r"\s*([^\w\s])\s*", r"\1", answer)  # `x + 1` is `x+1`, but `new york` keeps its space
    answer = re.sub(r"\s+", " ", answer).strip(" *").rstrip(".").casefold()
    return _plain(re.sub(r"^[a-z]=(?=.)", "", answer))


def _plain(text: str) -> str:
    """A decimal number without leading and trailing zeros or a plus sign; any other text unchanged."""
    match = _PLAIN_NUMBER.fullmatch(text)
    if not match or not (match[2] or match[3]):
        return text
    whole, fraction = match[2].lstrip("0") or "0", match[3].rstrip("0")
    value = f"{whole}.{fraction}" if fraction else whole
    return f"-{value}" if match[1] == "-" and value != "0" else value


def _said(answer: str) -> str | None:
    """An answer in running prose: its number if it is a number with a unit, else the words, up to the end of the sentence."""
    sentence = _SENTENCE_END.split(answer.strip(), maxsplit=1)[0]
    worded = _WORDED_NUMBER.fullmatch(sentence.strip(" *$"))
    return (worded[1] if worded else sentence) or None


def hashed(text: str) -> str | None:
    """GSM8K: what follows the first `####` on its line."""
    match = _HASH.search(text)
    return match[1] if match else None


def boxed(text: str) -> str | None:
    """MATH: the content of the last complete `\\boxed{…}` or `\\fbox{…}`, with nested braces."""
    for match in reversed(list(re.finditer(r"\\f?boxed\s*\{|\\fbox\s*\{", text))):
        depth = 1
        for i in range(match.end(), len(text)):
            depth += (text[i] == "{") - (text[i] == "}")
            if depth == 0:
                return text[match.end() : i]
    return None


def last_number(text: str) -> str | None:
    """The last number of the text."""
    found = _NUMBER.findall(text)
    return found[-1] if found else None


def last_line(text: str) -> str | None:
    """The last line that is not empty."""
    lines = text.strip().splitlines()
    return lines[-1] if lines else None


def _hash_answer(text: str) -> str | None:
    """`####` as an answer and not as a Markdown heading: with a number behind it, or as the last line."""
    match = _HASH_NUMBER.search(text)
    if match:
        return match[1]
    line = last_line(text) or ""
    return hashed(line) if line.startswith("####") else None


def _answer_is(text: str) -> str | None:
    _, *rest = _ANSWER_IS.split(text)
    return _said(rest[-1].partition("\n")[0]) if rest else None


def auto(text: str) -> str | None:
    """The first of these that is there: `#### x`, `\\boxed{x}`, `The answer is x`, the last number."""
    for find in (_hash_answer, boxed, _answer_is, last_number):
        if (found := find(text)) and normalise(found):
            return found
    return None


EXTRACTORS: dict[str, Extractor] = {"auto": auto, "hash": hashed, "boxed": boxed, "last-number": last_number, "line": last_line}


def extractor(name: str) -> Extractor:
    """The extractor of that name, or of a regular expression with one group (its last match); gives normal forms, None where there is no answer."""
    find = EXTRACTORS.get(name) or _by_pattern(name)

    def extract(text: str) -> str | None:
        found = find(text)
        return (normalise(found) or None) if found else None

    return extract


def _by_pattern(name: str) -> Extractor:
    if "(" not in name:
        raise UserError(
            f"extract={name!r}: no such way to find an answer{did_you_mean(name, EXTRACTORS)}; or a regular expression with one group"
        )
    try:
        pattern = re.compile(name)
    except re.error as error:
        raise UserError(f"extract={name!r} is not a regular expression: {error}") from None
    if pattern.groups != 1:
        raise UserError(f"extract={name!r}: the regular expression must have exactly one group, not {pattern.groups}")

    def find(text: str) -> str | None:
        found = pattern.findall(text)
        return found[-1] if found else None

    return find


def extract(text: str) -> str | None:
    """The answer of a solution in its normal form, found automatically; None where there is none."""
    return _AUTO(text)


_AUTO = extractor("auto")


def chosen(name: str, target: object) -> Extractor:
    """The extractor an option names; "auto" is the task's own (`target.extract`) where the task has one."""
    own: Extractor | None = getattr(target, "extract", None)
    return own if name == "auto" and own is not None else extractor(name)
