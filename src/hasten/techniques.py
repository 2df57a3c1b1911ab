"""The one table of techniques: what each changes, how exact it is, and the module that holds it.

A technique's module is imported when it is used, never before, so listing names costs nothing. It holds a frozen dataclass `Options`,
`build(options, target)`, and where it cannot apply everywhere `why_not(options, target)`, which says why in a sentence.
"""

from __future__ import annotations

import importlib
import inspect
import re
import types
import typing
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields
from types import ModuleType
from typing import Any, Literal

from hasten.recipe import Recipe, Use, frozen
from hasten.values import UserError, did_you_mean

Slot = Literal["transform", "reuse", "decode", "constraint", "strategy"]
Exactness = Literal["identical", "distribution", "approximate"]


@dataclass(frozen=True, slots=True)
class Technique:
    """slot: what it changes. family: which models it applies to. module: dotted path, imported when used.

    exactness: `identical` (the same tokens as without it, same seed), `distribution` (the same law) or `approximate` (other answers, whose
    quality is measured). A constraint says what may be committed, so its yardstick is plain decoding under the same constraint; a
    strategy answers with another law than one sample, so it is approximate.
    """

    name: str
    slot: Slot
    family: str
    exactness: Exactness
    summary: str
    paper: str
    module: str


# fmt: off
_ALL = (
    Technique("native", "transform", "lm", "identical", "small steps in one C++ call, on a CPU", "", "hasten.lm.transform.native"),
    Technique("int8", "transform", "lm", "approximate", "8-bit weights and activations", "arXiv:2208.07339", "hasten.lm.transform.int8"),
    Technique("int4", "transform", "lm", "approximate", "4-bit weights, 8-bit activations, on a CPU", "arXiv:2405.04532", "hasten.lm.transform.int4"),
    Technique("compile", "transform", "lm", "identical", "small steps compiled; CUDA graphs on a GPU", "Ansel 2024", "hasten.lm.transform.compile"),
    Technique("plain", "decode", "lm", "identical", "one token a forward pass", "", "hasten.lm.decode.plain"),
    Technique("ngram", "decode", "lm", "identical", "propose what followed the same tokens before", "Saxena 2023", "hasten.lm.decode.ngram"),
    Technique("suffix", "decode", "lm", "identical", "propose what usually followed before", "arXiv:2411.04975", "hasten.lm.decode.suffix"),
    Technique("draft", "decode", "lm", "identical", "a smaller model proposes, for all rows at once", "arXiv:2211.17192", "hasten.lm.decode.draft"),
    Technique("lookahead", "decode", "lm", "identical", "the model guesses ahead of itself", "arXiv:2402.02057", "hasten.lm.decode.lookahead"),
    Technique("pearl", "decode", "lm", "identical", "a draft works while the target does", "arXiv:2408.11850", "hasten.lm.decode.pearl"),
    Technique("early_exit", "decode", "lm", "identical", "its own first layers propose", "arXiv:2404.16710", "hasten.lm.decode.early_exit"),
    Technique("stairs", "decode", "lm", "identical", "a draft, checked one output a row", "arXiv:2407.19947", "hasten.lm.decode.stairs"),
    Technique("beam", "decode", "lm", "approximate", "the likeliest answers of a breadth-limited search", "Lowerre 1976", "hasten.lm.decode.beam"),
    Technique("allowed", "constraint", "lm", "identical", "commit only tokens of a fixed set", "", "hasten.lm.constrain.allowed"),
    Technique("trie", "constraint", "lm", "identical", "answer with an item of a set", "arXiv:2602.22647", "hasten.lm.constrain.items"),
    Technique("prefix", "reuse", "lm", "identical", "compute a shared prefix once", "arXiv:2312.07104", "hasten.lm.prefix"),
    Technique("vote", "strategy", "any", "approximate", "most frequent answer of n samples", "arXiv:2203.11171", "hasten.strategies.vote"),
    Technique("best-of-n", "strategy", "any", "approximate", "the sample a reward model prefers", "arXiv:2110.14168", "hasten.strategies.best_of_n"),
    Technique("rebase", "strategy", "any", "approximate", "width shared out by rewards at each step", "arXiv:2408.00724", "hasten.strategies.rebase"),
)
# fmt: on
TECHNIQUES: dict[str, Technique] = {technique.name: technique for technique in _ALL}
_SLOTS: tuple[Slot, ...] = ("transform", "reuse", "decode", "constraint", "strategy")
_WEAKER: tuple[Exactness, ...] = ("identical", "distribution", "approximate")


