"""The engine of `beam`: every request is a search of `width` beams, all requests step together, each at its own length.

A beam is a row of the cache; where two beams go on from one, a row that nobody needs takes over what the first has computed (`RaggedCache.refork`
copies only the positions where they differ, so a shared prompt is copied once a row and not once a step). Candidates are ordered by score, equal
ones by beam and then by token. An answer that ended keeps its score and its place among the others; there is no normalisation by length. Scores
are the model's own log-probabilities, normalised over the whole vocabulary before anything is masked.

Under `trie` a step asks the set for the tokens that may follow (STATIC, arXiv:2602.22647), and an answer is an item. Once each beam has one item
left, the rest of all of them is scored in a single pass, with the same result as step by step. Under another constraint log-probabilities are
masked.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from hasten import cpu
from hasten.lm import beam_select, text
from hasten.lm.cache import Entry, common_prefix
from hasten.lm.constrain.items import Items
from hasten.lm.constrain.trie import DEAD, Trie
from hasten.lm.constrain.trie_filter import Filter
from hasten.lm.constrain.trie_step import Beams, Step, begin, step
from hasten.lm.decode.beam import Beam
from hasten.lm.engine import DEFAULT_TOKENS, TokenEngine
from hasten.lm.scheduler import Row, Work
from hasten.usage import Cost, Usage
from hasten.values import Event, Key, Request, Result, Sampling, UserError

TAKEN = ("max_tokens", "stop_token_ids", "ignore_eos", "seed", "n")  # fields of a request's sampling that mean something here


@dataclass(eq=False)
class Search:
    """One request. rows: its beams, best first (one while the prompt is computed). ended: which of them have their whole answer.

    states: of a constraint that is no item set. pool: every row that it ever had, for the ledger.
    """

    key: Key
    request: Request
    rows: list[Row]
    beams: Beams
    ended: list[bool]
    states: list[Any]
    trie: Trie | None
    filters: list[Filter | None] | None
    pool: list[Row] = field(default_factory=list)
    passes: int = 0
    saved: int = 0
    tails: list[list[int]] | None = None  # what is left of each beam, once it is forced

    @property
    def need(self) -> int:
        """Positions of its longest row."""
        return self.rows[0].prompt + self.rows[0].limit

    @property
    def going(self) -> list[int]:
        """Beams that take part in the next pass."""
        return [i for i, over in enumerate(self.ended) if not over]


class BeamEngine(TokenEngine):
    """A token engine that answers by beam search. Results: the best `sampling.n` answers; the `trace` of each has its "logprob", the joint
    log-probability of its tokens, and under `trie` the numbers of its "items". Score requests are served as ever; what else a request asks for and
    has no meaning here is refused by name.
    """

    decode: Beam

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.options = self.decode.options
        self.pending: list[Search] = []
        self.searches: list[Search] = []

    @property
    def idle(self) -> bool:
        return super().idle and not (self.pending or self.searches)

    # --- requests -----------------------------------------------------------------------------------------------------------------

    def add(self, key: Key, request: Request, keep: Filter | None = None) -> None:
        """Queue a request; UserError names what cannot be served. keep: under `trie`, which items it may find (see `trie_filter.filtered`)."""
        if any(s.key == key for s in (*self.pending, *self.searches)):
            raise ValueError(f"key {key!r} is in use")
        if request.score:
            super().add(key, request)
            return
        trie, tokens = self.constraint.trie if isinstance(self.constraint, Items) else None, self._tokens(request)
        request = self._served(request, tokens, trie)
        if keep is not None and (trie is None or not keep.fits(trie)):
            raise UserError("beam: a filter goes with the version of the item set that it was made for")
        row = Row(key, request, 0, list(tokens), len(tokens), time.perf_counter())
        dtype = torch.float64 if self.cache.shape.dtype == torch.float64 else torch.float32
        beams = beam_select.begin(dtype, self.cache.shape.device) if trie is None else begin([trie], dtype)
        state = self.constraint.start(tokens) if self.constraint is not None else None
        self.pending.append(Search(key, request, [row], beams, [False], [state], trie, None if keep is None else [keep], [row]))

    def _served(self, request: Request, tokens: Sequence[int], trie: Trie | None) -> Request:
        """The request with its length; UserError where it cannot be served."""
        s = request.sampling
        default = trie.width if trie is not None else max(0, min(DEFAULT_TOKENS, self.cache.max_len - len(tokens)))
        request = replace(request, sampling=replace(s, max_tokens=default if s.max_tokens is None else s.max_tokens))
        self.limits.check(request, tokens)
        if self.constraint is not None:
            self.constraint.check(request)
        plain = Sampling()
        for name in (n for n in Sampling.__slots__ if n not in TAKEN and getattr(s, n) != getattr(plain, n)):
            raise UserError(f"beam: {name}={getattr(s, name)!r} means nothing to a beam search; leave it out")
        if s.n > self.options.width:
            raise UserError(f"beam: n={s.n} answers of {self.options.width} beams; give beam(width={s.n})")
        if request.keep or request.parent is not None or request.release:
            raise UserError("beam: a search cannot be kept or continued")
        most = request.sampling.max_tokens or 0
        if most < (trie.width if trie is not None else 1):
            longest = f", and the longest item has {trie.width}" if trie is not None else ""
            raise UserError(f"beam: max_tokens={most} is too few{longest}")
        if self._rows > self.scheduler.max_rows or self._rows * (len(tokens) + most) > self.cache.budget:
            room = f"{self.scheduler.max_rows} rows and {self.cache.budget} positions"
            raise UserError(f"beam: {self._rows} rows of {len(tokens) + most} positions do not fit the engine's {room}")
        return request

    @property
    def _rows(self) -> int:
        """Rows that a search may need at once."""
        return max(self.options.width, self.options.exact_tail if isinstance(self.constraint, Items) else 0)

    def cancel(self, key: Key) -> None:
        super().cancel(key)
        for search in [s for s in (*self.pending, *self.searches) if s.key == key]:
            self._end(search, "cancelled")

    # --- one step -------------------------------------------------------------------------------------------------------------------

    def step(self) -> list[Event]:
        """One forward pass over the beams of all searches (and one over score requests, if there are any)."""
        news = super().step() if self._groups or self._news else []
        with cpu.using(self.threads):
            works = self._plan()
            if works:
                logits = self._forward([w for _, some in works for w in some])
                at = 0
                for search, some in works:
                    n = sum(w.outputs + len(w.proposal) for w in some)
                    self._advance(search, logits[at : at + n])
                    at += n
        news += self._news
        self._news = []
        return news

    def _plan(self) -> list[tuple[Search, list[Work]]]:
        """Beams first, all of them; what is left of the step's budget goes to prompts in order of arrival."""
        self._admit()
        out, budget = [], self.scheduler.step_tokens
        for search in sorted(self.searches, key=lambda s: s.rows[0].pending > 1):
            works = []
            for i in search.going:
                row = search.rows[i]
                start, n = row.held.length, row.pending if row.pending == 1 else min(row.pending, budget)
                if n > 0:
                    whole = start + n == len(row.tokens)
                    works.append(Work(row, start, n, search.tails[i][:-1] if search.tails else [], outputs=int(whole)))
                    budget -= n
            if works:
                search.passes += 1
                out.append((search, works))
        return out

    def _admit(self) -> None:
        """In order of arrival, while the cache has room for all rows that every search may come to need."""
        while self.pending:
            search = self.pending[0]
            coming = sum(self._rows - sum(r.entry is not None for r in s.rows) for s in self.searches)
            longest = max(s.need for s in (search, *self.searches))
            full = len(self.searches) * self._rows + self._rows > self.scheduler.max_rows
            if full or not self.cache.reserve(longest, extra=self._rows + coming):
                if not self.searches and not self.scheduler.running:
                    raise RuntimeError("a single search does not fit the cache: a bug, such requests are refused when they are added")
                return
            self.searches.append(self.pending.pop(0))
            row = search.rows[0]
            known = [(common_prefix(e.tokens, row.tokens[:-1]), e) for e in self.cache.sources(row.tokens)] if self.scheduler.share else []
            have, source = max(known, key=lambda k: k[0], default=(0, None))
            entry = self.cache.fork(source, have, row.tokens, search.need) if source else self.cache.allocate(row.tokens, search.need)
            assert entry is not None, "room for it was made"
            row.entry, row.reused = entry, have

    def _advance(self, search: Search, logits: torch.Tensor) -> None:
        """Choose the next beams from the outputs of the present ones; outputs of a forced tail stand one behind the other, beam after beam."""
        if not len(logits):
            return  # a part of a prompt
        search.rows[0].first = search.rows[0].first or time.perf_counter()
        logp = torch.log_softmax(logits.to(search.beams.scores.dtype), -1)
        if search.tails is None:
            self._follow(search, self._chosen(search, self._full(search, logp, search.going, range(len(logp)))), move=True)
        else:
            self._tail(search, logp)
        best = search.ended[: search.request.sampling.n]
        if all(best) or max(len(r.tokens) - r.prompt - r.limit for r in search.rows) >= 0:
            self._end(search)

    def _full(self, search: Search, logp: torch.Tensor, beams: Sequence[int], outputs: Sequence[int]) -> torch.Tensor:
        """[beams, vocabulary] of the outputs that belong to some beams; those that have ended have no output, and none is read."""
        if len(beams) == len(search.rows) == len(logp) and [*beams] == [*outputs] == [*range(len(logp))]:
            return logp
        out = logp.new_zeros(len(search.rows), logp.shape[1])
        out[list(beams)] = logp[list(outputs)]
        return out

    def _chosen(self, search: Search, logp: torch.Tensor) -> Step:
        """One step of the search; what cannot go on is no longer among its beams."""
        if search.trie is not None:
            width = search.trie.branch[min(int(search.beams.depths), search.trie.width - 1)]
            most = max(self.options.width, len(search.rows) if search.tails else 0)  # of a tail nothing is pruned but what dies
            chosen = step(search.trie.arrays, logp, search.beams, most, width, search.filters)
        else:
            if self.constraint is not None:
                logp = logp.masked_fill(~self.constraint.mask(search.states, logp.shape[1], logp.device), float("-inf"))
            s = search.request.sampling
            chosen = beam_select.step(
                logp, search.beams, self.options.width, s.stop_token_ids + (() if s.ignore_eos else self.facts.end_ids)
            )
        live = int((chosen.beams.states[0] != DEAD).sum())  # the dead ones are last
        b = chosen.beams
        return Step(chosen.parents[:, :live], chosen.tokens[:, :live], Beams(b.states[:, :live], b.depths, b.scores[:, :live]))

    def _follow(self, search: Search, chosen: Step, move: bool) -> None:
        """Make the chosen beams those of the search; move: their rows of the cache too."""
        old, search.beams = search.rows, chosen.beams
        parents, tokens, states = chosen.parents[0].tolist(), chosen.tokens[0].tolist(), chosen.beams.states[0].tolist()
        texts = [old[p].tokens if t < 0 else [*old[p].tokens, t] for p, t in zip(parents, tokens, strict=True)]
        search.ended = [self._over(search, state, len(t) - old[0].prompt) for state, t in zip(states, texts, strict=True)]
        if self.constraint is not None and search.trie is None:
            some = [search.states[p] for p in parents]
            search.states = [s if t < 0 else self.constraint.advance(s, t) for s, t in zip(some, tokens, strict=True)]
        if move:
            self._move(search, parents, texts)
            self._look_ahead(search)
        else:
            search.rows = [self._row(search, old[p], t, None) for p, t in zip(parents, texts, strict=True)]

    def _over(self, search: Search, state: int, depth: int) -> bool:
        return state < 0 and (search.trie is None or depth >= search.trie.length_of(~state))

    # --- rows of the cache ------------------------------------------------------------------------------------------------------------

    def _move(self, search: Search, parents: Sequence[int], texts: Sequence[list[int]]) -> None:
        """Rows for the new beams: a parent's first child stays in its row, the others get rows that are free; who has ended needs none."""
        old: list[Row] = search.rows
        heirs: dict[int, int] = {}
        for i, p in enumerate(parents):
            if not search.ended[i]:
                heirs.setdefault(p, i)
        sources = {p: old[p].held for p in heirs}
        free = [row.entry for p, row in enumerate(old) if p not in heirs and row.entry is not None]
        rows = []
        for i, p in enumerate(parents):
            entry = None
            if not search.ended[i]:
                entry = sources[p] if heirs[p] == i else self._forked(sources[p], free, texts[i], search.need)
            rows.append((p, texts[i], entry))
        for row in old:
            row.entry = None
        for k, entry in enumerate(free):
            self.cache.release(entry, retain=self.scheduler.share and not heirs and k == 0)  # a source of prefixes for later requests
        search.rows = [self._row(search, old[p], t, entry) for p, t, entry in rows]

    def _forked(self, source: Entry, free: list[Entry], tokens: list[int], need: int) -> Entry:
        if free:
            return self.cache.refork(free.pop(), source, tokens)
        entry = self.cache.fork(source, source.length, tokens, need)
        assert entry is not None, "room for it was made when the search was admitted"
        return entry

    def _row(self, search: Search, parent: Row, tokens: list[int], entry: Entry | None) -> Row:
        row = Row(search.key, search.request, 0, tokens, parent.prompt, parent.added, entry=entry, reused=parent.reused, first=parent.first)
        search.pool.append(row)
        return row

    # --- under a set of items -----------------------------------------------------------------------------------------------------------

    def _look_ahead(self, search: Search) -> None:
        """See whether what is left can be scored in one pass: one item a beam, or few enough items in all."""
        trie = search.trie
        if trie is None or not search.going:
            return
        states = search.beams.states[0].tolist()
        depth = max(len(r.tokens) for r in search.rows) - search.rows[0].prompt
        spread = bool(self.options.exact_tail) and max(states) >= 0 and self._spread(search, states)
        states = search.beams.states[0].tolist()
        if (self.options.forced or spread) and max(states) < 0:
            items = [() if over else trie.tuple_of(~state) for state, over in zip(states, search.ended, strict=True)]
            search.tails = [[*item[depth:]] for item in items]

    def _spread(self, search: Search, states: Sequence[int]) -> bool:
        """Make each item below the beams a beam, where there are `exact_tail` at most."""
        assert search.trie is not None
        permits = search.filters[0].permits if search.filters and search.filters[0] else None
        leaves = [(p, leaf) for p, state in enumerate(states) for leaf in search.trie.leaves(state, self.options.exact_tail + 1, permits)]
        if len(leaves) > self.options.exact_tail:
            return False
        parents = [p for p, _ in leaves]
        at = torch.tensor([leaf for _, leaf in leaves], dtype=torch.int32, device=search.beams.states.device)
        search.beams = Beams(at[None], search.beams.depths, search.beams.scores[:, parents])
        search.ended = [search.ended[p] for p in parents]
        self._move(search, parents, [search.rows[p].tokens for p in parents])
        return True

    def _tail(self, search: Search, logp: torch.Tensor) -> None:
        """Score what is forced, step by step as without it: the order of equal scores and what dies on the way are the same."""
        assert search.tails is not None
        tails, steps = search.tails, max(map(len, search.tails))
        first, at = [], 0
        for tail in tails:
            first.append(at)
            at += len(tail)
        who = list(range(len(tails)))
        for j in range(steps):
            beams = [i for i, w in enumerate(who) if j < len(tails[w])]
            chosen = self._chosen(search, self._full(search, logp, beams, [first[who[i]] + j for i in beams]))
            who = [who[p] for p in chosen.parents[0].tolist()]
            self._follow(search, chosen, move=False)
        search.saved += steps - 1
        search.ended = [True] * len(search.rows)

    # --- finishing ------------------------------------------------------------------------------------------------------------------------

    def _end(self, search: Search, reason: str = "") -> None:
        """Give its rows back and send its answers."""
        for k, row in enumerate([r for r in search.pool if r.entry is not None]):
            self.cache.release(row.held, retain=self.scheduler.share and k == 0)
            row.entry = None
        (self.searches if search in self.searches else self.pending).remove(search)
        rows = range(min(search.request.sampling.n, len(search.rows)))
        results = [self._answer(search, i, reason) for i in rows] or [
            Result(finish_reason=reason or "stop", usage=self._usage(search, 0, []))
        ]
        news = Event(search.key, results[0].tokens, replace(results[0], others=tuple(results[1:])))
        self._news.append(news)

    def _answer(self, search: Search, i: int, reason: str) -> Result:
        row, s = search.rows[i], search.request.sampling
        generated = row.tokens[row.prompt :]
        ends = s.stop_token_ids + self.facts.end_ids
        answer = generated[:-1] if generated and generated[-1] in ends and search.ended[i] else generated
        trace: dict[str, Any] = {"logprob": float(search.beams.scores[0, i])} if not reason else {}
        if search.trie is not None and search.ended[i] and not reason:
            trace["items"] = list(search.trie.items(~int(search.beams.states[0, i])))
        return Result(
            text.decode(self.tokenizer, answer), tuple(generated), None, reason or ("stop" if search.ended[i] else "length"),
            self._usage(search, i, generated), trace=trace, prompt_tokens=tuple(row.tokens[: row.prompt]),
        )  # fmt: skip

    def _usage(self, search: Search, i: int, generated: Sequence[int]) -> Usage:
        """The first answer carries what the whole search cost; the others add only their tokens."""
        now, first = time.perf_counter(), search.pool[0]
        if i:
            return Usage({self.role: Cost(generated=len(generated))})
        cost = Cost(
            prompt=first.prompt, reused=first.reused, generated=len(generated), forwards=search.passes, flops=sum(r.flops for r in search.pool),
            bytes=sum(r.bytes for r in search.pool), proposed=sum(r.proposed for r in search.pool), saved=search.saved,
        )  # fmt: skip
        began = first.first or now
        per_token = (now - began) / (len(generated) - 1) if len(generated) > 1 else 0.0
        return Usage(
            {self.role: cost},
            seconds=now - first.added,
            ttft=began - first.added,
            tpot=per_token,
            peak_bytes=max(r.peak for r in search.pool),
        )
