"""Which recipes are worth measuring: the models at hand, times the strategies, and for those that survive their decode techniques as well.

Nothing here knows what a technique does; slots and exactness come from the table of techniques.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from hasten import techniques
from hasten.recipe import Recipe, Use, load_recipe, read
from hasten.values import UserError

SAMPLES = (4, 8, 16)
DECODES = (Use("ngram"),)
SPEEDUPS = (Use("native"),)  # tried first on a model: where they apply they only save time


@dataclass(frozen=True)
class Candidates:
    """first: measured from the start. decodes: tried on what survives. baseline: what the pick is compared with, one of `first`."""

    first: tuple[Recipe, ...]
    decodes: tuple[Use, ...]
    baseline: Recipe

    def twins(self, recipe: Recipe) -> list[Recipe]:
        """The recipe with each of the other decode techniques, where its decode slot is free."""
        taken = any(techniques.technique(use.name).slot == "decode" for use in recipe.uses)
        return [] if taken else [techniques.checked(Recipe(recipe.model, (*recipe.uses, use))) for use in self.decodes]

    @property
    def all(self) -> list[Recipe]:
        return [*self.first, *(twin for recipe in self.first for twin in self.twins(recipe))]


def candidates(
    source: str | None, added: Sequence[str] = (), lossless: bool = False, answered: bool = True, speedups: Sequence[Use] = ()
) -> Candidates:
    """The recipes to compare on a source (directory, hub id, `zoo:NAME`, recipe; None: the zoo), with techniques added by `--with`.

    speedups: transforms that change no answer and apply here; everything but the models themselves is measured with them. answered: whether
    the task has answers; without them no strategy is proposed, as voting needs answers to count. lossless: only recipes that keep the
    distribution of the baseline's output. UserError for an unknown technique or an empty zoo.
    """
    uses = [parse_use(text) for text in added]
    bases = zoo_models() if source is None else [load_recipe(source)]
    baseline = bases[-1]
    strategies = [] if lossless or not answered else proposed(source)
    options = _by_slot([*DECODES, *strategies, *uses])
    decodes = tuple(options.pop("decode", ()))
    plain = bases[-1:] if lossless else bases[::-1]
    largest_first = [faster(base, speedups) for base in plain]
    first = _unique(recipe for alike in zip(*(combined(base, options) for base in largest_first), strict=True) for recipe in alike)
    first += plain
    if lossless:
        first = [recipe for recipe in first if keeps_distribution(recipe)]
        decodes = tuple(use for use in decodes if techniques.technique(use.name).exactness != "approximate")
    return Candidates(tuple(_unique([baseline, *first])), decodes, baseline)


def faster(base: Recipe, speedups: Sequence[Use]) -> Recipe:
    """The recipe with those of the speedups that it does not name itself."""
    named = {use.name for use in base.uses}
    return techniques.checked(Recipe(base.model, (*base.uses, *(use for use in speedups if use.name not in named))))


def parse_use(text: str) -> Use:
    """A technique with options as people write it: `ngram(k=4)` or `+ngram(k=4)`."""
    [use, *more] = techniques.checked(read(f"x +{text.strip().lstrip('+')}")).uses or (None,)
    if use is None or more:
        raise UserError(f"--with {text!r}: name one technique, as in --with 'ngram(k=4)'")
    return use


def zoo_models() -> list[Recipe]:
    """The shipped policies whose weights are installed, small to large, without those that are trained to draft for themselves (arith-m stands
    for them). UserError if there is none.
    """
    from hasten import zoo

    found = [Recipe(f"zoo:{name}") for name in _installed("policy") if not zoo.NAMES[name].exit]
    if not found:
        raise UserError("no model of the zoo is installed: train one with `hasten zoo train arith-xs`, or name a model")
    return found


def proposed(source: str | None) -> list[Use]:
    """Strategies to try: votes, and on the zoo also its reward models."""
    votes = [Use("vote", {"n": n}) for n in SAMPLES]
    rewards = _installed("reward") if source is None else []
    return votes + [
        Use("best-of-n", {"n": n, "reward": f"zoo:{name}", **weighted})
        for name, n, weighted in product(rewards, SAMPLES, ({}, {"weighted": True}))
    ]


def combined(base: Recipe, options: dict[str, list[Use]]) -> list[Recipe]:
    """The base with one or none of the techniques of each slot that it leaves free."""
    taken = {techniques.technique(use.name).slot for use in base.uses}
    choices: list[list[Use | None]] = [[None, *uses] for slot, uses in options.items() if slot not in taken or slot == "transform"]
    return [
        techniques.checked(Recipe(base.model, (*base.uses, *(use for use in chosen if use is not None)))) for chosen in product(*choices)
    ]


def keeps_distribution(recipe: Recipe) -> bool:
    return techniques.exactness(recipe) in ("identical", "distribution")


def describe(recipes: Iterable[Recipe]) -> list[dict[str, Any]]:
    """For a dry run: each recipe, how exact it is, and why it cannot apply if that is known before the model is loaded."""
    return [
        {"recipe_text": str(r), "recipe": r.to_json(), "exactness": techniques.exactness(r), "why_not": techniques.why_not(r)}
        for r in recipes
    ]


def _installed(kind: str) -> list[str]:
    from hasten import zoo

    return [name for name, spec in zoo.NAMES.items() if spec.kind == kind and _has_weights(name)]


def _has_weights(name: str) -> bool:
    from hasten import zoo

    try:
        zoo.path(name)
    except ValueError:
        return False
    return True


def _by_slot(uses: Iterable[Use]) -> dict[str, list[Use]]:
    out: dict[str, list[Use]] = {}
    for use in uses:
        known = out.setdefault(techniques.technique(use.name).slot, [])
        if use not in known:
            known.append(use)
    return out


def _unique(recipes: Iterable[Recipe]) -> list[Recipe]:
    return list(dict.fromkeys(recipes))
