"""The draft's side of `pearl`: a draft model that keeps rows in step with somebody else's by tiny messages, in a process of its own.

A message names rows by number; it says how much of the text that the drafter has of a row still holds and what follows it, and asks for so many
tokens more. Only ids go back, and with `rejection` each one's probability; the whole law of a token is sent when it was refused, to draw what
takes its place (the protocol of nano-PEARL, https://github.com/smart-lty/nano-PEARL, with a drawn draft added).

The process binds itself to its cores before it reads the weights, so they lie there, and ends when its input does.
"""

from __future__ import annotations

import base64
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import numpy as np
import torch

from hasten import cpu, hf, rng, wire
from hasten.child import Child, readable, stop
from hasten.lm import sampler
from hasten.lm.decode.draft import Draft, Options, State, Vocabulary, quick
from hasten.lm.decode.verify import Uniform
from hasten.lm.scheduler import Row
from hasten.values import Request, UserError

SPIN = 0.002  # seconds in which either side asks again and again for a message before it sleeps: waking up takes longer than a small model's pass
PATIENCE = 120.0  # seconds without an answer after which a drafter counts as dead; the longest prompt takes less
COMMAND = (sys.executable, "-P", "-c", "from hasten.lm.decode.drafter import main; main()")
Told = tuple[int, int, int, list[int], int]  # row, ids confirmed, ids of the drafter's text that hold, ids after those, ids wanted


class Gone(Exception):
    """The drafter has ended, or does not answer; the message says how."""


class Drafter(Protocol):
    """Whoever answers `Rows`'s messages: another process, or `Rows` itself in a test."""

    def send(self, message: Mapping[str, Any]) -> None: ...

    def receive(self) -> dict[str, Any]:
        """The answer to the oldest message that has none. Raises Gone."""

    def processor_seconds(self) -> float: ...

    def close(self) -> None: ...


# --- the rows -------------------------------------------------------------------------------------------------------------------------------


@dataclass
class Host:
    """What `Draft` asks of an engine, where there is none: the draft knows no constraint, what it proposes against one is refused."""

    max_rows: int
    ends: tuple[int, ...]
    constraint: None = None
    model: None = None

    @property
    def scheduler(self) -> Host:
        return self

    def choice(self, row: Row, drafted: Sequence[int]) -> sampler.Choice:
        return sampler.choice(row, drafted, self.ends)


class Continuing(Draft):
    """A draft whose numbers depend on the position alone: each position is judged once, so none of them decides twice (see `pearl`)."""

    def _uniform(self, row: Row) -> Uniform:
        seed, sample, start = row.request.sampling.seed, row.sample, len(row.tokens)
        return lambda purpose, i: rng.uniform(seed, sample, start + i, purpose)

    def feed(self, rows: Sequence[Row]) -> None:
        """Compute what is known of rows whose prompts the target still reads."""
        going = [job for row in rows if (job := self._job(row, 1)) is not None]
        while going:
            self._pass(going)
            going = [job for job in going if job.pending]


@dataclass
class Known:
    """A row as the drafter has it: `row.tokens` are the text that it goes on from; laws of its drafted tokens that are not judged, by position."""

    row: Row
    laws: dict[int, torch.Tensor] = field(default_factory=dict)


