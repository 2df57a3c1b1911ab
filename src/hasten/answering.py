"""What `hasten run` needs: sampling fields as options, chat messages from a file, an answer that streams as it becomes certain."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from hasten.values import Request, Result, Sampling, UserError

SAMPLING = {
    "max_tokens": "Most tokens to generate.",
    "min_tokens": "Fewest tokens before the answer may end.",
    "temperature": "0: greedy.",
    "top_k": "Sample among the k most likely tokens; 0: all.",
    "top_p": "Sample among the most likely tokens that hold this share of the probability.",
    "min_p": "Sample among tokens at least this likely relative to the likeliest.",
    "repetition_penalty": "Divides the logits of tokens seen before; 1: none.",
    "presence_penalty": "Subtracted from the logits of tokens generated before.",
    "frequency_penalty": "The same, times how often they were generated.",
    "logit_bias": "TOKEN=BIAS, added to that token's logit; repeatable.",
    "stop": "Text that ends the answer; repeatable.",
    "stop_token_ids": "Token id that ends the answer; repeatable.",
    "ignore_eos": "Go on after the end-of-sequence token.",
    "seed": "Names the stream of random numbers.",
    "n": "Number of answers.",
    "logprobs": "Log-probabilities of the chosen token and the k likeliest (in --json).",
    "prompt_logprobs": "The same for the prompt's tokens.",
}  # one line of help for each field of `Sampling`
_TYPES: dict[str, Any] = {
    "int": int,
    "float": float,
    "bool": bool,
    "int | None": int | None,
    "tuple[str, ...]": list[str] | None,
    "tuple[int, ...]": list[int] | None,
    "Mapping[int, float]": list[str] | None,
}


def with_sampling(function: Callable[..., None]) -> Callable[..., None]:
    """Replace the last parameter, `**sampling`, by one option for each field of `Sampling`."""
    own = list(inspect.signature(function, eval_str=True).parameters.values())[:-1]
    added = [
        inspect.Parameter(
            f.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None if "[" in str(f.type) else f.default,
            annotation=Annotated[_TYPES[str(f.type)], typer.Option(f"--{f.name.replace('_', '-')}", help=SAMPLING[f.name])],
        )
        for f in fields(Sampling)
    ]
    function.__signature__ = inspect.Signature([*own, *added])  # type: ignore[attr-defined]
    function.__annotations__ = {p.name: p.annotation for p in (*own, *added)}
    return function


def sampling_of(given: Mapping[str, Any]) -> Sampling:
    """Sampling from the options of `with_sampling`. UserError for a value out of range."""
    biases = _biases(given["logit_bias"] or [])
    return Sampling().but(**{name: value for name, value in given.items() if value is not None} | {"logit_bias": biases})


def _biases(texts: list[str]) -> dict[int, float]:
    try:
        return {int(token): float(bias) for token, bias in (text.split("=") for text in texts)}
    except ValueError:
        raise UserError("--logit-bias: write it as TOKEN=BIAS, for example --logit-bias 5=-100") from None


def read_messages(file: Path) -> list[dict[str, Any]]:
    """Chat messages from a JSON file. UserError if it does not hold any."""
    try:
        found = json.loads(file.read_text("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not a JSON file ({error})") from None
    if not (isinstance(found, list) and found and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in found)):
        raise UserError(f'{file}: must hold a list of messages, [{{"role": "user", "content": "…"}}]')
    return found


def answer(loaded: Any, request: Request, show: Callable[[str], None]) -> Result:
    """Answer one request, showing the text as it becomes certain; ends with a newline."""
    loaded.engine.add(0, request)
    tokens: list[int] = []
    shown, result = "", None
    while result is None:
        for event in loaded.engine.step():
            tokens += event.tokens if event.sample == request.sample else ()
            result = event.result or result
        certain = _certain(loaded.tokenizer.decode(tokens, skip_special_tokens=True), request.sampling.stop)
        if result is None and certain.startswith(shown):
            show(certain[len(shown) :])
            shown = certain
    # A strategy may answer with another sample than the one that streamed: then the answer stands on its own line.
    show(f"{result.text[len(shown) :]}\n" if result.text.startswith(shown) else f"\n{result.text}\n")
    return result


def _certain(text: str, stops: tuple[str, ...]) -> str:
    """The part of a growing text that no later token can change: no half character, and nothing that may belong to a stop string."""
    text = text.rstrip("\N{REPLACEMENT CHARACTER}")
    ends = [at for stop in stops if (at := text.find(stop)) >= 0]
    held = max((len(stop) - 1 for stop in stops), default=0)
    return text[: min(ends)] if ends else text[: len(text) - held]
