"""A cut prompt and the tokens behind it in one piece, as the host's own attention reads them.

Heads that keep the same number of tokens lie densely, and nearly so do those whose numbers are
close or small: the shorter ones are filled up in front, with places that nobody sees. A step then
adds a token in its place, and is one call of the host's function, as over a cache that was never
cut.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vlmprune.hosts import masks
from vlmprune.runtime.attention.ragged_tokens import Ragged
from vlmprune.runtime.cache.tail_layer import room_for

# What is filled up may take this share of what is kept, or so many bytes a layer, where one call
# less is worth more than a few places read in vain.
SHARE, BYTES = 1 / 16, 2**16
# It grows by this share of its length, if that is more than a tail alone would grow by.
GROWTH = 32


@dataclass(eq=False)
class OnePiece:
    """Prefix and tail of a cache layer, one behind the other, with room to grow.

    Attributes:
        keys: [B, H, N, D], of which the first `lead + tail` places are taken.
        values: [B, H, N, Dv] likewise.
        rest: the prefix without keys and values: columns and lengths.
        lead: places of the prefix, the longest head's number.
        tail: places behind it.
        seen: [B, H, N] bool; False where a place is filled up; None where none is.
    """

    keys: Tensor
    values: Tensor
    rest: Ragged
    lead: int
    tail: int
    seen: Tensor | None
    # [B, H, 1, N] what is added to scores to leave out what is not seen; made when it is asked for.
    _added: Tensor | None = None

    @classmethod
    def of(cls, prefix: Ragged, keys: Tensor, values: Tensor) -> OnePiece:
        """Lay a prefix and a tail [B, H, T, D] and [B, H, T, Dv] one behind the other."""
        lead, tail = prefix.longest, keys.shape[2]
        room = _room(lead, tail)
        batch, heads = prefix.batch, prefix.heads
        even = min(prefix.lengths) == lead
        real = None if even else _real(prefix)
        seen = None
        if real is not None:
            seen = torch.ones(batch, heads, room, dtype=torch.bool, device=keys.device)
            seen[:, :, :lead] = real

        def joined(packed: Tensor, later: Tensor) -> Tensor:
            out = packed.new_empty(batch, heads, room, packed.shape[1])
            before = out[:, :, :lead]
            if real is None:
                before.copy_(packed.view(batch, heads, lead, -1))
            else:
                # A place that nobody sees must not hold what is no number.
                before.zero_()
                before[real] = packed
            out[:, :, lead : lead + tail] = later
            return out

        return cls(
            joined(prefix.keys, keys),
            joined(prefix.values, values),
            replace(prefix, keys=prefix.keys.new_empty(0, 0), values=prefix.values.new_empty(0, 0)),
            lead,
            tail,
            seen,
        )

    @property
    def prefix(self) -> Ragged:
        """A copy of the prefix as it was."""
        return replace(self.rest, keys=self._packed(self.keys), values=self._packed(self.values))

    def _packed(self, states: Tensor) -> Tensor:
        before = states[:, :, : self.lead]
        if self.seen is None:
            return before.reshape(-1, states.shape[3])
        return before[self.seen[:, :, : self.lead]]

    @property
    def used(self) -> int:
        """Places that are taken."""
        return self.lead + self.tail

    @property
    def tails(self) -> tuple[Tensor, Tensor]:
        """Keys and values behind the prefix."""
        part = slice(self.lead, self.used)
        return self.keys[:, :, part], self.values[:, :, part]

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add new columns; returns all keys and values."""
        held, new = self.lead + self.tail, keys.shape[2]
        end = held + new
        if end > self.keys.shape[2]:
            self._grow(_room(self.lead, end - self.lead))
        self.tail += new
        self.keys.narrow(2, held, new).copy_(keys)
        self.values.narrow(2, held, new).copy_(values)
        return self.keys.narrow(2, 0, end), self.values.narrow(2, 0, end)

    def _grow(self, room: int) -> None:
        def grown(old: Tensor) -> Tensor:
            new = old.new_empty(*old.shape[:2], room, *old.shape[3:])
            new[:, :, : old.shape[2]] = old
            return new

        self.keys, self.values = grown(self.keys), grown(self.values)
        if self.seen is not None:
            more = self.seen.new_ones(*self.seen.shape[:2], room - self.seen.shape[2])
            self.seen, self._added = torch.cat((self.seen, more), dim=2), None

    def added(self) -> Tensor | None:
        """[B, H, 1, used] what leaves out places that are filled up, in the type of the keys."""
        if self.seen is None:
            return None
        if self._added is None:
            none = torch.zeros_like(self.seen, dtype=self.keys.dtype)
            self._added = none.masked_fill_(~self.seen, -torch.inf)[:, :, None]
        return self._added.narrow(3, 0, self.used)

    def mask(self, given: Tensor | None, queries: int, heads: int) -> Tensor | None:
        """What queries see of all places: of the prefix all that is real, then as the host says.

        Args:
            given: the host's mask of the sequence, as `hosts.masks` reads it.
            queries: number Q of queries, the last columns.
            heads: query heads.

        Returns:
            [B or 1, 1 or Hq, Q or 1, used], bool or, where the host's is, additive; None for all.
        """
        device = self.keys.device
        late = masks.spread(given, queries, self.tail, device)
        seen = self.seen
        if late is None:
            if seen is None:
                return None
            return _of_queries(seen.narrow(2, 0, self.used), heads)
        early: Tensor = torch.ones(1, 1, 1, self.lead, dtype=torch.bool, device=late.device)
        if seen is not None:
            early = _of_queries(seen.narrow(2, 0, self.lead), heads).to(late.device)
        if late.dtype != torch.bool:
            early = masks.added(early, late.dtype)
        lines = [max(a, b) for a, b in zip(early.shape[:3], late.shape[:3], strict=True)]
        return torch.cat([one.expand(*lines, -1) for one in (early, late)], dim=3)

    def select(self, rows: Tensor) -> OnePiece:
        """The samples at `rows` [B'], in their order."""
        return self._map(lambda one: one.index_select(0, rows), self.rest.select(rows))

    def to(self, device: torch.device, non_blocking: bool = False) -> OnePiece:
        """The same on another device."""
        moved = self.rest.to(device, non_blocking=non_blocking)
        return self._map(lambda one: one.to(device, non_blocking=non_blocking), moved)

    def _map(self, change: Callable[[Tensor], Tensor], rest: Ragged) -> OnePiece:
        seen = None if self.seen is None else change(self.seen)
        return OnePiece(change(self.keys), change(self.values), rest, self.lead, self.tail, seen)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors held, room to grow and bookkeeping included."""
        kept = sum(one.nbytes for one in (self.seen, self._added) if one is not None)
        return self.keys.nbytes + self.values.nbytes + self.rest.nbytes + kept


def _room(lead: int, tail: int) -> int:
    """Places to make for a prefix and a tail, with room to grow."""
    return lead + max(room_for(tail), tail + (lead + tail) // GROWTH)


def serves(prefix: Ragged) -> bool:
    """Whether a prefix may lie in one piece with what comes behind it."""
    lead, total = prefix.longest, prefix.starts[-1]
    if not lead:
        return False
    filled = len(prefix.lengths) * lead - total
    if not filled:
        return True
    # On a GPU one program reads heads of any length.
    if prefix.keys.is_cuda:
        return False
    width = prefix.keys.shape[1] + prefix.values.shape[1]
    few = filled * width * prefix.keys.element_size() <= BYTES
    return few or filled <= SHARE * total


def _real(prefix: Ragged) -> Tensor:
    """[B, H, longest] bool; the places of a head that it fills, its last ones."""
    lengths = torch.tensor(prefix.lengths, device=prefix.keys.device)
    places = torch.arange(prefix.longest, device=prefix.keys.device)
    real = places >= prefix.longest - lengths[:, None]
    return real.view(prefix.batch, prefix.heads, -1)


def _of_queries(seen: Tensor, heads: int) -> Tensor:
    """[B, Hq, 1, n] of [B, H, n]: what a KV head's query heads see."""
    batch, own, places = seen.shape
    spread = seen[:, :, None].expand(-1, -1, heads // own, -1)
    return spread.reshape(batch, heads, 1, places)
