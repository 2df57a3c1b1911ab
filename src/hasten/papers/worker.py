"""Worker processes that serve requests on cores of their own, and what they are asked.

`python -m hasten.papers.worker CORES SHAPE` binds itself to the cores before it allocates anything (so that its memory is of their NUMA
node: Linux gives pages to the node that first touches them), makes a random-weight Llama and answers jobs, one JSON line each.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hasten.values import UserError


@dataclass(frozen=True, slots=True)
class Job:
    """Generate `tokens` after each of `requests` prompts of `prompt` random tokens. rows: in one forward pass at most; 0: the stock loop."""

    requests: int
    prompt: int
    tokens: int
    rows: int
    seed: int


class Worker:
    """A worker process; `send` and `receive` are apart so that several can work at the same time. An idle one sleeps."""

    def __init__(self, cores: Sequence[int], shape: Mapping[str, Any]) -> None:
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        home = str(Path(__file__).parents[2])
        paths = os.pathsep.join(filter(None, (home, os.environ.get("PYTHONPATH"))))
        self._child = subprocess.Popen(
            [sys.executable, "-m", "hasten.papers.worker", ",".join(map(str, cores)), json.dumps(shape)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True,
            env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": str(len(cores))},
        )  # fmt: skip

    def send(self, job: Job) -> None:
        assert self._child.stdin is not None
        try:
            self._child.stdin.write(json.dumps(asdict(job)) + "\n")
            self._child.stdin.flush()
        except BrokenPipeError:
            self.receive()  # says why

    def receive(self) -> dict[str, float]:
        """What a job gave: {"tokens", "seconds", "cpu": processor-seconds, "parameters": of the model}."""
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        if not line:
            self._child.wait()
            raise UserError(f"a worker process ended: {self._last_words()}")
        return json.loads(line)

    def stop(self) -> None:
        """Let it end, whatever it is doing."""
        self._child.terminate()

    def close(self) -> None:
        """Stop it and wait until it has ended."""
        assert self._child.stdin is not None and self._child.stdout is not None
        self.stop()
        self._child.wait()
        self._child.stdin.close()
        self._child.stdout.close()
        self._errors.close()

    def _last_words(self) -> str:
        self._errors.seek(0)
        said = [line.strip() for line in self._errors if line.strip()]
        return said[-1] if said else "it said nothing"


# ------------------------------------------------------------------------------------------------------- inside the process


class Server:
    """The same random weights twice: as transformers runs them, and as the engine does."""

    def __init__(self, shape: Mapping[str, Any]) -> None:
        import copy

        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        from hasten import hf

        torch.manual_seed(0)
        hf.quiet()
        settings = {name: value for name, value in shape.items() if name != "dtype"}
        self.stock = LlamaForCausalLM(LlamaConfig(**settings)).to(hf.named_dtype(shape["dtype"])).eval()
        self.ours = hf.prepare(copy.deepcopy(self.stock))

    def serve(self, job: Job) -> dict[str, float]:
        """Do a job; see `Worker.receive` for the answer."""
        import torch

        rand = torch.Generator().manual_seed(job.seed)
        prompts = torch.randint(1, self.stock.config.vocab_size, (job.requests, job.prompt), generator=rand).tolist()
        before, began = os.times(), time.perf_counter()
        made = self._engine(prompts, job) if job.rows else self._stock(prompts, job)
        seconds, after = time.perf_counter() - began, os.times()
        cpu = after.user + after.system - before.user - before.system
        return {"tokens": made, "seconds": seconds, "cpu": cpu, "parameters": self.stock.num_parameters()}

    def _stock(self, prompts: list[list[int]], job: Job) -> int:
        """One request after the other through `transformers.generate`."""
        import torch

        made = 0
        for prompt in prompts:
            ids = torch.tensor([prompt])
            out = self.stock.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=job.tokens, min_new_tokens=job.tokens, do_sample=False
            )
            made += out.shape[1] - ids.shape[1]
        return made

    def _engine(self, prompts: list[list[int]], job: Job) -> int:
        from hasten.engine import run
        from hasten.lm.engine import TokenEngine
        from hasten.values import Request, Sampling

        sampling = Sampling(max_tokens=job.tokens, ignore_eos=True)
        engine = TokenEngine(self.ours, max_rows=job.rows)
        done = run(engine, {i: Request(prompt, sampling) for i, prompt in enumerate(prompts)})
        return sum(len(result.tokens) for result in done.values())


def main() -> None:
    """Serve jobs from stdin until it closes."""
    mine, shape = [int(core) for core in sys.argv[1].split(",")], json.loads(sys.argv[2])
    if hasattr(os, "sched_setaffinity"):  # before torch starts threads, which inherit it
        os.sched_setaffinity(0, mine)
    answers, sys.stdout = sys.stdout, sys.stderr  # nothing that a library prints gets between the answers
    import torch

    torch.set_num_threads(len(mine))
    server = Server(shape)
    for line in sys.stdin:
        print(json.dumps(server.serve(Job(**json.loads(line)))), file=answers, flush=True)


if __name__ == "__main__":
    main()
