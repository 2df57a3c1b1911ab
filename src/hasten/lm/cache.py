"""A ragged key/value cache: one length per row, so that rows accept different numbers of tokens and roll back by rewinding.

One buffer [layers, 2, slots, capacity, kv_heads * head_dim] holds keys and values of all rows. Rows in use fill the lowest slots, so a
batch of them is a view and never a copy; finished rows stay behind them, least recently used first to go, as sources of prefixes. The
verbs are `allocate`, `fork`, `truncate` (or `compact`), `release`; nothing outside this file knows where a row lies.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch

MARGIN = 16  # positions that running rows must be able to grow by when another one comes in
HEAD = 4  # rows are indexed by their first tokens; a shorter common prefix is cheaper to compute again than to look for


@dataclass(frozen=True)
class Shape:
    """What one position of one row needs: layers x (keys, values) x heads x head_dim numbers of dtype."""

    layers: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device

    @property
    def bytes_per_position(self) -> int:
        return 2 * self.layers * self.kv_heads * self.head_dim * self.dtype.itemsize


@dataclass(eq=False)
class Entry:
    """One row: `tokens` are the ids whose keys and values are stored; `planned` those that will be once its owner has run."""

    slot: int
    tokens: list[int] = field(default_factory=list)
    planned: list[int] = field(default_factory=list)
    active: bool = True
    pinned: int = 0
    stamp: int = 0
    head: tuple[int, ...] = ()

    @property
    def length(self) -> int:
        return len(self.tokens)


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the longest common prefix of two lists; bisection over slice equality, which runs at C speed."""
    n = min(len(a), len(b))
    if a[:n] == b[:n]:
        return n
    low, high = 0, n  # a[:low] equal, a[:high] not
    while high - low > 1:
        mid = (low + high) // 2
        if a[low:mid] == b[low:mid]:
            low = mid
        else:
            high = mid
    return low


