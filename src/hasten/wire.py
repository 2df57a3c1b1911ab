"""Values as JSON and back, for what runs in another process. No pickle: what is read makes values of a fixed set of classes and nothing else.

A JSON list is a tuple. An object with "@" names what it is: one of the values (fields that have their default are left out), a list, or a
mapping whose keys are not all text. Numbers come back exactly, NaN and infinities included, which Python's JSON has.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from functools import cache
from typing import Any

from hasten.usage import Cost, Usage
from hasten.values import Event, Request, Result, Sampling, TokenLogprob

_CLASSES: dict[str, type] = {kind.__name__: kind for kind in (Request, Sampling, Result, Event, TokenLogprob, Usage, Cost)}


def dump(value: Any) -> Any:
    """What `json.dumps` takes. TypeError names the type of what cannot cross."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, tuple):
        return [dump(item) for item in value]
    if isinstance(value, list):
        return {"@": "list", "items": [dump(item) for item in value]}
    if isinstance(value, Mapping):
        if all(type(key) is str for key in value) and "@" not in value:
            return {key: dump(item) for key, item in value.items()}
        return {"@": "map", "items": [[dump(key), dump(item)] for key, item in value.items()]}
    if type(value).__name__ in _CLASSES:
        kept = {name: item for name, default in _defaults(type(value).__name__) if (item := getattr(value, name)) != default}
        return {"@": type(value).__name__, **{name: dump(item) for name, item in kept.items()}}
    raise TypeError(f"a {type(value).__name__}")


def read(document: Any) -> Any:
    """The value that `dump` made this of. ValueError for what it cannot have made."""
    if isinstance(document, list):
        return tuple(map(read, document))
    if not isinstance(document, dict):
        return document
    match document.get("@"):
        case None:
            return {key: read(item) for key, item in document.items()}
        case "list":
            return [read(item) for item in document["items"]]
        case "map":
            return {read(key): read(item) for key, item in document["items"]}
        case str(name) if name in _CLASSES:
            try:
                return _CLASSES[name](**{key: read(item) for key, item in document.items() if key != "@"})
            except TypeError as error:
                raise ValueError(f"not a {name}: {error}") from None
    raise ValueError(f"not a value: {str(document)[:80]}")


@cache
def _defaults(name: str) -> list[tuple[str, Any]]:
    """The class's fields with their defaults (MISSING, which equals nothing, where there is none)."""
    return [(f.name, f.default if f.default_factory is MISSING else f.default_factory()) for f in fields(_CLASSES[name])]
