"""Keys and values of which every KV head of every sample keeps its own tokens, packed.

Imports torch alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, groupby
from typing import Any

import torch
from torch import Tensor

# What attention to some keys gives, and the log of the sum of its exponentials.
Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Ragged:
    """Keys and values of which every KV head of every sample keeps its own tokens.

    Ordered by (sample, KV head, column): keys [S, D], values [S, Dv], columns [S] int32 (0-based
    in the uncut sequence); offsets [batch · heads + 1] int32, cumulative, on the same device, and
    lengths on the host, sample by sample, any of which may be 0.
    """

    keys: Tensor
    values: Tensor
    columns: Tensor
    offsets: Tensor
    lengths: tuple[int, ...]
    batch: int
    heads: int

    @classmethod
    def cut(
        cls,
        keys: Tensor,
        values: Tensor,
        keep: Tensor,
        offset: int = 0,
        lengths: tuple[int, ...] | None = None,
    ) -> Ragged:
        """Copy what `keep` [B, H, L] bool says out of keys [B, H, L, D] and values [B, H, L, Dv].

        Columns count from `offset`. Waits for the device once, for the sizes, unless `lengths` has
        those of each (sample, head). Raises ValueError where the shapes do not fit.
        """
        return cls.cut_each([keys], [values], keep, offset, lengths)[0]

    @classmethod
    def cut_each(
        cls,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        keep: Tensor,
        offset: int = 0,
        lengths: tuple[int, ...] | None = None,
    ) -> list[Ragged]:
        """As `cut`, of n layers of one shape at once.

        `keep` [n · B, H, L] and `lengths` have one layer behind the other.
        """
        n, (B, H, L) = len(keys), keys[0].shape[:3] if keys[0].ndim == 4 else (0, 0, 0)
        fits = all(one.ndim == 4 and one.shape[:3] == (B, H, L) for one in (*keys, *values))
        if not fits or keep.shape != (n * B, H, L) or keep.dtype != torch.bool:
            raise ValueError("Expected keys [B, H, L, D], values [B, H, L, Dv], bool [B, H, L].")
        device = keys[0].device
        if keep.device != device:
            keep = keep.to(device)
        if lengths is None:
            lengths = tuple(keep.sum(dim=2).flatten().tolist())
        each = [lengths[i * B * H : (i + 1) * B * H] for i in range(n)]
        totals = [sum(some) for some in each]
        # On a CPU nothing is waited for.
        if device.type == "cpu":
            index = keep.flatten().nonzero()[:, 0]
        else:
            index = _where(keep.flatten(), sum(totals))
        columns = index % max(L, 1)
        columns = (columns + offset if offset else columns).split(totals)
        if n > 1:
            index = index % max(B * H * L, 1)
        ends = torch.tensor([(0, *accumulate(some)) for some in each], dtype=torch.int32).to(device)
        # Each in room of its own, for layers are let go one by one.
        return [
            cls(
                _taken(key, at),
                _taken(value, at),
                column.to(torch.int32),
                end.clone(),
                some,
                B,
                H,
            )
            for key, value, at, column, end, some in zip(
                keys, values, index.split(totals), columns, ends.unbind(), each, strict=True
            )
        ]

    def join(self, other: Ragged) -> Ragged:
        """Of each (sample, head) its tokens, then those of `other`; ValueError if shapes differ."""
        if (self.batch, self.heads) != (other.batch, other.heads):
            raise ValueError("Only caches of as many samples and KV heads can be joined.")
        if not self.longest or not other.longest:
            return self if self.longest else other
        # Each token moves back by what the other cache has before it.
        first = _spread(other.offsets[:-1], self)
        second = _spread(self.offsets[1:], other)

        def both(name: str) -> Tensor:
            mine, new = getattr(self, name), getattr(other, name)
            out = mine.new_empty(len(mine) + len(new), *mine.shape[1:])
            return out.index_copy_(0, first, mine).index_copy_(0, second, new)

        offsets = self.offsets + other.offsets
        lengths = tuple(a + b for a, b in zip(self.lengths, other.lengths, strict=True))
        tensors = both("keys"), both("values"), both("columns")
        return Ragged(*tensors, offsets, lengths, self.batch, self.heads)

    def select(self, rows: Tensor) -> Ragged:
        """The samples that `rows` [B'] numbers, in any order; ValueError for one out of range."""
        chosen, H = rows.tolist(), self.heads
        if any(not 0 <= row < self.batch for row in chosen):
            raise ValueError(f"Samples {chosen} are not all among 0 to {self.batch - 1}.")
        if chosen == list(range(self.batch)):
            return self
        parts = [slice(self.starts[row * H], self.starts[(row + 1) * H]) for row in chosen]
        counts = self.offsets.diff().view(self.batch, H)[rows.to(self.offsets.device).long()]
        lengths = tuple(n for row in chosen for n in self.lengths[row * H : (row + 1) * H])
        rest = (_offsets(counts.flatten()), lengths, len(chosen))
        return self._map(lambda t: torch.cat([t[:0], *(t[part] for part in parts)]), *rest)

    def before(self, column: int) -> Ragged:
        """Only the tokens whose column is below `column`; waits for the device once."""
        keep = self.columns < column
        offsets = _offsets(keep).index_select(0, self.offsets)
        lengths = tuple(offsets.diff().tolist())
        if lengths == self.lengths:
            return self
        index = _where(keep, sum(lengths))
        return self._map(lambda tensor: tensor.index_select(0, index), offsets, lengths, self.batch)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Ragged:
        """The same on another device."""
        offsets = self.offsets.to(device, non_blocking=non_blocking)
        rest = (offsets, self.lengths, self.batch)
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking), *rest)

    def dense(self) -> tuple[Tensor, Tensor, Tensor]:
        """Padded keys [B, H, longest, D], values [B, H, longest, Dv], bool [B, H, longest]."""
        n, longest = len(self.lengths), self.longest
        starts = torch.arange(n, device=self.offsets.device) * longest
        place = _spread(starts - self.offsets[:-1], self)

        def pad(tensor: Tensor) -> Tensor:
            out = tensor.new_zeros(n * longest, *tensor.shape[1:]).index_copy_(0, place, tensor)
            return out.view(self.batch, self.heads, longest, *tensor.shape[1:])

        return pad(self.keys), pad(self.values), pad(torch.ones_like(place, dtype=torch.bool))

    def _map(self, change: Callable[[Tensor], Tensor], *rest: Any) -> Ragged:
        """`rest` are offsets, lengths and batch."""
        kept: Any = map(change, (self.keys, self.values, self.columns))
        return Ragged(*(*kept, *rest, self.heads))

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """`offsets` on the host."""
        return (0, *accumulate(self.lengths))

    @cached_property
    def runs(self) -> list[tuple[slice, Pair]]:
        """Neighbours of equal length, with keys and values as dense [n, 1, length, D] views."""
        out, first = [], 0
        for length, run in groupby(self.lengths):
            last = first + len(list(run))
            part = slice(self.starts[first], self.starts[last])
            views = (t[part].view(last - first, 1, length, t.shape[1]) for t in self._pair)
            out.append((slice(first, last), tuple(views)))
            first = last
        return out  # type: ignore[return-value]

    @property
    def _pair(self) -> Pair:
        return self.keys, self.values

    @property
    def longest(self) -> int:
        """The largest length; 0 where there is none."""
        return max(self.lengths, default=0)

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values."""
        return self.keys.nbytes + self.values.nbytes

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors held."""
        return self.kv_bytes + self.columns.nbytes + self.offsets.nbytes


