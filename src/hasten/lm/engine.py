"""The token engine: continuous batching over any transformers causal language model or reward model with rewindable attention.

One step is one forward pass over whatever rows the scheduler names: `plan` (who computes what, with proposals), `_forward`, `_commit`
(choose, accept, rewind, finish). Speculation, constraints, scoring, prompts in chunks and plain decoding are the same code path.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from hasten import cpu, hf
from hasten.flops import model_cost
from hasten.lm import sampler, text
from hasten.lm.attention import Plan, Span
from hasten.lm.cache import Entry, RaggedCache, Shape
from hasten.lm.constrain import Constraint, pruned
from hasten.lm.decode import Decode
from hasten.lm.decode.plain import Plain
from hasten.lm.limits import Limits
from hasten.lm.scheduler import Row, Scheduler, Work
from hasten.lm.tree import Tree
from hasten.usage import Usage
from hasten.values import Event, Key, Request, Result, UserError

DEFAULT_TOKENS = 256


class TokenEngine:
    """Serves requests on one model.

    model: as `hf.load_model` or `hf.prepare` gives it. role: under which its costs are booked. max_rows: rows in one forward pass at most.
    step_tokens: positions in one forward pass at most (prompts are cut into chunks). memory: bytes of cache at most (default: a quarter
    of what is free). share, retained: see `prefix`. threads: torch's threads in a step (default: as many as it has).
    """

    def __init__(
        self, model: Any, tokenizer: Any = None, *, role: str = "target", decode: Decode | None = None, constraint: Constraint | None = None,
        max_rows: int = 128, step_tokens: int = 512, max_len: int | None = None, memory: int | None = None, share: bool = True, retained: int = 32,
        threads: int | None = None,
    ) -> None:  # fmt: skip
        if max_rows < 1 or step_tokens < 1:
            raise UserError("max_rows and step_tokens must be at least 1")
        self.model, self.tokenizer, self.role = model, tokenizer, role
        self.decode, self.constraint = decode or Plain(), constraint
        self.threads = threads
        self.facts = hf.facts(model)
        self.costs = model_cost(model)
        parameter = next(model.parameters())
        shape = Shape(self.facts.layers, self.facts.kv_heads, self.facts.head_dim, parameter.dtype, parameter.device)
        budget = max(1, (memory or hf.spare_memory(parameter.device) // 4) // shape.bytes_per_position)
        self.cache = RaggedCache(
            shape, budget=budget, max_len=min(max_len or self.facts.max_len, self.facts.max_len), max_rows=max_rows, retained=retained
        )
        self.scheduler = Scheduler(self.cache, max_rows=max_rows, step_tokens=step_tokens, share=share)
        inputs = int(model.get_input_embeddings().weight.shape[0])
        self.limits = Limits(self.cache.max_len, inputs, self.facts.vocabulary, self.facts.reward, tokenizer is not None)
        self.forward_seconds = 0.0
        self.steps = 0
        self.positions = 0  # computed by all steps; padding inside attention not counted
        self._groups: dict[Key, _Group] = {}
        self._kept: dict[Key, tuple[Entry, list[int]]] = {}
        self._news: list[Event] = []
        self.decode.bind(self)

    @property
    def idle(self) -> bool:
        return not (self._groups or self._news)

    # --- requests -----------------------------------------------------------------------------------------------------------------

    def add(self, key: Key, request: Request) -> None:
        """Queue a request; UserError names what cannot be served."""
        if key in self._groups:
            raise ValueError(f"key {key!r} is in use")
        tokens = self._tokens(request)
        if request.sampling.max_tokens is None:
            room = max(0, min(DEFAULT_TOKENS, self.cache.max_len - len(tokens)))
            request = replace(request, sampling=replace(request.sampling, max_tokens=room))
        self.limits.check(request, tokens)
        if self.constraint is not None:
            self.constraint.check(request)
        for old in request.release:
            self._unpin(old)
        s, now = request.sampling, time.perf_counter()
        rows = [Row(key, request, request.sample + i, list(tokens), len(tokens), now) for i in range(s.n)]
        self._groups[key] = _Group(rows)
        for row in rows:
            if self.constraint is not None and not request.score:
                row.constraint_state = self.constraint.start(tokens)
            if request.score:
                row.read = max(0, request.score_from - 1)
            elif s.prompt_logprobs is not None and row is rows[0]:
                row.read = 0
            if s.max_tokens == 0 and row.read is None:
                self._finish(row, "length")
            else:
                self.scheduler.add(row)

    def cancel(self, key: Key) -> None:
        """Stop a request; its final event says "cancelled" and what it had cost. A kept one is let go. Unknown keys are ignored."""
        self._unpin(key)
        for row in self._groups[key].rows if key in self._groups else ():
            if not row.finish:
                self._finish(row, "cancelled")

    def _tokens(self, request: Request) -> list[int]:
        if request.parent is None:
            return text.encode(self.tokenizer, request.prompt)
        if request.parent not in self._kept:
            raise UserError(f"parent {request.parent!r} is not a finished request that was kept")
        return self._kept[request.parent][1] + text.encode(self.tokenizer, request.prompt, special=False)

    # --- one step -------------------------------------------------------------------------------------------------------------------

    def step(self) -> list[Event]:
        """One forward pass over the rows whose turn it is."""
        with cpu.using(self.threads):  # torch counts them for each thread of Python: whoever steps has to say
            works = self.scheduler.plan()
            began = time.perf_counter()
            self.decode.planned(works)
            self._propose(works)
            proposed = time.perf_counter()
            if works:
                self._commit(works, self._forward(works))
                if all(w.n == 1 for w in works):
                    self.decode.timed(sum(w.width for w in works), proposed - began, time.perf_counter() - proposed)
        news, self._news = self._news, []
        return news

    def _propose(self, works: Sequence[Work]) -> None:
        """Ask the decode technique for tokens to try after rows that decode; the constraint prunes them before the pass."""
        ready = [w for w in works if w.n == 1 and w.outputs == 1 and w.row.generated and not w.row.request.score]
        room = [min(w.row.limit - w.row.generated - 1, self.cache.max_len - len(w.row.tokens)) for w in ready]
        for work, proposal in zip(ready, self.decode.propose([w.row for w in ready], room), strict=True):
            if proposal and self.scheduler.extend(work, len(proposal)):
                work.take(proposal)
        if self.constraint is not None:
            for work in works:
                proposal, work.states = pruned(self.constraint, work.row.constraint_state, work.offered)
                work.take(proposal)

    def _forward(self, works: Sequence[Work]) -> torch.Tensor:
        """Outputs at the positions where they are needed, row after row: [sum of outputs, vocabulary] (a reward model: [.., 1])."""
        ids: list[int] = []
        positions: list[int] = []
        outputs: list[int] = []
        spans: list[Span] = []
        for w in works:
            tokens, entry = w.row.tokens[w.start : w.start + w.n] + w.proposal, w.row.held
            spans.append(Span(entry.slot, w.start, w.width, len(ids), w.tree))
            ids += tokens
            positions += range(w.start, w.start + w.width) if w.tree is None else _positions(w, w.tree)
            outputs += range(len(ids) - len(w.proposal) - w.outputs, len(ids) if w.outputs else len(ids) - len(w.proposal))
            entry.tokens += tokens
        device = self.cache.shape.device
        plan = Plan(self.cache, spans)
        began = time.perf_counter()
        where = None if len(outputs) == len(ids) else torch.tensor(outputs, dtype=torch.long, device=device)
        logits = hf.forward(self.model, torch.tensor(ids, device=device), torch.tensor(positions, device=device), where, plan)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self.forward_seconds += time.perf_counter() - began
        self.steps += 1
        self.positions += len(ids)
        self._book(works)
        return logits

    def _book(self, works: Sequence[Work]) -> None:
        """Enter a pass in the ledger of each row that took part."""
        share, peak = 1 / len(works), self.cache.nbytes
        for w in works:
            row = w.row
            row.forwards += 1
            row.flops += self.costs.flops(w.width, w.start, w.outputs + len(w.proposal))
            row.bytes += self.costs.bytes(w.start + w.width, share)
            row.proposed += len(w.proposal)
            row.peak = peak

    def _commit(self, works: Sequence[Work], logits: torch.Tensor) -> None:
        """Score or choose at every output, let the decode technique accept, rewind what was not kept."""
        at, now = 0, time.perf_counter()
        picks: list[tuple[Work, slice]] = []
        for w in works:
            span = slice(at, at + w.outputs + len(w.proposal))
            at = span.stop
            if w.row.request.score:
                self._score(w, logits[span])
            elif w.row.read is not None:
                if self._read_prompt(w, logits[span]):
                    picks.append((w, slice(at - 1, at)))
            elif w.outputs:
                picks.append((w, span))
        if not picks:
            return
        rows = (
            logits
            if len(picks) == len(works) and sum(s.stop - s.start for _, s in picks) == at
            else torch.cat([logits[s] for _, s in picks])
        )
        chosen = sampler.choose(rows, [c for w, _ in picks for c in self._choices(w)], self._mask([w for w, _ in picks], rows))
        start = 0
        for w, span in picks:
            stop = start + span.stop - span.start
            committed = self.decode.accept(w.row, w.offered, chosen.tokens[start:stop], chosen.logits[start:stop])
            self._append(w, committed, rows[start:stop], now)
            start = stop

    def _read_prompt(self, w: Work, outputs: torch.Tensor) -> bool:
        """Log-probabilities of the prompt's tokens that follow this chunk's; whether the last output is the one to choose from."""
        row, first, stop = w.row, w.start + w.n - w.outputs, w.start + w.n
        follow = row.tokens[first + 1 : min(stop + 1, row.prompt)]
        if follow:
            row.prompt_logprobs += sampler.logprobs(outputs[: len(follow)], follow, row.request.sampling.prompt_logprobs or 0)
        row.read = stop if stop < row.prompt else None
        if stop == len(row.tokens) and row.limit == 0:
            self._finish(row, "length")
        return stop == len(row.tokens) and row.limit > 0

    def _choices(self, w: Work) -> list[sampler.Choice]:
        before = [w.proposal[:i] for i in range(len(w.proposal) + 1)] if w.tree is None else map(w.tree.path, range(-1, len(w.tree)))
        return [self.choice(w.row, drafted) for drafted in before]

    def choice(self, row: Row, drafted: Sequence[int]) -> sampler.Choice:
        """How a row's token after some proposed ones is to be chosen."""
        return sampler.choice(row, drafted, self._ends(row))

    def _ends(self, row: Row) -> tuple[int, ...]:
        s = row.request.sampling
        return s.stop_token_ids + (() if s.ignore_eos else self.facts.end_ids)

    def _mask(self, works: Sequence[Work], logits: torch.Tensor) -> torch.Tensor | None:
        if self.constraint is None:
            return None
        return self.constraint.mask([state for w in works for state in w.states], logits.shape[-1], logits.device)

    def _append(self, w: Work, committed: Sequence[int], raw: torch.Tensor, now: float) -> None:
        """Commit tokens one by one until one ends the answer; what is stored beyond them is rewound. raw: outputs of the row's own last token
        and of each proposed one.
        """
        row, s = w.row, w.row.request.sampling
        ends, kept, finish = self._ends(row), 0, ""
        for token in committed:
            row.tokens.append(token)
            kept += 1
            if token in ends and row.generated > s.min_tokens:
                finish, row.stop = "stop", token if token in s.stop_token_ids else None
            elif s.stop and row.generated >= s.min_tokens and (found := text.stopped(self.tokenizer, row.tokens[row.prompt :], 1, s.stop)):
                finish, row.stop = "stop", found
            elif row.generated >= row.limit:
                finish = "length"
            if finish:
                break
        if self.constraint is not None:
            for token in committed[:kept]:
                row.constraint_state = self.constraint.advance(row.constraint_state, token)
        row.accepted += max(0, min(kept, len(committed) - 1))
        if w.tree is None:
            self.cache.truncate(row.held, len(row.tokens) - 1)
        else:
            path = w.tree.follow(committed[: kept - 1])
            self.cache.compact(row.held, w.start + w.n, path)
            raw = raw[[0, *(node + 1 for node in path)]]
        row.first, row.last = row.first or now, now
        if s.logprobs is not None:
            row.logprobs += sampler.logprobs(raw[:kept], committed[:kept], s.logprobs)
        self._news.append(Event(row.key, tuple(committed[:kept]), sample=row.sample - row.request.sample))
        if finish:
            self._finish(row, finish)

    def _score(self, w: Work, outputs: torch.Tensor) -> None:
        """Scores of the positions in this chunk: rewards where a step ends, or the log-probability of each next token."""
        row, first = w.row, w.start + w.n - w.outputs
        if self.facts.reward:
            rewards = torch.sigmoid(outputs[:, 0].float()).tolist()
            steps, end = set(self.facts.step_ids), len(row.tokens) - 1
            row.scores += [r for p, r in enumerate(rewards, first) if p >= row.request.score_from and (row.tokens[p] in steps or p == end)]
        else:
            follow = row.tokens[first + 1 : first + 1 + w.outputs]
            if first == 0 and row.request.score_from == 0:
                row.scores.append(0.0)
            logp = torch.log_softmax(outputs[: len(follow)].float(), -1)
            row.scores += logp.gather(-1, torch.tensor(follow, dtype=torch.long, device=logp.device)[:, None])[:, 0].tolist()
        row.read = max(row.read or 0, w.start + w.n)
        if row.read == len(row.tokens):
            row.first = row.last = time.perf_counter()
            self._finish(row, "scored")

    # --- finishing ------------------------------------------------------------------------------------------------------------------

    def _finish(self, row: Row, reason: str) -> None:
        """Take a row out, give its cache back (or pin it), and send the result once all samples of its request are there."""
        row.finish = reason
        self.decode.finish(row)
        if row.request.keep and row.entry is not None and reason != "cancelled":
            row.entry.pinned += 1
            self._kept[row.key] = (row.entry, list(row.tokens))
        self.scheduler.finish(row)
        group = self._groups[row.key]
        group.open -= 1
        if not group.open:
            del self._groups[row.key]
            first, *others = [self._result(r) for r in group.rows]
            self._news.append(Event(row.key, result=_with_others(first, others)))

    def _result(self, row: Row) -> Result:
        s, generated, end = row.request.sampling, row.tokens[row.prompt :], time.perf_counter()
        answer = generated[:-1] if generated and generated[-1] in self._ends(row) and row.finish == "stop" else generated
        words = "" if row.request.score else text.decode(self.tokenizer, answer)
        usage = Usage(
            {self.role: row.cost(), **self.decode.costs(row)}, seconds=end - row.added, ttft=(row.first or end) - row.added, peak_bytes=row.peak,
            tpot=(row.last - row.first) / (row.generated - 1) if row.generated > 1 else 0.0,
        )  # fmt: skip
        return Result(
            text.cut(words, s.stop) if s.stop else words, tuple(generated), tuple(row.logprobs) if s.logprobs is not None else None, row.finish,
            usage, tuple(row.scores) if row.request.score else None, prompt_tokens=tuple(row.tokens[: row.prompt]),
            prompt_logprobs=None if s.prompt_logprobs is None else (None, *row.prompt_logprobs), stop_reason=row.stop,
        )  # fmt: skip

    def _unpin(self, key: Key) -> None:
        kept = self._kept.pop(key, None)
        if kept is not None:
            kept[0].pinned -= 1


class _Group:
    """The samples of one request, and how many are not finished."""

    def __init__(self, rows: list[Row]) -> None:
        self.rows, self.open = rows, len(rows)


def _positions(w: Work, tree: Tree) -> list[int]:
    """Where the tokens of a row with a tree stand: nodes of one depth at the same position."""
    first = w.start + w.n
    return [*range(w.start, first), *(first + depth for depth in tree.depths)]


def _with_others(first: Result, others: list[Result]) -> Result:
    """One result that carries its siblings; the prompt is read once for all of them."""
    return replace(first, others=tuple(replace(o, prompt_logprobs=first.prompt_logprobs) for o in others)) if others else first