@dataclass(frozen=True, slots=True)
class Option:
    """One option of a technique: its type as written, its default (None and `required` if it has none), and what it does."""

    name: str
    type: str
    default: Any
    doc: str
    required: bool = False


def technique(name: str) -> Technique:
    """The technique of that name; UserError with the nearest name if there is none."""
    if name not in TECHNIQUES:
        raise UserError(f"unknown technique {name!r}{did_you_mean(name, TECHNIQUES)}")
    return TECHNIQUES[name]


def module_of(name: str) -> ModuleType:
    """The technique's module. UserError if a package it needs is not installed."""
    try:
        return importlib.import_module(technique(name).module)
    except ModuleNotFoundError as error:
        raise UserError(f"technique {name!r} cannot be used here: the module {error.name!r} it needs is not installed") from error


def options_of(name: str) -> list[Option]:
    """The options of a technique, in the order they are declared."""
    cls = module_of(name).Options
    docs = _documentation(cls)
    return [_option(f, docs.get(f.name, "")) for f in fields(cls)]


def make_options(name: str, given: Mapping[str, Any]) -> Any:
    """The technique's `Options` with the values given. UserError for an unknown option, a value of the wrong type or out of range."""
    cls = module_of(name).Options
    hints = typing.get_type_hints(cls)
    known = {f.name: hints[f.name] for f in fields(cls)}
    try:
        return cls(**{key: _converted(name, key, value, known) for key, value in given.items()})
    except TypeError as error:  # an option without a default was not given
        raise UserError(f"technique {name!r}: {error}") from error


def options_for(use: Use) -> Any:
    """`make_options` of one use in a recipe."""
    return make_options(use.name, use.options)


def checked(recipe: Recipe) -> Recipe:
    """The same recipe in its canonical form: uses in the order of the slots (transforms keep theirs), options of the right types and only
    those that differ from their defaults. UserError for an unknown technique or option, a wrong value, or a slot filled too often.
    """
    check_slots(recipe)
    ordered = sorted(recipe.uses, key=lambda use: _SLOTS.index(technique(use.name).slot))
    return Recipe(recipe.model, tuple(map(_canonical, ordered)))


def check_slots(recipe: Recipe) -> None:
    """UserError if a slot is filled too often: any transforms, one reuse a family, one decode, one constraint, one strategy."""
    used = [technique(use.name) for use in recipe.uses]
    places = Counter(_place(t) for t in used if t.slot != "transform")
    for place, count in places.items():
        if count > 1:
            names = " and ".join(repr(t.name) for t in used if _place(t) == place)
            raise UserError(f"{names} are both {place} techniques, and a recipe takes one")


def exactness(recipe: Recipe) -> Exactness:
    """That of the recipe's weakest part; where it depends on a technique's options, its module says so (`exactness(options)`)."""
    return max(map(_exactness, recipe.uses), key=_WEAKER.index, default="identical")


def _exactness(use: Use) -> Exactness:
    if not use.options:
        return technique(use.name).exactness
    ask: Callable[[Any], Exactness] | None = getattr(module_of(use.name), "exactness", None)
    return ask(options_for(use)) if ask else technique(use.name).exactness


def why_not(recipe: Recipe, target: Any = None) -> str | None:
    """A sentence when some technique of the recipe cannot apply to the target (see `hasten.load.Target`), else None. UserError if the
    recipe itself is wrong.
    """
    check_slots(recipe)
    return next((reason for use in recipe.uses if (reason := _reason(use, target))), None)


