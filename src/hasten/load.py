"""From a recipe to something that answers: load the models, apply the techniques in their slots, put a strategy on top.

lm = hasten.load("zoo:arith-m +ngram +vote(n=8)")
[result] = lm.generate(["a = 7 ; b = a * 3 ; ? b :"])
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from hasten import techniques
from hasten.engine import Engine, run
from hasten.recipe import Recipe, Use, load_recipe
from hasten.values import Prompt, Request, Result, Sampling, UserError

if TYPE_CHECKING:
    from hasten.lm.engine import TokenEngine


@dataclass
class Target:
    """What techniques are built for and applied to: the model of the recipe, and the tokenizers by role."""

    model: Any
    tokenizer: Any
    vocabulary: int
    end_ids: tuple[int, ...]
    tokenizers: dict[str, Any] = field(default_factory=dict)


class Models:
    """Models read from disk, each once: recipes that are compared share them. Key: (source, device, dtype)."""

    def __init__(self) -> None:
        self._loaded: dict[tuple[str, str, str], tuple[Any, Any]] = {}

    def get(self, source: str, device: str, dtype: str) -> tuple[Any, Any]:
        """(model, tokenizer) of a source."""
        from hasten import hf

        key = (source, device, dtype)
        if key not in self._loaded:
            path = hf.resolve(source)
            self._loaded[key] = (hf.load_model(path, device=device, dtype=dtype), hf.load_tokenizer(path))
        return self._loaded[key]


class Loaded:
    """A recipe that answers. `engine` is the outermost engine, `engines` the token engines by role."""

    def __init__(self, recipe: Recipe, engine: Engine, engines: dict[str, TokenEngine], tokenizer: Any, template: str) -> None:
        self.recipe, self.engine, self.engines, self.tokenizer, self.template = recipe, engine, engines, tokenizer, template

    def generate(self, prompts: Prompt | Sequence[Prompt], sampling: Sampling | None = None) -> list[Result]:
        """Answers to prompts (text, token ids or chat messages; one prompt alone is taken as a list of one), n a prompt, in order."""
        many: list[Any] = [prompts] if _is_one(prompts) else list(prompts)
        requests = {i: Request(p, sampling or Sampling(), id=str(i)) for i, p in enumerate(many)}
        done = run(self.engine, requests)
        return [r for first in done.values() for r in (replace(first, others=()), *first.others)]

    def score(self, prompts: Sequence[Prompt], score_from: int = 0) -> list[Result]:
        """Log-probabilities of the prompts' own tokens under the target model (`Result.scores`), or rewards of a reward model."""
        many = {i: Request(p, score=True, score_from=score_from, id=str(i)) for i, p in enumerate(prompts)}
        return list(run(self.engines["target"], many).values())

    def forget(self) -> None:
        """Drop what finished requests left in the caches: the next request is served as if it were the first."""
        for engine in self.engines.values():
            engine.cache.forget()

    @property
    def templated(self) -> bool:
        """Whether `ask` puts text into the tokenizer's chat template."""
        return self.template != "off" and bool(getattr(self.tokenizer, "chat_template", None))

    def ask(self, prompt: Prompt) -> Prompt:
        """A task's prompt as this model expects it: text becomes a user's message where the tokenizer has a chat template."""
        return [{"role": "user", "content": prompt}] if isinstance(prompt, str) and self.templated else prompt


def _is_one(prompts: Any) -> bool:
    return isinstance(prompts, str) or (bool(prompts) and isinstance(prompts[0], int | Mapping))


def load(
    source: str | Recipe, *, device: str = "auto", dtype: str = "auto", template: str = "auto", models: Models | None = None,
    max_rows: int = 128, **engine_options: Any,
) -> Loaded:  # fmt: skip
    """Load a directory, hub id, `zoo:NAME`, recipe text or recipe.json.

    device: "auto", "cpu", "cuda". dtype: "auto" or a torch name. template: "auto" or "off" (see `Loaded.ask`). models: share loaded models
    between calls. max_rows and engine_options go to `TokenEngine`. UserError says in one sentence what cannot be loaded or combined.
    """
    from hasten.lm.engine import TokenEngine

    if template not in ("auto", "off"):
        raise UserError(f"template={template!r}: must be 'auto' or 'off'")
    recipe = source if isinstance(source, Recipe) else load_recipe(source)
    models = models or Models()
    model, tokenizer = models.get(recipe.model, device, dtype)
    target = _target(model, tokenizer)
    why = techniques.why_not(recipe, target)
    if why:
        raise UserError(f"{recipe}: {why}")
    slots = _slots(recipe)
    for use in slots.get("transform", ()):
        model = _build(use, target)
        target = replace(target, model=model)
    extra = {k: v for use in slots.get("reuse", ()) for k, v in _build(use, target).items()}
    parts = {slot: _build(slots[slot][0], target) for slot in ("decode", "constraint") if slot in slots}
    options = {"max_rows": max_rows, **engine_options, **extra}
    engines = {"target": TokenEngine(model, tokenizer, **parts, **options)}
    if "strategy" not in slots:
        return Loaded(recipe, engines["target"], engines, tokenizer, template)
    use = slots["strategy"][0]
    for role, where in _roles(use).items():
        other, words = models.get(where, device, dtype)
        engines[role] = TokenEngine(other, words, role=role, **options)
        target.tokenizers[role] = words
    from hasten.strategies.drive import Drive

    return Loaded(recipe, Drive(engines, _build(use, target)), engines, tokenizer, template)


def _target(model: Any, tokenizer: Any) -> Target:
    from hasten import hf

    facts = hf.facts(model)
    return Target(model, tokenizer, facts.vocabulary, facts.end_ids, {"target": tokenizer})


def _slots(recipe: Recipe) -> dict[str, list[Use]]:
    out: dict[str, list[Use]] = {}
    for use in recipe.uses:
        out.setdefault(techniques.TECHNIQUES[use.name].slot, []).append(use)
    return out


def _build(use: Use, target: Target) -> Any:
    return techniques.module_of(use.name).build(techniques.options_for(use), target)


def _roles(use: Use) -> dict[str, str]:
    """Which further models a strategy asks: {"reward": source}."""
    roles = getattr(techniques.module_of(use.name), "roles", None)
    return roles(techniques.options_for(use)) if roles else {}
