"""From a recipe to something that answers: load the models, apply the techniques in their slots, put a strategy on top.

lm = hasten.load("zoo:arith-m +ngram +vote(n=8)")
[result] = lm.generate(["a = 7 ; b = a * 3 ; ? b :"])
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from hasten import cpu, techniques
from hasten.engine import Engine, run
from hasten.recipe import Recipe, Use, load_recipe
from hasten.values import Prompt, Request, Result, Sampling, UserError

if TYPE_CHECKING:
    from hasten.lm.engine import TokenEngine


@dataclass
class Target:
    """What techniques are built for and applied to: the model of the recipe; further models that decoding needs and all tokenizers by role."""

    model: Any
    tokenizer: Any
    vocabulary: int
    end_ids: tuple[int, ...]
    tokenizers: dict[str, Any] = field(default_factory=dict)
    models: dict[str, Any] = field(default_factory=dict)


class Models:
    """Models read from disk, each once: recipes that are compared share them. Key: (source, device, type of the weights)."""

    def __init__(self) -> None:
        self._loaded: dict[tuple[str, str, str], tuple[Any, Any]] = {}

    def get(self, source: str, device: str, dtype: str, own: bool = False) -> tuple[Any, Any]:
        """(model, tokenizer) of a source. own: its weights in this process's own memory."""
        from hasten import hf

        path = hf.resolve(source)
        key = (source, device, hf.dtype_name(path, device, dtype))
        if key not in self._loaded:
            self._loaded[key] = (hf.load_model(path, device=device, dtype=dtype), hf.load_tokenizer(path))
        model = self._loaded[key][0]
        if own:
            hf.derived(model, "own", lambda: hf.own(model))
        return self._loaded[key]


class Loaded:
    """A recipe that answers. `engine` is the outermost engine, `engines` the token engines by role."""

    def __init__(
        self, recipe: Recipe, engine: Engine, engines: dict[str, TokenEngine], tokenizer: Any, template: str, load_seconds: float = 0.0
    ) -> None:
        self.recipe, self.engine, self.engines, self.tokenizer, self.template = recipe, engine, engines, tokenizer, template
        self.load_seconds = load_seconds

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

    def close(self) -> None:
        """End what runs beside this process, if there is anything (`workers`, `pearl`)."""
        for engine in self.engines.values():
            engine.decode.close()

    def processor_seconds(self) -> float:
        """Processor time that other processes have used for it so far."""
        return sum(engine.decode.processor_seconds() for engine in self.engines.values())

    def __enter__(self) -> Loaded:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def forget(self) -> None:
        """Drop what finished requests left in the caches: the next request is served as if it were the first."""
        for engine in self.engines.values():
            engine.cache.forget()

    @property
    def threads(self) -> int:
        """Threads of the target model's engine."""
        return self.engines["target"].threads or 1

    @property
    def startup(self) -> dict[str, float]:
        """Seconds that no later answer costs again: load (read and pack the models), and compile, which happens when a step is first met."""
        step = getattr(getattr(self.engines["target"], "model", None), "small_step", None)
        return {"load": self.load_seconds, "compile": sum(getattr(step, "seconds", {}).values())}

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
    max_rows: int = 128, threads: str | int = "auto", pin: bool = False, workers: str | int | None = None,
    speculative_config: Mapping[str, Any] | None = None, **engine_options: Any,
) -> Loaded:  # fmt: skip
    """Load a directory, hub id, `zoo:NAME`, recipe text or recipe.json.

    device: "auto", "cpu", "cuda". dtype: "auto" or a torch name. template: "auto" or "off" (see `Loaded.ask`). models: share loaded models
    between calls. threads: "auto" (see `cpu.choose`; each model of the recipe gets its own number) or a number for all. pin: keep this
    process on the cores of one NUMA node from now on. workers: answer in so many processes, each on cores of its own ("auto": one a NUMA
    node; see `hasten.workers`). speculative_config: vLLM's, a decode technique under other names; transformers' keywords
    (assistant_model, prompt_lookup_num_tokens, ...) are taken too. max_rows and engine_options go to `TokenEngine`. UserError says in one
    sentence what cannot be loaded or combined.
    """
    if template not in ("auto", "off"):
        raise UserError(f"template={template!r}: must be 'auto' or 'off'")
    began, most = time.perf_counter(), cpu.choose(threads)
    recipe = _speculating(source if isinstance(source, Recipe) else load_recipe(source), speculative_config, engine_options)
    if workers is not None:
        from hasten.workers import spread

        options = {"models": models, "dtype": dtype, "max_rows": max_rows, **engine_options}
        return spread(recipe, workers, threads=threads, template=template, device=device, **options)
    if pin:
        cpu.pin(most)  # before the weights are read: memory belongs to the node that touches it first
    models, slots = models or Models(), _slots(recipe)
    model, tokenizer = models.get(recipe.model, device, _dtype(recipe, device, dtype), own=pin)
    target = _target(model, tokenizer)
    for use in slots.get("decode", ()):
        for role, where in _roles(use).items():
            target.models[role], target.tokenizers[role] = models.get(where, device, dtype, own=pin)
    options = {"max_rows": max_rows, **engine_options}
    engines = {"target": _engine(recipe, slots, target, threads, options)}
    if "strategy" not in slots:
        return Loaded(recipe, engines["target"], engines, tokenizer, template, time.perf_counter() - began)
    from hasten.lm.engine import TokenEngine
    from hasten.strategies.drive import Drive

    use = slots["strategy"][0]
    for role, where in _roles(use).items():
        other, words = models.get(where, device, dtype, own=pin)
        engines[role] = TokenEngine(other, words, role=role, threads=_threads(threads, other), **options | _reuse(slots, target))
        target.models[role], target.tokenizers[role] = other, words
    return Loaded(recipe, Drive(engines, _build(use, target)), engines, tokenizer, template, time.perf_counter() - began)


