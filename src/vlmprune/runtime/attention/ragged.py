"""Attention over a ragged KV cache: each KV head of each sample keeps tokens of its own.

What was kept never changes while decoding, so it lies packed, without padding; new tokens go to
a small dense tail. A query attends to both, and the two results are merged by log-sum-exp.
Pure functions that import torch alone; `ragged_triton` is loaded only where it runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate, groupby
from typing import Any

import torch
from torch import Tensor

from vlmprune.runtime.attention import ragged_varlen
from vlmprune.runtime.attention.ragged_varlen import nothing

BACKENDS = ("reference", "cpu", "varlen", "triton")
Pair = tuple[Tensor, Tensor]
Mask = Tensor | None


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
    def cut(cls, keys: Tensor, values: Tensor, keep: Tensor, offset: int = 0) -> Ragged:
        """Copy what `keep` [B, H, L] bool says out of keys [B, H, L, D] and values [B, H, L, Dv].

        Columns count from `offset`. Waits for the device once, for the sizes. Raises ValueError
        where the shapes do not fit.
        """
        shapes = keys.shape[:3] == values.shape[:3] == keep.shape
        if not shapes or keys.ndim != 4 or values.ndim != 4 or keep.dtype != torch.bool:
            raise ValueError("Expected keys [B, H, L, D], values [B, H, L, Dv], bool [B, H, L].")
        B, H, L = keep.shape
        keep = keep.to(keys.device)
        counts = keep.sum(dim=2).flatten()
        lengths = tuple(counts.tolist())
        # Indexed in three dimensions, as flattening would copy a cache that is not contiguous.
        index = _where(keep.flatten(), sum(lengths))
        column = index % max(L, 1)
        at = index // max(H * L, 1), index // max(L, 1) % max(H, 1), column
        columns = (column + offset).to(torch.int32)
        return cls(keys[at], values[at], columns, _offsets(counts), lengths, B, H)

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


def attend(
    query: Tensor,
    prefix: Ragged,
    tail_keys: Tensor,
    tail_values: Tensor,
    tail_mask: Mask,
    scaling: float,
    backend: str = "auto",
) -> Tensor:
    """Attention of query [B, Hq, Q, D] to a whole prefix and to a dense tail.

    Tail keys [B, H, T, D], values [B, H, T, Dv] and mask are as in `dense_partial`. Backends:
    "reference", plain and slow; "cpu", without padding, on any device; "varlen", on CUDA in half
    precision with a torch that has `varlen_attn`; "triton", on CUDA for one query and a mask
    shared by the heads; "auto", what `choose_backend` says. Returns [B, Hq, Q, Dv] in the
    query's dtype; rows that see nothing are 0.

    Raises:
        ValueError: shapes do not fit, or the backend is unknown or cannot run this.
    """
    _check(query, prefix)
    if backend == "auto":
        backend = choose_backend(query, prefix, tail_mask)
    if backend == "triton":
        if not _triton_runs(query, prefix, tail_mask):
            raise ValueError("triton needs CUDA, one query, dims up to 256, a mask for all heads.")
        return _triton().attend(query, prefix, tail_keys, tail_values, tail_mask, scaling)
    first = partial(query, prefix, scaling, backend)
    if not tail_keys.shape[2]:
        return first[0]
    plain = backend == "reference"
    second = dense_partial(query, tail_keys, tail_values, tail_mask, scaling, plain)
    return _mix(first, second, sure=0 not in prefix.lengths)


def choose_backend(query: Tensor, prefix: Ragged, tail_mask: Mask = None) -> str:
    """What "auto" means: triton for one query on CUDA, else varlen where it runs, else cpu."""
    if query.is_cuda and _triton_runs(query, prefix, tail_mask):
        return "triton"
    return "varlen" if ragged_varlen.runs(query, prefix) else "cpu"


def partial(query: Tensor, prefix: Ragged, scaling: float, backend: str = "auto") -> Pair:
    """Attention of every query [B, Hq, Q, D] to the whole prefix, by any backend but triton.

    Returns output [B, Hq, Q, Dv] in the query's dtype and log-sum-exp [B, Hq, Q] float32; 0 and
    -inf where a head kept nothing.

    Raises:
        ValueError: shapes do not fit, or the backend is unknown or cannot run this.
    """
    _check(query, prefix)
    if backend == "auto":
        backend = "varlen" if ragged_varlen.runs(query, prefix) else "cpu"
    if backend not in _PARTIAL:
        raise ValueError(f"The backend must be one of {', '.join(_PARTIAL)}, not {backend}.")
    if backend == "varlen" and not ragged_varlen.runs(query, prefix):
        raise ValueError("varlen needs CUDA, 16-bit floats, equal dims and a torch that has it.")
    B, Hq, Q, D = query.shape
    # The queries of a KV head's group become rows of one sequence.
    rows = query.reshape(B * prefix.heads, Hq // max(prefix.heads, 1) * Q, D)
    out, lse = _PARTIAL[backend](rows, prefix, scaling, Q)
    return out.to(query.dtype).reshape(B, Hq, Q, out.shape[-1]), lse.reshape(B, Hq, Q)


def dense_partial(
    query: Tensor, keys: Tensor, values: Tensor, mask: Mask, scaling: float, plain: bool = False
) -> Pair:
    """Attention of query [B, Hq, Q, D] to keys [B, H, T, D] and values [B, H, T, Dv].

    The mask is None or [B or 1, 1 or Hq, Q, T], bool (True: attend) or added to the scores;
    `plain` asks for float32, step by step. Returns the same pair as `partial`, 0 and -inf for
    rows that see nothing.
    """
    (B, Hq, Q, D), (H, T) = query.shape, keys.shape[1:3]
    rows = query.reshape(B, H, Hq // max(H, 1) * Q, D)
    if mask is not None:
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, -torch.inf)
        if Q != 1 or mask.shape[1] != 1:
            mask = mask.expand(B, Hq, Q, T).reshape(B, H, rows.shape[2], T)
    out, lse = _attention(rows, (keys, values), scaling, mask, plain)
    return out.to(query.dtype).reshape(B, Hq, Q, out.shape[-1]), lse.reshape(B, Hq, Q)


def merge(first: Pair, second: Pair) -> Pair:
    """Two results, [..., Dv] and [...] float32, over disjoint keys as one over all of them."""
    return _mix(first, second, sure=False), torch.logaddexp(first[1], second[1])


def _mix(first: Pair, second: Pair, sure: bool) -> Tensor:
    """The output of `merge`; `sure` says that every row of the first saw a key."""
    (a, lse_a), (b, lse_b) = first, second
    share = torch.sigmoid(lse_b - lse_a)
    # Where neither saw a key the difference is NaN, and both outputs are 0.
    share = (share if sure else share.nan_to_num_(0.0))[..., None]
    if a.dtype == torch.float32:
        return a.lerp(b, share)
    return a.float().lerp(b.float(), share).to(a.dtype)


@lru_cache(maxsize=1)
def _triton() -> Any:
    try:
        from vlmprune.runtime.attention import ragged_triton
    except Exception:  # A triton that does not fit the machine fails in many ways.
        return None
    return ragged_triton


def _triton_runs(query: Tensor, prefix: Ragged, mask: Mask) -> bool:
    return _triton() is not None and _triton().runs(query, prefix, mask)


def _reference(rows: Tensor, prefix: Ragged, scaling: float, _: int) -> Pair:
    out, lse = nothing(rows, prefix.values)
    for i, length in enumerate(prefix.lengths):
        if length:
            part = slice(prefix.starts[i], prefix.starts[i] + length)
            scores = rows[i].float() @ prefix.keys[part].float().T * scaling
            out[i] = scores.softmax(dim=-1) @ prefix.values[part].float()
            lse[i] = scores.logsumexp(dim=-1)
    return out, lse


def _cpu(rows: Tensor, prefix: Ragged, scaling: float, _: int) -> Pair:
    """One call for each run of neighbours of equal length, which is a dense batch as it lies."""
    parts = [_attention(rows[part, None], cache, scaling) for part, cache in prefix.runs]
    if len(parts) == 1:
        return parts[0][0][:, 0], parts[0][1][:, 0]
    # The first part has no rows, for a cache without samples.
    parts = [nothing(rows[:0, None], prefix.values), *parts]
    return torch.cat([out for out, _ in parts])[:, 0], torch.cat([lse for _, lse in parts])[:, 0]


def _attention(
    rows: Tensor, cache: Pair, scaling: float, mask: Mask = None, plain: bool = False
) -> Pair:
    """Rows [n, h, R, D] over keys and values [n, h, T, D]; `mask` is added to the scores."""
    keys, values = cache
    if not keys.shape[2] or not rows.numel():
        return nothing(rows, values)
    if (
        (rows.device.type == "cpu" and not plain)
        and rows.dtype == keys.dtype == values.dtype
        and rows.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and rows.shape[3] == values.shape[3]
        and rows.stride(3) == keys.stride(3) == values.stride(3) == 1
    ):
        # The public function does not return the log-sum-exp.
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default(
            rows, keys, values, attn_mask=mask, scale=scaling
        )
    else:
        scores = rows.float() @ keys.float().transpose(2, 3) * scaling
        scores = scores if mask is None else scores + mask
        lse = scores.logsumexp(dim=3)
        out = (scores - lse[..., None]).exp_() @ values.float()
    if mask is not None:
        unseen = (mask == -torch.inf).all(dim=3)
        lse = lse.masked_fill(unseen, -torch.inf)
        out = out.masked_fill(unseen[..., None], 0.0)
    return out, lse


_PARTIAL = {"reference": _reference, "cpu": _cpu, "varlen": ragged_varlen.attend}


def _check(query: Tensor, prefix: Ragged) -> None:
    shape, B, H, D = tuple(query.shape), prefix.batch, prefix.heads, prefix.keys.shape[1]
    if len(shape) != 4 or shape[0] != B or shape[1] % max(H, 1) or shape[3] != D:
        raise ValueError(f"query {shape} does not fit {B} samples, {H} KV heads and keys of {D}.")


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
