"""The engine of `beam`: every request is a search of `width` beams, all requests step together, each at its own length.

A beam is a row of the cache; where two beams go on from one, a row that nobody needs takes over what the first has computed (`RaggedCache.refork`
copies only the positions where they differ, so a shared prompt is copied once a row and not once a step). Candidates are ordered by score, equal
ones by beam and then by token. An answer that ended keeps its score and its place among the others; there is no normalisation by length. Scores
are the model's own log-probabilities, normalised over the whole vocabulary before anything is masked.

Under `trie` a step asks the set for the tokens that may follow (STATIC, arXiv:2602.22647), and an answer is an item. Once about as many items as
beams are left, all of them are scored to their ends in a single pass, and the steps that remain, with what they prune, are done on its outputs: the
same result as step by step, and of a large catalogue most passes are saved. Under another constraint log-probabilities are masked.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any

import torch

from hasten import cpu
from hasten.lm import beam_select, text
from hasten.lm.beam_state import Search, Tails
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

WEIGHT_BOUND = 16  # beams


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
        return max(self._few, self.options.exact_tail) if isinstance(self.constraint, Items) else self.options.width

    @property
    def _few(self) -> int:
        """Items left below all beams that are scored in one pass: of few beams some more than beams, for a pass of so few rows costs hardly more
        than reading the weights; of many beams one each, for there every position costs.
        """
        width = self.options.width
        some = min(width + width // 2, self.scheduler.max_rows)
        return max(width, some) if width <= WEIGHT_BOUND and self.options.forced else width

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
            rows = [search.rows[i] for i in search.going] if search.tails is None else search.tails.rows
            for i, row in enumerate(rows):
                start, n = row.held.length, row.pending if row.pending == 1 else min(row.pending, budget)
                if n > 0:
                    whole = start + n == len(row.tokens)
                    works.append(Work(row, start, n, search.tails.tokens[i][:-1] if search.tails else [], outputs=int(whole)))
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
        if search.tails is None:
            self._follow(search, self._chosen(search, self._logp(search, logits, search.going, range(len(logits)))), move=True)
        else:
            self._tail(search, logits)
        best = search.ended[: search.request.sampling.n]
        if all(best) or max(len(r.tokens) - r.prompt - r.limit for r in search.rows) >= 0:
            self._end(search)

    def _logp(self, search: Search, logits: torch.Tensor, beams: Sequence[int], outputs: Sequence[int]) -> torch.Tensor:
        """Log-probabilities [beams, vocabulary] from the outputs that belong to some beams; those that have ended have none, and none is read."""
        rows = logits if [*outputs] == [*range(len(logits))] else logits[list(outputs)]
        logp = torch.log_softmax(rows.to(search.beams.scores.dtype), -1)
        if len(beams) == len(search.rows):
            return logp
        out = logp.new_zeros(len(search.rows), logp.shape[1])
        out[list(beams)] = logp
        return out

    def _chosen(self, search: Search, logp: torch.Tensor) -> Step:
        """One step of the search; what cannot go on is no longer among its beams."""
        if search.trie is not None:
            width = search.trie.branch[min(int(search.beams.depths), search.trie.width - 1)]
            most = self.options.width if search.tails is None else search.tails.most
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
            search.rows = self._move(search, parents, texts, search.ended)
            self._look_ahead(search)
        else:
            search.rows = [self._row(search, old[p], t, None) for p, t in zip(parents, texts, strict=True)]

    def _over(self, search: Search, state: int, depth: int) -> bool:
        return state < 0 and (search.trie is None or depth >= search.trie.length_of(~state))

    # --- rows of the cache ------------------------------------------------------------------------------------------------------------

    def _move(self, search: Search, parents: Sequence[int], texts: Sequence[list[int]], ended: Sequence[bool]) -> list[Row]:
        """Rows that go on from parents: a parent's first child stays in its row, others get rows that are free; who has ended needs none."""
        old: list[Row] = search.rows
        heirs: dict[int, int] = {}
        for i, p in enumerate(parents):
            if not ended[i]:
                heirs.setdefault(p, i)
        sources = {p: old[p].held for p in heirs}
        free = [row.entry for p, row in enumerate(old) if p not in heirs and row.entry is not None]
        rows = []
        for i, p in enumerate(parents):
            entry = None
            if not ended[i]:
                entry = sources[p] if heirs[p] == i else self._forked(sources[p], free, texts[i], search.need)
            rows.append((p, texts[i], entry))
        for row in old:
            row.entry = None
        for k, entry in enumerate(free):
            self.cache.release(entry, retain=self.scheduler.share and not heirs and k == 0)  # a source of prefixes for later requests
        return [self._row(search, old[p], t, entry) for p, t, entry in rows]

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
        """Score what is left in one pass where few items are: of all `exact_tail` of them, or, with the results of single steps, about one a beam."""
        options, states = self.options, search.beams.states[0].tolist()
        if search.trie is None or not search.going or not (options.forced or options.exact_tail):
            return
        exact = bool(options.exact_tail) and max(states) >= 0
        most = max(options.exact_tail if exact else 0, self._few if options.forced else 0)
        permits = search.filters[0].permits if search.filters and search.filters[0] else None
        left, total = [], 0
        for state, over in zip(states, search.ended, strict=True):
            left.append([] if over else search.trie.leaves(state, most + 1 - total, permits))
            total += len(left[-1])
            if total > most:
                return
        exact = exact and total <= options.exact_tail
        if (exact or options.forced) and self._room(search, total):
            self._spread(search, left, exact)

    def _room(self, search: Search, rows: int) -> bool:
        """Whether it may have so many rows: none that another search may come to need."""
        more = rows - len(search.going)
        used = self._rows * (len(self.searches) - 1) + rows
        coming = sum(max(0, self._rows - sum(r.entry is not None for r in s.rows)) for s in self.searches if s is not search)
        return more <= 0 or (
            used <= self.scheduler.max_rows and self.cache.reserve(max(s.need for s in self.searches), extra=more + coming)
        )

    def _spread(self, search: Search, left: Sequence[list[int]], exact: bool) -> None:
        """A row for each item that is left below each beam; exact: a beam for each, too."""
        assert search.trie is not None
        parents = [p for p, leaves in enumerate(left) for _ in leaves]
        leaves = [leaf for some in left for leaf in some]
        depth = max(len(r.tokens) for r in search.rows) - search.rows[0].prompt
        rows = self._move(search, parents, [search.rows[p].tokens for p in parents], [False] * len(parents))
        ends = [0, *accumulate(map(len, left))]
        owned = [[*range(a, b)] for a, b in pairwise(ends)]
        if exact:
            whole = [p for p, over in enumerate(search.ended) if over]
            order = sorted([(p, -1) for p in whole] + list(zip(parents, range(len(leaves)), strict=True)))
            at = [int(search.beams.states[0, p]) if i < 0 else leaves[i] for p, i in order]
            like, old = search.beams, search.rows
            from_ = [p for p, _ in order]
            search.beams = Beams(torch.tensor([at], dtype=torch.int32, device=like.states.device), like.depths, like.scores[:, from_])
            search.rows, search.ended = [old[p] for p in from_], [i < 0 for _, i in order]
            owned = [[] if i < 0 else [i] for _, i in order]
        tokens = [[*search.trie.tuple_of(~leaf)[depth:]] for leaf in leaves]
        search.tails = Tails(rows, tokens, owned, len(owned) if exact else self.options.width)

    def _tail(self, search: Search, logits: torch.Tensor) -> None:
        """The rest of the search, step by step over the outputs of the one pass: its pruning, and the order of equal scores, are the same."""
        assert search.tails is not None
        tails, owned = search.tails, search.tails.owned
        first = [0, *accumulate(map(len, tails.tokens))]
        steps = max(map(len, tails.tokens))
        for j in range(steps):
            beams = [i for i, over in enumerate(search.ended) if not over]
            chosen = self._chosen(search, self._logp(search, logits, beams, [first[owned[i][0]] + j for i in beams]))
            picks = zip(chosen.parents[0].tolist(), chosen.tokens[0].tolist(), strict=True)
            owned = [owned[p] if t < 0 else [i for i in owned[p] if tails.tokens[i][j] == t] for p, t in picks]
            self._follow(search, chosen, move=False)
        search.saved += steps - 1

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
