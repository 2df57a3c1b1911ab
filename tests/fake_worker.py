"""A worker process whose engine needs no model, for what happens between processes. The first id of a prompt says what is to happen."""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

from hasten.lm.limits import Limits
from hasten.usage import Cost, Usage
from hasten.values import Event, Request, Result, UserError
from hasten.worker import main

ANSWER, DIE, REFUSE, HANG, PRINT, BREAK, UNSENDABLE, BLOCK = range(8)


class Engine:
    """Answers the oldest request in each step, with the number of its process and of the worker."""

    def __init__(self, index: int) -> None:
        self.index, self.waiting, self.limits, self.threads = index, dict[Any, Request](), Limits(64, 100, 100, False, False), 1

    @property
    def idle(self) -> bool:
        return not self.waiting

    def add(self, key: Any, request: Request) -> None:
        if request.prompt[0] == REFUSE:
            raise UserError("not today")
        self.waiting[key] = request

    def cancel(self, key: Any) -> None:
        if key in self.waiting:
            self.waiting[key] = Request((ANSWER,), id="cancelled")

    def step(self) -> list[Event]:
        key, request = next(iter(self.waiting.items()))
        kind = request.prompt[0]
        if kind == DIE:
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == BREAK:
            raise KeyError("a bug")
        if kind == BLOCK:
            time.sleep(60)
        if kind == HANG:
            time.sleep(0.002)
            return []
        if kind == PRINT:
            print("noise", flush=True)
            os.system("echo more noise")
        del self.waiting[key]
        trace = {
            "index": self.index,
            "process": os.getpid(),
            "parent": request.parent,
            **({"what": object()} if kind == UNSENDABLE else {}),
        }
        usage = Usage({"target": Cost(prompt=len(request.prompt), generated=1)}, seconds=0.001)
        reason = "cancelled" if request.id == "cancelled" else "stop"
        return [
            Event(key, (1,)),
            Event(key, result=Result("", (1,), None, reason, usage, trace=trace, prompt_tokens=tuple(request.prompt))),
        ]


class Loaded:
    """What `hasten.load` gives, as far as a worker needs it."""

    threads = 1

    def __init__(self, index: int = 0, error: str = "", late: float = 0.0) -> None:
        time.sleep(late)
        if error == "user":
            raise UserError("no such model")
        if error:
            raise KeyError(error)
        self.engine = Engine(index)
        self.engines = {"target": self.engine}

    def forget(self) -> None:
        print("forgotten", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main(Loaded)