class Rows:
    """Answers messages; each is {"do": name of a method, its arguments}. model: prepared. ends: ids that end the target's answers."""

    def __init__(self, model: Any, vocabulary: int, mode: str, max_rows: int, ends: Sequence[int]) -> None:
        self.draft = Continuing(Options(model="draft", k=1, mode=mode, schedule="constant"), quick(model), Vocabulary(vocabulary))
        self.draft.bind(Host(max_rows, tuple(ends)))
        self.rows: dict[int, Known] = {}

    def answer(self, message: Mapping[str, Any]) -> dict[str, Any]:
        return getattr(self, message["do"])(**{name: value for name, value in message.items() if name != "do"})

    def open(self, row: int, sampling: Any, sample: int, prompt: int) -> dict[str, Any]:
        self.rows[row] = Known(Row(row, Request((), wire.read(sampling)), sample, [], prompt, 0.0, decode_state=State()))
        return {}

    def go_on(self, rows: Sequence[Told]) -> dict[str, Any]:
        """{"drafted": ids of each row, "p": their probabilities where they were drawn, "seconds", "passes": what it took}."""
        before, began = self.draft.passes, time.perf_counter()
        known = [self._told(*told) for told in rows]
        wanted = [told[-1] for told in rows]
        self.draft.feed([k.row for k, n in zip(known, wanted, strict=True) if not n])
        drafted = cast(list[list[int]], self.draft.draft([k.row for k in known], wanted))  # one branch: chains
        p = [self._kept(k, ids) for k, ids in zip(known, drafted, strict=True)]
        cost = {"seconds": time.perf_counter() - began, "passes": self.draft.passes - before}
        return {"drafted": drafted, **cost, **({"p": p} if self.draft.options.mode != "coupled" else {})}

    def _told(self, row: int, confirmed: int, hold: int, tail: Sequence[int], wanted: int) -> Known:
        known = self.rows[row]
        known.row.tokens[hold:] = tail
        known.laws = {at: law for at, law in known.laws.items() if at >= confirmed}
        return known

    def _kept(self, known: Known, ids: list[int]) -> list[float]:
        """Take drafted ids as the row's text, with their laws; their probabilities."""
        laws, start = known.row.decode_state.laws[: len(ids)], len(known.row.tokens)
        known.laws |= {start + i: law for i, law in enumerate(laws)}
        known.row.tokens += ids
        return [float(law[token]) for law, token in zip(laws, ids, strict=False)]

    def law(self, row: int, position: int) -> dict[str, Any]:
        """{"law": what the token at this position was drawn from, float64}."""
        return {"law": base64.b64encode(self.rows[row].laws[position].numpy().tobytes()).decode()}

    def close(self, row: int) -> dict[str, Any]:
        """{"cost": [prompt, reused, generated, forwards, flops, bytes]} of a row that has ended."""
        known = self.rows.pop(row)
        state = known.row.decode_state
        self.draft.finish(known.row)
        return {"cost": [state.prompt, state.reused, state.generated, state.forwards, state.flops, state.bytes]}


def law_of(message: Mapping[str, Any]) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(base64.b64decode(message["law"]), dtype=np.float64).copy())


# --- the process ----------------------------------------------------------------------------------------------------------------------------


class Process:
    """A drafter in a process of its own. setup: see `main`."""

    def __init__(self, setup: Mapping[str, Any], command: Sequence[str] = COMMAND) -> None:
        self._child = Child("the draft's process", command)
        self._child.send(setup)
        self._heard: list[dict[str, Any]] = []

    def ready(self) -> None:
        """Wait until it has read the model; UserError says why it could not."""
        try:
            said = self.receive()
        except Gone as gone:
            raise UserError(f"pearl: {gone}") from None
        if "error" in said:
            self.close()
            raise UserError(f"pearl: {said['error']}")

    def send(self, message: Mapping[str, Any]) -> None:
        self._child.send(message)

    def receive(self) -> dict[str, Any]:
        while not self._heard:
            if not readable(self._child.process.stdout.fileno(), SPIN, PATIENCE):
                self._child.process.kill()
                raise Gone(f"the draft's process did not answer within {PATIENCE:g} seconds ({self._child.end()})")
            heard = self._child.read()
            if heard is None:
                raise Gone(self._child.end())
            self._heard += heard
        return self._heard.pop(0)

    def processor_seconds(self) -> float:
        return self._child.processor_seconds()

    def close(self) -> None:
        stop([self._child])


def main() -> None:
    """Serve until the input ends. First line: {"model", "processors" (none: anywhere), "threads", "device", and the arguments of `Rows`}."""
    messages, out = _lines(), os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what anything else prints is none of our answers
    setup = json.loads(next(messages))
    try:
        rows = _rows(**setup)
    except UserError as error:
        print(json.dumps({"error": str(error)}), file=out, flush=True)
        return
    print(json.dumps({"ready": True}), file=out, flush=True)
    for line in messages:
        print(json.dumps(rows.answer(json.loads(line))), file=out, flush=True)


def _rows(model: str, processors: Sequence[int], threads: int, device: str, **more: Any) -> Rows:
    if processors:
        cpu.bind(processors)
    torch.set_num_threads(threads)
    return Rows(hf.load_model(model, device=device), **more)


def _lines() -> Any:
    """The lines of the input, looked out for rather than waited for where one follows soon after an answer."""
    part = b""
    while True:
        readable(0, SPIN, 3600.0)
        data = os.read(0, 1 << 20)
        if not data:
            return
        *lines, part = (part + data).split(b"\n")
        yield from lines
