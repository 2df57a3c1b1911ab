"""Speculative decoding with a draft model (Leviathan et al. 2023, arXiv:2211.17192; Chen et al. 2023, arXiv:2302.01318), batched over rows.

A smaller model continues every row by some tokens, one pass of all rows for each, and the target checks them in one pass. The draft has a
ragged cache of its own, filled when a row first asks for a proposal; what the target did not keep is rewound, and what it added is fed with
the next proposal. With `coupled` verification draft and target choose with the same noise, so the output is the target's own, whatever the
draft is; `rejection` and `block` keep more of it and leave the law of the output unchanged (see `verify`).

The draft may have another tokenizer: its context is then the text so far in its own tokens, and it proposes tokens that both vocabularies
spell alike (Timor et al. 2025, arXiv:2502.05202).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch

from hasten import hf, rng
from hasten.flops import model_cost
from hasten.lm import sampler
from hasten.lm.attention import Plan, Span
from hasten.lm.cache import Entry, RaggedCache, Shape, common_prefix
from hasten.lm.decode import verify
from hasten.lm.decode.control import Speculation, check
from hasten.lm.decode.verify import Uniform
from hasten.lm.tree import ROOT, Growing, Proposal, Tree
from hasten.usage import Cost
from hasten.values import UserError, did_you_mean

if TYPE_CHECKING:
    from hasten.lm.scheduler import Row

MODES = ("coupled", "rejection", "block")
CHUNK = 512  # positions in one pass of the draft


class Settings(Protocol):
    """The options that every way to draft with a model has; what they mean is said in `Options`."""

    @property
    def k(self) -> int: ...
    @property
    def mode(self) -> str: ...
    @property
    def schedule(self) -> str: ...
    @property
    def confidence(self) -> float: ...
    @property
    def ensemble_weight(self) -> float: ...
    @property
    def branches(self) -> int: ...


def check_settings(name: str, options: Settings) -> None:
    """UserError for options that do not go together."""
    if options.mode not in MODES:
        raise UserError(f"{name}: mode={options.mode!r}: no such mode{did_you_mean(options.mode, MODES)}")
    check(name, options.k, chosen_schedule(options), options.branches)
    if options.branches > 1 and (options.mode == "block" or options.ensemble_weight < 1):
        raise UserError(f"{name}: branches go with mode=coupled or mode=rejection, and with ensemble_weight=1")
    if options.mode != "coupled" and options.schedule == "goodput":
        raise UserError(f"{name}: mode={options.mode} needs schedule=constant or heuristic, or its answers would depend on a clock")
    if not 0 <= options.confidence < 1 or not 0 < options.ensemble_weight <= 1:
        raise UserError(f"{name}: needs 0 <= confidence < 1 and 0 < ensemble_weight <= 1")
    if options.ensemble_weight < 1 and options.mode != "rejection":
        raise UserError(f"{name}: ensemble_weight goes with mode=rejection only")


def chosen_schedule(options: Settings) -> str:
    """What "auto" stands for: goodput with coupled verification, else constant."""
    return options.schedule if options.schedule != "auto" else "goodput" if options.mode == "coupled" else "constant"


@dataclass(frozen=True)
class Options:
    """model: the draft, a directory, hub id or zoo:NAME. k: tokens proposed at most. mode: coupled, rejection or block (see `verify`).

    schedule: how many of k are proposed: goodput (as many as pay, none included; default with coupled), constant (default otherwise, where the
    answer depends on what is proposed and must not depend on a clock) or heuristic. confidence: stop drafting where the draft's likeliest token
    is less likely than this. ensemble_weight: below 1 more is accepted than is exact (rejection only; approximate). branches: tokens tried at
    each position, the draft going on after the first of them; k counts them all (not with block).
    """

    model: str = ""
    k: int = 8
    mode: str = "coupled"
    schedule: str = "auto"
    confidence: float = 0.0
    ensemble_weight: float = 1.0
    branches: int = 1

    def __post_init__(self) -> None:
        check_settings("draft", self)


def exactness(options: Settings) -> str:
    """Coupled verification gives the same tokens, the others the same law, and a weight below 1 neither."""
    return "approximate" if options.ensemble_weight < 1 else "identical" if options.mode == "coupled" else "distribution"


def roles(options: Options) -> dict[str, str]:
    """Models needed beside the target. UserError if the options name none."""
    if not options.model:
        raise UserError("draft needs a draft model: draft(model=MODEL)")
    return {"draft": options.model}


@dataclass
class State:
    """What the draft knows of a row: its place in the cache, the laws that the last proposal was drawn from, its ledger."""

    entry: Entry | None = None
    laws: list[torch.Tensor] = field(default_factory=list)
    first: list[int] = field(default_factory=list)  # of a tree, the tokens that the draft went on after
    prompt: int = 0
    reused: int = 0
    generated: int = 0
    forwards: int = 0
    flops: float = 0.0
    bytes: float = 0.0


@dataclass
class Job:
    """One row of a proposal in the making: tokens still to feed, tokens drafted (in the target's ids), states of the constraint."""

    row: Row
    state: State
    most: int
    pending: list[int]
    drafted: list[int] = field(default_factory=list)
    beside: list[list[int]] = field(default_factory=list)  # at each position, others that are tried as well
    constraint: Any = None

    @property
    def entry(self) -> Entry:
        assert self.state.entry is not None
        return self.state.entry


class Draft(Speculation):
    """Proposals of a smaller model."""

    drafting = True
    role = "draft"

    def __init__(self, options: Settings, model: Any, vocabulary: Vocabulary) -> None:
        super().__init__(options.k, chosen_schedule(options), options.branches)
        self.options, self.model, self.words = options, model, vocabulary
        self.ledger = model_cost(model)
        self.passes = 0

    def bind(self, engine: Any) -> None:
        super().bind(engine)
        facts, parameter = hf.facts(self.model), next(self.model.parameters())
        shape = Shape(facts.layers, facts.kv_heads, facts.head_dim, parameter.dtype, parameter.device)
        rows = engine.scheduler.max_rows
        budget = max(1, hf.spare_memory(parameter.device) // 8 // shape.bytes_per_position)
        self.engine = engine
        self.cache = RaggedCache(shape, budget=budget, max_len=facts.max_len, max_rows=rows, retained=min(rows, 32))

    # --- proposing ------------------------------------------------------------------------------------------------------------------

    def draft(self, rows: Sequence[Row], lengths: Sequence[int]) -> list[Proposal]:
        wide = self.branches if self.branching else 1
        asked = {id(row): k for row, k in zip(rows, lengths, strict=True)}
        jobs = [job for row, k in zip(rows, lengths, strict=True) if k > 0 and (job := self._job(row, -(-k // wide))) is not None]
        going = jobs
        while going:
            ready, logits = self._pass(going)
            self._choose(ready, logits)
            going = [job for job in going if job.pending]
        found = {id(job.row): self._proposal(job, asked[id(job.row)]) for job in jobs}
        return [found.get(id(row), []) for row in rows]

    def _proposal(self, job: Job, k: int) -> Proposal:
        """What was drafted: a chain, or one with leaves beside it, position by position, k tokens in all."""
        if not any(job.beside):
            return job.drafted
        grown, parent = Growing(), ROOT
        for token, others in zip(job.drafted, job.beside, strict=True):
            nodes = [grown.add(parent, t) for t in (token, *others)]
            parent = nodes[0]
        job.state.first = job.drafted
        return grown.tree().head(k)

    def _job(self, row: Row, k: int) -> Job | None:
        """A row with its cache rewound to what is still right; None where the draft has no room for it."""
        state = row.decode_state = row.decode_state or State()
        state.laws = []
        tokens = self.words.context(row.tokens)
        if not tokens or not self._placed(state, tokens, len(tokens) + k):
            return None
        entry = state.entry
        assert entry is not None
        self.cache.truncate(entry, min(common_prefix(entry.tokens, tokens), len(tokens) - 1))
        return Job(row, state, k, tokens[entry.length :], constraint=row.constraint_state)

    def _placed(self, state: State, tokens: list[int], need: int) -> bool:
        """Room for `need` positions of a row; a new row starts from the longest prefix there is."""
        if need > self.cache.max_len:
            return False
        if state.entry is not None:
            return self.cache.reserve(need)
        most = len(tokens) - 1
        source = max(self.cache.sources(tokens), key=lambda e: common_prefix(e.tokens, tokens), default=None)
        have = min(common_prefix(source.tokens, tokens), most) if source else 0
        planned = list(tokens)
        state.entry = self.cache.fork(source, have, planned, need) if source else self.cache.allocate(planned, need)
        state.prompt, state.reused = len(tokens), have if state.entry else 0
        return state.entry is not None

    def _pass(self, jobs: Sequence[Job]) -> tuple[list[Job], torch.Tensor]:
        """One pass over tokens that wait, `CHUNK` at most: (the rows that have none left, logits after their last)."""
        ids: list[int] = []
        positions: list[int] = []
        outputs: list[int] = []
        spans: list[Span] = []
        ready: list[Job] = []
        took: list[tuple[Job, int, int]] = []
        for job in jobs:
            n, entry = min(len(job.pending), CHUNK - len(ids)), job.entry
            if n <= 0:
                continue
            spans.append(Span(entry.slot, entry.length, n, len(ids)))
            positions += range(entry.length, entry.length + n)
            took.append((job, entry.length, n))
            ids += job.pending[:n]
            entry.tokens += job.pending[:n]
            job.pending = job.pending[n:]
            if not job.pending:
                ready.append(job)
                outputs.append(len(ids) - 1)
        device = self.cache.shape.device
        where = None if len(outputs) == len(ids) else torch.tensor(outputs, dtype=torch.long, device=device)
        tensors = (torch.tensor(ids, device=device), torch.tensor(positions, device=device))
        logits = hf.forward(self.model, *tensors, where, Plan(self.cache, spans))
        self._book(took)
        return ready, logits

    def _book(self, took: Sequence[tuple[Job, int, int]]) -> None:
        self.passes += 1
        for job, start, n in took:
            state = job.state
            state.forwards += 1
            state.flops += self.ledger.flops(n, start, int(not job.pending))
            state.bytes += self.ledger.bytes(start + n, 1 / len(took))

    def _choose(self, ready: list[Job], logits: torch.Tensor) -> None:
        """The next token of each row that is ready; those that want more get it fed."""
        if not ready:
            return
        raw = self.words.aligned(logits)
        allowed = self._mask(ready, raw)
        choices = [self.engine.choice(job.row, job.drafted) for job in ready]
        if self.options.mode == "coupled" and not self.options.confidence:
            self._take(ready, self._coupled(raw, choices, allowed))
            return
        processed = sampler.processed(raw, choices, allowed)
        laws = sampler.laws(processed, [c.sampling for c in choices])
        sure = [i for i, p in enumerate(laws.amax(-1).tolist()) if p >= self.options.confidence]
        if self.options.mode == "coupled":
            tokens = self._coupled(raw, choices, allowed)
        else:
            tokens = [self._drawn(job, law) for job, law in zip(ready, laws, strict=True)]
            for i in sure:
                ready[i].state.laws.append(laws[i])
        self._take([ready[i] for i in sure], [tokens[i] for i in sure])

    def _coupled(self, raw: torch.Tensor, choices: Sequence[sampler.Choice], allowed: torch.Tensor | None) -> list[list[int]]:
        """Each position's tokens by the target's noise: the first alone, or the first few where the proposal may branch."""
        if self.branching:
            return sampler.ranked(raw, choices, self.branches, allowed)
        return [[token] for token in sampler.choose(raw, choices, allowed).tokens]

    def _drawn(self, job: Job, law: torch.Tensor) -> list[int]:
        """A position's tokens from the draft's law, without replacement."""
        uniform, i, wide = self._uniform(job.row), len(job.drafted), self.branches if self.branching else 1
        return verify.several(law, wide, lambda j: uniform(verify.DRAFT, i if wide == 1 else wide * i + j))

    def _take(self, jobs: Sequence[Job], tokens: Sequence[list[int]]) -> None:
        for job, (token, *others) in zip(jobs, tokens, strict=True):
            job.beside.append(others)
            job.drafted.append(token)
            job.state.generated += 1
            if self.engine.constraint is not None:
                job.constraint = self.engine.constraint.advance(job.constraint, token)
            if len(job.drafted) < job.most:
                job.pending = [self.words.own(token)]

    def _mask(self, jobs: Sequence[Job], logits: torch.Tensor) -> torch.Tensor | None:
        constraint = self.engine.constraint
        return None if constraint is None else constraint.mask([job.constraint for job in jobs], logits.shape[-1], logits.device)

    # --- verifying ------------------------------------------------------------------------------------------------------------------

    def verify(self, row: Row, proposal: Proposal, chosen: Sequence[int], logits: torch.Tensor) -> list[int]:
        if self.options.mode == "coupled":
            return verify.coupled(proposal, chosen)
        q = sampler.laws(logits, [row.request.sampling] * len(logits))
        if not proposal:
            return [verify.drawn(q[0], self._uniform(row)(verify.AFTER, 0))]
        if isinstance(proposal, Tree):
            nodes = [ROOT, *proposal.follow(row.decode_state.first)]
            return verify.rounds(proposal, dict(zip(nodes, row.decode_state.laws, strict=False)), q, self._uniform(row))
        p = torch.stack(row.decode_state.laws[: len(proposal)]).to(q.device)
        if self.options.mode == "block":
            return verify.block(proposal, p, q, self._uniform(row))
        return verify.rejection(proposal, p, q, self._uniform(row), self.options.ensemble_weight)

    def _uniform(self, row: Row) -> Uniform:
        """The numbers of the round that starts where the row ends now."""
        seed, sample, start = row.request.sampling.seed, row.sample, len(row.tokens)
        return lambda purpose, i: rng.uniform(seed, sample, start, purpose, i)

    def finish(self, row: Row) -> None:
        state = row.decode_state
        if state is not None and state.entry is not None:
            self.cache.release(state.entry)
            state.entry = None

    def costs(self, row: Row) -> Mapping[str, Cost]:
        s = row.decode_state or State()
        return {self.role: Cost(s.prompt, s.reused, s.generated, 0, s.forwards, s.flops, s.bytes)}


class Vocabulary:
    """How the draft's ids and the target's belong together: the same ids, cut or padded to the target's number of them."""

    def __init__(self, size: int) -> None:
        self.size = size

    def context(self, tokens: list[int]) -> list[int]:
        """The target's ids so far as the draft's."""
        return tokens

    def own(self, token: int) -> int:
        """A proposed token (the target's id) as the draft's."""
        return token

    def aligned(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits over the draft's ids [N, ..] -> over the target's [N, size]; minus infinity where the draft has no such token."""
        n = logits.shape[-1]
        return logits[:, : self.size] if n >= self.size else torch.nn.functional.pad(logits, (0, self.size - n), value=float("-inf"))


class Translated(Vocabulary):
    """Two tokenizers: tokens that are spelt alike are one token, others the draft cannot propose; contexts pass as text."""

    def __init__(self, size: int, target: Any, draft: Any) -> None:
        super().__init__(size)
        self.target, self.draft = target, draft
        ids = {spelling(draft, word): i for word, i in draft.get_vocab().items()}
        pairs = [(i, ids[s]) for word, i in target.get_vocab().items() if i < size and (s := spelling(target, word)) in ids]
        if len(pairs) < 2:
            raise UserError("draft: its tokenizer shares no tokens with the target's")
        self.to_own = dict(pairs)
        self.theirs, self.mine = (torch.tensor(side) for side in zip(*pairs, strict=True))

    def context(self, tokens: list[int]) -> list[int]:
        return list(self.draft(self.target.decode(tokens, skip_special_tokens=True))["input_ids"])

    def own(self, token: int) -> int:
        return self.to_own[token]

    def aligned(self, logits: torch.Tensor) -> torch.Tensor:
        out = logits.new_full((len(logits), self.size), float("-inf"))
        return out.index_copy_(1, self.theirs.to(logits.device), logits[:, self.mine.to(logits.device)])


def spelling(tokenizer: Any, word: str) -> str:
    """A vocabulary entry as the text it stands for, whichever mark a tokenizer has for a space."""
    return word.replace("\u2581", " ").replace("\u0120", " ").replace("\u010a", "\n")


def vocabulary(target: Any) -> Vocabulary:
    """How the recipe's draft and target belong together. UserError where they cannot."""
    mine, theirs = target.tokenizer, target.tokenizers.get("draft")
    if mine is None or theirs is None or mine.get_vocab() == theirs.get_vocab():
        return Vocabulary(target.vocabulary)
    return Translated(target.vocabulary, mine, theirs)


def build(options: Options, target: Any) -> Draft:
    return Draft(options, quick(target.models["draft"]), vocabulary(target))


def quick(model: Any) -> Any:
    """The draft with native steps where it takes them: a draft may differ by rounding from itself, its proposals are checked."""
    from hasten.lm.fused import Unfit, attach
    from hasten.native import build as native

    try:
        return attach(model) if native.why_not() is None else model
    except Unfit:
        return model
