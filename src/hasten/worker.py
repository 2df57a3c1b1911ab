"""One worker process of `workers`: it binds itself to its processors, loads the recipe, and answers what it is sent, one JSON document a line.

In: first what `open_recipe` takes; then {"add": serial, "role", "request"}, {"cancel": serial, "role"}, {"forget": true}. Out: {"ready": …} or
{"error": sentence}; then {"events": [value, …]}, {"refused": serial, "error": sentence}. It ends when its input ends, whatever it is doing.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from hasten import cpu, wire
from hasten.engine import Engine
from hasten.values import UserError

Say = Callable[[Mapping[str, Any]], None]
Lines = queue.SimpleQueue[bytes]


def main(open_: Callable[..., Any] | None = None) -> None:
    """Serve until the input ends. open_: makes what `hasten.load` makes from the first line (default: `open_recipe`)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks; it closes our input
    say, lines = _mouth(), _ears()
    try:
        loaded = (open_ or open_recipe)(**json.loads(lines.get()))
        roles = {role: asdict(engine.limits) for role, engine in loaded.engines.items()}
        say({"ready": {"roles": roles, "strategy": loaded.engine not in loaded.engines.values(), "threads": loaded.threads}})
        serve(loaded, lines, say)
    except Exception as error:
        if not isinstance(error, UserError):
            traceback.print_exc()
        say({"error": _sentence(error)})
        sys.stderr.flush()
        os._exit(1)  # not by the interpreter's way out, which must not meet a thread that reads


def open_recipe(recipe: Any, processors: Sequence[int], threads: str | int, most: int, options: Mapping[str, Any]) -> Any:
    """Load a recipe on these processors (none: wherever the system likes), with `most` threads at most where `threads` is "auto"."""
    if processors:
        cpu.bind(processors)  # before torch is there: all its threads inherit it
    import torch

    from hasten.load import load
    from hasten.recipe import Recipe

    if threads == "auto" and torch.get_num_threads() > most:
        torch.set_num_threads(most)
    return load(Recipe.from_json(recipe), threads=threads, pin=bool(processors), **options)


def serve(loaded: Any, lines: Lines, say: Say) -> None:
    """Answer for ever. A strategy and the models under it share engines, so whoever is asked next waits until the other is done."""
    engines: dict[str, Engine] = {"": loaded.engine}
    if loaded.engine not in loaded.engines.values():
        engines |= loaded.engines
    current = loaded.engine
    while True:
        while current.idle or not lines.empty():  # waits for a line only when there is nothing to do
            message = json.loads(lines.get())
            if "forget" in message:
                loaded.forget()
                continue
            engine = engines[message["role"]]
            while engine is not current and not current.idle:
                _step(current, say)
            current = engine
            _take(message, engine, say)
        _step(current, say)


def _take(message: Mapping[str, Any], engine: Engine, say: Say) -> None:
    if "cancel" in message:
        engine.cancel(message["cancel"])
        return
    try:
        engine.add(message["add"], wire.read(message["request"]))
    except Exception as error:
        say({"refused": message["add"], "error": _sentence(error)})


def _step(engine: Engine, say: Say) -> None:
    try:
        events = engine.step()
    except Exception as error:
        if not hasattr(error, "request"):  # a strategy failed on one request; anything else ends the worker
            raise
        say({"refused": error.request, "error": _sentence(error)})
        return
    for event in events:
        try:
            wire.dump(event)
        except TypeError as error:
            say({"refused": event.key, "error": f"its answer holds {error}, which cannot be sent from a worker process"})
            events = [e for e in events if e.key != event.key]
    if events:
        say({"events": [wire.dump(event) for event in events]})


def _sentence(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"


def _mouth() -> Say:
    """Lines to whoever asked; what anything else prints goes to stderr instead."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(message: Mapping[str, Any]) -> None:
        out.write(json.dumps(message) + "\n")
        out.flush()

    return say


def _ears() -> Lines:
    """The lines of stdin, read by a thread of their own so that whoever writes them never waits; at their end the process ends."""
    lines: Lines = queue.SimpleQueue()

    def listen() -> None:
        for line in sys.stdin.buffer:
            lines.put(line)
        os._exit(0)

    threading.Thread(target=listen, daemon=True).start()
    return lines