def _speculating(recipe: Recipe, config: Mapping[str, Any] | None, options: dict[str, Any]) -> Recipe:
    """The recipe with the speculation that is asked for under vLLM's or transformers' names; these are taken out of `options`."""
    from hasten.lm.decode import names

    keywords = {name: options.pop(name) for name in [*options] if name in names.KEYWORDS}
    if config is not None and keywords:
        raise UserError(f"speculative_config and {', '.join(keywords)} both name a way to speculate: give one")
    if config is None and not keywords:
        return recipe
    use = names.from_transformers(keywords) if config is None else names.from_vllm(config)
    return techniques.checked(Recipe(recipe.model, (*recipe.uses, use)))


def _engine(recipe: Recipe, slots: dict[str, list[Use]], target: Target, threads: str | int, options: dict[str, Any]) -> TokenEngine:
    """The token engine of the target with its transforms, decode technique and constraint."""
    from hasten.lm.engine import TokenEngine

    count = _threads(threads, target.model)
    if beside := sum(map(_beside, slots.get("decode", ()))):
        count = max(1, min(count, cpu.topology().cores - beside))
    with cpu.using(count):  # what is built for so many threads
        why = techniques.why_not(recipe, target)
        if why:
            raise UserError(f"{recipe}: {why}")
        for use in slots.get("transform", ()):
            target.model = _build(use, target)
        parts = {slot: _build(slots[slot][0], target) for slot in ("decode", "constraint") if slot in slots}
        make = getattr(parts.get("decode"), "engine", None)  # a technique that needs another engine than the plain one
        if make is not None:
            del parts["decode"]
        return (make or TokenEngine)(target.model, target.tokenizer, threads=count, **parts, **options | _reuse(slots, target))


def _beside(use: Use) -> int:
    """Cores that a technique needs for itself, beside the target's."""
    cores = getattr(techniques.module_of(use.name), "cores", None)
    return cores(techniques.options_for(use)) if cores else 0


def _threads(threads: str | int, model: Any) -> int:
    from hasten import hf

    return cpu.choose(threads, hf.nbytes(model))


def _dtype(recipe: Recipe, device: str, dtype: str) -> str:
    """The type asked for; "auto" becomes the one that a technique's own CPU kernels take, if there are such."""
    from hasten import hf

    if dtype != "auto" or (hf.best_device() if device == "auto" else device) != "cpu":
        return dtype
    return next((taken for use in recipe.uses if (taken := getattr(techniques.module_of(use.name), "CPU_DTYPE", ""))), dtype)


def _reuse(slots: dict[str, list[Use]], target: Target) -> dict[str, Any]:
    return {key: value for use in slots.get("reuse", ()) for key, value in _build(use, target).items()}


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