class RaggedCache:
    """Rows of keys and values within a budget of positions (slots x capacity).

    budget: positions that may be stored in all. max_len: positions of one row at most.
    """

    def __init__(self, shape: Shape, *, budget: int, max_len: int, max_rows: int, retained: int = 32) -> None:
        self.shape = shape
        self.max_len = min(max_len, budget)
        self.budget = budget
        self.max_slots = max_rows + retained
        self.entries: list[Entry | None] = []
        self.active = 0
        self.used = 0  # slots that hold a row
        self.capacity = 0
        self.data = torch.empty(0)
        self._layers: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._clock = 0
        self._by_head: dict[tuple[int, ...], set[Entry]] = {}

    # --- the verbs -------------------------------------------------------------------------------------------------------

    def allocate(self, planned: list[int], length: int) -> Entry | None:
        """A new empty row that will hold `length` positions; None when the budget has no room for it."""
        if not self.reserve(length, extra=1):
            return None
        slot = self._free_slot()
        if slot != self.active:
            self._swap(slot, self.active)
        entry = Entry(self.active)
        self.entries[self.active] = entry
        self.used += 1
        self.active += 1
        self._own(entry, planned)
        return entry

    def fork(self, source: Entry, n: int, planned: list[int], length: int) -> Entry | None:
        """A row that starts with the first n positions of `source`: an idle source that nobody holds is taken over, another is copied."""
        idle = not source.active and not source.pinned
        if idle and self.reserve(length, extra=1, spare=source):
            self._swap(source.slot, self.active)
            source.active = True
            self.active += 1
            self.truncate(source, n)
            self._own(source, planned)
            return source
        source.pinned += 1  # so that making room does not evict it
        entry = self.allocate(planned, length)
        source.pinned -= 1
        if entry is not None and n:
            self.data[:, :, entry.slot, :n] = self.data[:, :, source.slot, :n]
            entry.tokens = source.tokens[:n]
            source.stamp = self._tick()
        return entry

    def refork(self, entry: Entry, source: Entry, planned: list[int]) -> Entry:
        """A row in use that becomes a fork of all of another's; only positions where they differ are copied. Both keep their slots."""
        n, m = common_prefix(entry.tokens, source.tokens), source.length
        if m > n:
            self.data[:, :, entry.slot, n:m] = self.data[:, :, source.slot, n:m]
        entry.tokens = source.tokens[:]
        self._own(entry, planned)
        return entry

    def truncate(self, entry: Entry, n: int) -> None:
        """Keep the first n positions; the rest is forgotten by rewinding, nothing moves."""
        del entry.tokens[n:]

    def compact(self, entry: Entry, start: int, kept: Sequence[int]) -> None:
        """Keep what lies before `start` and of what follows it the positions start + kept[i] (kept rises), closed up; the rest is forgotten."""
        still = next((i for i, k in enumerate(kept) if i != k), len(kept))  # these stand where they belong
        moving = [start + k for k in kept[still:]]
        if moving:
            to = start + still
            self.data[:, :, entry.slot, to : to + len(moving)] = self.data[:, :, entry.slot, moving]
            entry.tokens[to : to + len(moving)] = [entry.tokens[i] for i in moving]
        self.truncate(entry, start + len(kept))

    def release(self, entry: Entry, *, retain: bool = True) -> None:
        """The row is no longer in use; retained, it serves as a source of prefixes until its slot is needed."""
        if entry.active:
            self.active -= 1
            self._swap(entry.slot, self.active)
            entry.active = False
        entry.planned = entry.tokens
        entry.stamp = self._tick()
        if not entry.pinned and (not retain or len(entry.tokens) < HEAD):
            self._evict(entry)

    def forget(self) -> None:
        """Give up all retained rows that nobody holds, so that the next request finds nothing computed (for honest timing)."""
        while self._evict_oldest():
            pass

    # --- finding prefixes -------------------------------------------------------------------------------------------------------

    def sources(self, tokens: Sequence[int]) -> Iterable[Entry]:
        """Rows, in use or retained, that begin like `tokens`."""
        return self._by_head.get(tuple(tokens[:HEAD]), ())

    # --- room -------------------------------------------------------------------------------------------------------------------

    def reserve(self, length: int, *, extra: int = 0, spare: Entry | None = None) -> bool:
        """Make room for rows of `length` positions and `extra` more rows, giving up retained rows if need be; False if that is not enough."""
        if not extra and length <= self.capacity:
            return True  # the row has its slot and the slot is long enough
        if length > self.max_len:
            return False
        held = [e for e in self.entries if e is not None and (e.active or e.pinned) and e is not spare]
        capacity = self._fitting(length, len(held) + extra, held, MARGIN if extra else 0)
        if capacity is None:
            return False
        most = min(self.max_slots + len(held) - self.active, self.budget // capacity)
        for entry in self.entries[self.active :] if capacity < self.capacity else ():
            if entry is not None and entry.length > capacity and not entry.pinned and entry is not spare:
                self._evict(entry)
        while self.used + extra - (spare is not None) > most and self._evict_oldest(spare):
            pass
        used = self.used + extra - (spare is not None)
        if capacity != self.capacity or used > len(self.entries):
            pinned = len(held) > self.active  # they come on top of the rows that may run, and one by one: buffers double for them as well
            self._resize(min(self.budget // capacity if pinned else most, max(used, 2 * len(self.entries), 4)), capacity)
        return True

    def expect(self, rows: int, length: int) -> None:
        """Make the buffers once for `rows` rows of up to `length` positions, if half the budget has room for all of them.

        A hint: without it buffers double whenever a row outgrows them, and everything stored is copied each time.
        """
        rows = min(max(rows, len(self.entries)), self.max_slots)
        length = max(min(length, self.max_len), self.capacity)
        if (rows > len(self.entries) or length > self.capacity) and 2 * rows * length <= self.budget:
            self._resize(rows, length)

    def padding(self, rows: int) -> int | None:
        """A slot that belongs to nobody, with slots 0 .. rows - 1 there to be computed on, whoever lies in them; None for want of room.

        A step of fixed shape writes the keys and values of its padding there. A retained row is given up for it if need be.
        """
        free = next((slot for slot, entry in enumerate(self.entries) if entry is None), None)
        if len(self.entries) >= rows and (free is not None or self._evict_oldest()):
            return self.entries.index(None)
        slots = max(rows, len(self.entries) + 1)
        if slots * self.capacity > self.budget:
            return None
        self._resize(slots, self.capacity)
        return self.entries.index(None) if None in self.entries else None

    @property
    def nbytes(self) -> int:
        return self.data.numel() * self.data.element_size()

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of one layer, each [slots, capacity, kv_heads, head_dim]."""
        return self._layers[index]  # made once: views of every layer in every step would cost as much as a small model's attention

    def _fitting(self, length: int, rows: int, held: list[Entry], margin: int) -> int | None:
        """A capacity that holds `rows` rows, those held and one of `length`, in the budget; None if there is none.

        As long as it was if that will do; larger in powers of two while there is room; smaller when a former long row left it too large.
        A new row (margin > 0) must leave those that run room to go on for a while, or rows would push each other out in turn.
        """
        longest = max([length, *(min(e.length + margin, self.max_len) for e in held)])
        wanted = self.capacity if longest <= self.capacity else _grown(self.capacity, longest, self.max_len)
        capacity = min(wanted, self.budget // max(rows, 1))
        return capacity if capacity >= longest or (not held and capacity >= length) else None

    # --- inside -----------------------------------------------------------------------------------------------------------------

    def _tick(self) -> int:
        self._clock += 1
        return self._clock

    def _own(self, entry: Entry, planned: list[int]) -> None:
        entry.planned, entry.stamp = planned, self._tick()
        self._forget_head(entry)
        entry.head = tuple(planned[:HEAD])
        if len(entry.head) == HEAD:
            self._by_head.setdefault(entry.head, set()).add(entry)

    def _forget_head(self, entry: Entry) -> None:
        group = self._by_head.get(entry.head)
        if group is not None:
            group.discard(entry)
            if not group:
                del self._by_head[entry.head]

    def _evict(self, entry: Entry) -> None:
        self._forget_head(entry)
        self.entries[entry.slot] = None
        self.used -= 1

    def _evict_oldest(self, spare: Entry | None = None) -> bool:
        idle = [e for e in self.entries[self.active :] if e is not None and not e.pinned and e is not spare]
        if idle:
            self._evict(min(idle, key=lambda e: e.stamp))
        return bool(idle)

    def _free_slot(self) -> int:
        for slot in range(self.active, len(self.entries)):
            if self.entries[slot] is None:
                return slot
        if not self._evict_oldest():
            raise RuntimeError("no free slot after reserve: a bug of the cache")
        return self._free_slot()

    def _swap(self, i: int, j: int) -> None:
        """Exchange two slots, moving only the positions that are in use."""
        if i == j:
            return
        a, b = self.entries[i], self.entries[j]
        n, m = (a.length if a else 0), (b.length if b else 0)
        kept = self.data[:, :, i, :n].clone() if n and b else self.data[:, :, i, :n]
        if m:
            moved = self.data[:, :, j, :m].clone() if a else self.data[:, :, j, :m]
            self.data[:, :, i, :m] = moved
        if n:
            self.data[:, :, j, :n] = kept
        self.entries[i], self.entries[j] = b, a
        if a:
            a.slot = j
        if b:
            b.slot = i

    def _resize(self, slots: int, capacity: int) -> None:
        """New buffers; rows keep their order, idle ones close up behind those in use."""
        s = self.shape
        data = torch.zeros(s.layers, 2, slots, capacity, s.kv_heads * s.head_dim, dtype=s.dtype, device=s.device)
        kept = [e for e in self.entries if e is not None]
        for slot, entry in enumerate(kept):
            data[:, :, slot, : entry.length] = self.data[:, :, entry.slot, : entry.length]
            entry.slot = slot
        self.entries = [*kept, *[None] * (slots - len(kept))]
        self.data, self.capacity = data, capacity
        heads = data.view(s.layers, 2, slots, capacity, s.kv_heads, s.head_dim)
        self._layers = [(heads[i, 0], heads[i, 1]) for i in range(s.layers)]


def _grown(capacity: int, length: int, most: int) -> int:
    """The next capacity: powers of two from 64, so that buffers are rarely remade and shapes stay few."""
    size = max(64, capacity)
    while size < length:
        size *= 2
    return min(size, most)