def _reason(use: Use, target: Any) -> str | None:
    ask: Callable[[Any, Any], str | None] = getattr(module_of(use.name), "why_not", lambda options, target: None)
    return ask(options_for(use), target)


def _place(t: Technique) -> str:
    """What two techniques of one recipe must not share."""
    return f"{t.family} reuse" if t.slot == "reuse" else t.slot


def _canonical(use: Use) -> Use:
    options = options_for(use)
    given = {f.name: frozen(getattr(options, f.name)) for f in fields(options) if f.name in use.options}
    defaults = {f.name: frozen(_default(f)) for f in fields(options)}
    return Use(use.name, {key: value for key, value in given.items() if value != defaults[key]})


def _default(f: Any) -> Any:
    return f.default if f.default is not MISSING else f.default_factory() if f.default_factory is not MISSING else MISSING


def _option(f: Any, doc: str) -> Option:
    default = _default(f)
    written = f.type if isinstance(f.type, str) else getattr(f.type, "__name__", str(f.type))
    return Option(f.name, written, None if default is MISSING else default, doc, default is MISSING)


def _documentation(cls: type) -> dict[str, str]:
    """What is said of each field: after `name:` in the class's docstring, or in the comment on the field's line."""
    names = "|".join(f.name for f in fields(cls)) or "$"
    said: dict[str, str] = {}
    head = re.compile(rf"(?:^|(?<=\s))((?:{names})(?:, (?:{names}))*): ")
    parts = head.split(" ".join((cls.__doc__ or "").split()))
    for heads, text in zip(parts[1::2], parts[2::2], strict=True):
        said |= dict.fromkeys(heads.split(", "), text.strip().rstrip("."))
    return said | dict(_comments(cls, names))


def _comments(cls: type, names: str) -> Iterator[tuple[str, str]]:
    try:
        lines = inspect.getsource(cls).splitlines()
    except OSError:  # no source: a frozen application
        return
    for line in lines:
        if match := re.match(rf"\s+({names}): .*?\s#\s*(.+)", line):
            yield match[1], match[2].strip()


def _converted(name: str, key: str, value: Any, known: Mapping[str, Any]) -> Any:
    if key not in known:
        hint = did_you_mean(key, known) if known else "; it has none"
        raise UserError(f"technique {name!r}: unknown option {key!r}{hint}")
    for kind in _alternatives(known[key]):
        if (result := _as(kind, value)) is not MISSING:
            return result
    raise UserError(f"technique {name!r}: {key}={value!r} is not {_described(known[key])}")


def _alternatives(kind: Any) -> tuple[Any, ...]:
    return typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)


_SCALARS: dict[Any, Callable[[Any], Any]] = {
    bool: lambda v: v if type(v) is bool else MISSING,
    int: lambda v: v if type(v) is int else int(v) if type(v) is float and v.is_integer() else MISSING,
    float: lambda v: float(v) if type(v) in (int, float) else MISSING,
    str: lambda v: v if type(v) is str else MISSING,
    type(None): lambda v: v if v is None else MISSING,
    Any: lambda v: v,
}


def _as(kind: Any, value: Any) -> Any:
    """The value as that type (whole floats are integers, integers are floats, one item is a tuple of one), or MISSING."""
    if kind in _SCALARS:
        return _SCALARS[kind](value)
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return value if value in args else MISSING
    if origin is tuple:
        items = [_as(args[0], item) for item in (value if isinstance(value, list | tuple) else (value,))]
        return MISSING if MISSING in items else tuple(items)
    return value if isinstance(value, Mapping) else MISSING


def _described(kind: Any) -> str:
    """A type in words, for an error."""
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "null"}
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return "one of " + ", ".join(map(str, args))
    if origin is tuple:
        return f"a list, each item {_described(args[0])}"
    return " or ".join(words.get(k, "a table of values") if typing.get_origin(k) is None else _described(k) for k in _alternatives(kind))