def _taken(states: Tensor, at: Tensor) -> Tensor:
    """[n, D] of states [B, H, L, D], by numbers of their tokens."""
    _, H, L, _ = states.shape
    if states.is_contiguous():
        return states.flatten(0, 2).index_select(0, at)
    # Flattening would copy a cache that is not contiguous.
    rows = at // max(L, 1)
    return states[rows // max(H, 1), rows % max(H, 1), at % max(L, 1)]


def _offsets(counts: Tensor) -> Tensor:
    """[n] counts (or bools) as [n + 1] cumulative int32."""
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)


def _where(keep: Tensor, total: int) -> Tensor:
    """Indices of the `total` true values of [N], without waiting for the device."""
    # All that is false is written to one place past the end.
    place = torch.where(keep, keep.cumsum(0) - 1, total)
    numbers = torch.arange(len(keep), device=keep.device)
    return numbers.new_empty(total + 1).scatter_(0, place, numbers)[:total]


def _spread(shift: Tensor, prefix: Ragged) -> Tensor:
    """Each token's number in `prefix`, plus the `shift` [B · H] of its (sample, head)."""
    total, counts = prefix.starts[-1], prefix.offsets.diff()
    shifts = shift.long().repeat_interleave(counts, output_size=total)
    return torch.arange(total, device=shift.device) + shifts
