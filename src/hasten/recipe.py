"""A recipe: a model and the techniques applied to it. Plain data: hashable, printable, parsed back to the same value.

Two spellings of one thing. JSON is what files hold: `{"model": M, "techniques": [{"name": N, "options": {…}}]}`, only the options that
differ from their defaults. The short form is for people: `zoo:arith-m +ngram(k=4) +vote(n=16,temperature=0.8)`. Its grammar:

    recipe = value { "+" name [ "(" [ option { "," option } ] ")" ] }        option = name "=" value
    value  = a JSON string | 'the same in single quotes' | [a JSON list] | {a JSON object} | a run without blanks, quotes, brackets, + and ,

A bare run is a number, true, false or null where JSON reads it so, else a string; "4" in quotes is a string.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from hasten.values import UserError

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")
_BARE = re.compile(r"""[^\s+,()"'\[\]{}]+""")
_SINGLE = re.compile(r"'((?:[^'\\]|\\.)*)'")
_BLANK = re.compile(r"\s*")


@dataclass(frozen=True)
class Use:
    """One technique with the options that differ from their defaults; lists are kept as tuples."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "options", {key: frozen(value) for key, value in self.options.items()})

    def __hash__(self) -> int:
        return hash((self.name, _canonical(self.to_json())))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Use) and _canonical(self.to_json()) == _canonical(other.to_json())

    def __str__(self) -> str:
        options = ",".join(f"{key}={_show(value)}" for key, value in self.options.items())
        return f"+{self.name}({options})" if options else f"+{self.name}"

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "options": dict(self.options)}


@dataclass(frozen=True)
class Recipe:
    """model: directory, hub id, `zoo:NAME` or endpoint URL. uses: the techniques, transforms in the order they are applied."""

    model: str
    uses: tuple[Use, ...] = ()

    def __str__(self) -> str:
        return " ".join([_show(self.model), *map(str, self.uses)])

    @property
    def fingerprint(self) -> str:
        """64 hex digits that name this recipe whatever the order its options were written in."""
        return hashlib.sha256(_canonical(self.to_json()).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """The canonical form, for `json.dumps`."""
        return {"model": self.model, "techniques": [use.to_json() for use in self.uses]}

    @classmethod
    def parse(cls, text: str) -> Recipe:
        """The recipe that a short form spells, checked against the table of techniques. UserError names the place or the nearest name."""
        return _checked(read(text))

    @classmethod
    def from_json(cls, document: Any) -> Recipe:
        """The recipe in a parsed JSON document, checked against the table of techniques. UserError says what is wrong with it."""
        return _checked(_from_document(document))


def load_recipe(source: str | Path) -> Recipe:
    """A recipe from a `.json` file, or from a short form. UserError if the file is missing or is not a recipe."""
    text = str(source)
    if not text.endswith(".json"):
        return Recipe.parse(text)
    try:
        return Recipe.from_json(json.loads(Path(text).read_text("utf-8")))
    except FileNotFoundError:
        raise UserError(f"{text}: no such recipe file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{text}: not a JSON file ({error})") from None


def save_recipe(recipe: Recipe, path: str | Path) -> None:
    """Write the canonical JSON, under a temporary name first."""
    from hasten.artifact import write_text

    write_text(Path(path), json.dumps(recipe.to_json(), indent=2, ensure_ascii=False) + "\n")


def frozen(value: Any) -> Any:
    """Lists as tuples, all the way down."""
    return tuple(map(frozen, value)) if isinstance(value, list | tuple) else value


def read(text: str) -> Recipe:
    """The recipe that a short form spells, by the grammar alone: any technique and option names pass."""
    model, at = _value(text, _skip(text, 0), literal=False)
    uses = list(_uses(text, _skip(text, at)))
    return Recipe(model, tuple(uses))


def _checked(recipe: Recipe) -> Recipe:
    from hasten.techniques import checked

    return checked(recipe)


def _canonical(document: Any) -> str:
    return json.dumps(document, sort_keys=True, separators=(",", ":"))


def _from_document(document: Any) -> Recipe:
    match document:
        case {"model": str(model), "techniques": list(techniques), **rest} if not rest:
            return Recipe(model, tuple(map(_use_from, techniques)))
        case {"model": str(model), **rest} if not rest:
            return Recipe(model)
    raise UserError('not a recipe: a recipe is {"model": "…", "techniques": [{"name": "…", "options": {…}}]}')


def _use_from(document: Any) -> Use:
    match document:
        case {"name": str(name), "options": dict(options), **rest} if not rest:
            return Use(name, options)
        case {"name": str(name), **rest} if not rest:
            return Use(name)
    raise UserError(f'not a technique: {json.dumps(document)[:80]}; a technique is {{"name": "…", "options": {{…}}}}')


def _show(value: Any) -> str:
    """Bare where it reads back as itself, else JSON; non-ASCII stays legible."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    if isinstance(value, str) and _BARE.fullmatch(value) and _literal(value) == value:
        return value
    return text.replace("+", "") if isinstance(value, float) else text


def _literal(word: str) -> Any:
    try:
        return json.loads(word)
    except json.JSONDecodeError:
        return word


def _skip(text: str, at: int) -> int:
    match = _BLANK.match(text, at)
    return match.end() if match else at


def _fail(text: str, at: int, wanted: str) -> NoReturn:
    found = repr(text[at]) if at < len(text) else "the end"
    raise UserError(f"recipe {text!r}: expected {wanted} at character {at + 1}, found {found}")


def _value(text: str, at: int, literal: bool = True) -> tuple[Any, int]:
    """The value at a position, and the position after it. With `literal` false, a bare run is always a string."""
    if text[at : at + 1] in ('"', "[", "{"):
        try:
            return json.JSONDecoder().raw_decode(text, at)
        except json.JSONDecodeError as error:
            _fail(text, error.pos, f"the rest of the value that starts at character {at + 1}")
    if match := _SINGLE.match(text, at):
        return re.sub(r"\\(.)", r"\1", match[1]), match.end()
    if match := _BARE.match(text, at):
        return (_literal(match[0]) if literal else match[0]), match.end()
    _fail(text, at, "a value" if literal else "a model")


def _name(text: str, at: int, what: str) -> tuple[str, int]:
    match = _NAME.match(text, at)
    return (match[0], match.end()) if match else _fail(text, at, what)


def _uses(text: str, at: int) -> Iterator[Use]:
    while at < len(text):
        if text[at] != "+":
            _fail(text, at, "'+' and a technique")
        name, at = _name(text, _skip(text, at + 1), "the name of a technique")
        at = _skip(text, at)
        options: dict[str, Any] = {}
        if text[at : at + 1] == "(":
            options, at = _options(text, at + 1)
        yield Use(name, options)
        at = _skip(text, at)


def _options(text: str, at: int) -> tuple[dict[str, Any], int]:
    """The options up to the closing parenthesis, and the position after it."""
    options: dict[str, Any] = {}
    at = _skip(text, at)
    while text[at : at + 1] != ")":
        if options:
            at = _skip(text, _expect(text, at, ",", "',' or ')'"))
        start = at
        name, at = _name(text, at, "the name of an option")
        if name in options:
            raise UserError(f"recipe {text!r}: option {name!r} is given twice, the second time at character {start + 1}")
        options[name], at = _value(text, _skip(text, _expect(text, _skip(text, at), "=", "'='")))
        at = _skip(text, at)
    return options, at + 1


def _expect(text: str, at: int, mark: str, wanted: str) -> int:
    return at + 1 if text[at : at + 1] == mark else _fail(text, at, wanted)
