"""Attention over a ragged KV cache: each KV head of each sample keeps tokens of its own.

What was kept never changes while decoding, so it lies packed, without padding; new tokens go to
a small dense tail. A query attends to both, and the two results are merged by log-sum-exp.
Pure functions that import torch alone; `ragged_triton` is loaded only where it runs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import accumulate, groupby
from typing import Any

import torch
from torch import Tensor

# What each backend needs is said in `attend`.
BACKENDS = ("reference", "cpu", "varlen", "triton")

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Ragged:
    """Keys and values of which every KV head of every sample keeps its own tokens.

    Tokens are ordered by (sample, KV head, column); a (sample, head) may have none.

    Attributes:
        keys: [S, D].
        values: [S, Dv].
        columns: [S] int32, the 0-based index of each token in the uncut sequence.
        offsets: [batch · heads + 1] int32, cumulative lengths, on the same device.
        lengths: batch · heads numbers on the host, sample by sample.
        batch: samples.
        heads: KV heads.
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
        """Copy the kept tokens out of a dense cache; waits for the device once, for the sizes.

        Args:
            keys: [B, H, L, D].
            values: [B, H, L, Dv].
            keep: [B, H, L] bool.
            offset: column of the first token.

        Raises:
            ValueError: shapes do not fit, or `keep` is not bool.
        """
        fits = keys.ndim == values.ndim == 4 and keys.shape[:3] == values.shape[:3] == keep.shape
        if not fits or keep.dtype != torch.bool:
            raise ValueError(
                f"keys {tuple(keys.shape)}, values {tuple(values.shape)} and keep "
                f"{tuple(keep.shape)} {keep.dtype} do not fit; expected [B, H, L, D], "
                "[B, H, L, Dv] and [B, H, L] bool."
            )
        B, H, L = keep.shape
        keep = keep.to(keys.device)
        counts = keep.sum(dim=2).flatten()
        lengths = tuple(counts.tolist())
        index = _where(keep.flatten(), sum(lengths))
        columns = (index % max(L, 1) + offset).to(torch.int32)
        return cls(
            _rows(keys, index), _rows(values, index), columns, _offsets(counts), lengths, B, H
        )

    def join(self, other: Ragged) -> Ragged:
        """Of each (sample, head) the tokens of `self`, then those of `other`.

        Raises:
            ValueError: samples or heads differ.
        """
        if (self.batch, self.heads) != (other.batch, other.heads):
            raise ValueError(
                f"Cannot join {self.batch} samples by {self.heads} heads with "
                f"{other.batch} by {other.heads}."
            )
        if not other.starts[-1]:
            return self
        if not self.starts[-1]:
            return other
        # Each token moves back by what the other part has before it.
        first = _spread(other.offsets[:-1], self)
        second = _spread(self.offsets[1:], other)

        def both(mine: Tensor, new: Tensor) -> Tensor:
            out = mine.new_empty(len(mine) + len(new), *mine.shape[1:])
            return out.index_copy_(0, first, mine).index_copy_(0, second, new)

        return Ragged(
            both(self.keys, other.keys),
            both(self.values, other.values),
            both(self.columns, other.columns),
            self.offsets + other.offsets,
            tuple(a + b for a, b in zip(self.lengths, other.lengths, strict=True)),
            self.batch,
            self.heads,
        )

    def select(self, rows: Tensor) -> Ragged:
        """The samples named by `rows` [B'], which may repeat, reorder or leave out some.

        Raises:
            ValueError: an index is outside 0 to batch - 1.
        """
        chosen, H = rows.flatten().tolist(), self.heads
        if any(not 0 <= row < self.batch for row in chosen):
            raise ValueError(f"Samples {chosen} are not all among 0 to {self.batch - 1}.")
        if chosen == list(range(self.batch)):
            return self
        parts = [slice(self.starts[row * H], self.starts[(row + 1) * H]) for row in chosen]

        def pick(tensor: Tensor) -> Tensor:
            return torch.cat([tensor[part] for part in parts]) if parts else tensor[:0].clone()

        counts = self.offsets.diff().view(self.batch, H)
        counts = counts.index_select(0, rows.flatten().to(counts.device)).flatten()
        return Ragged(
            pick(self.keys),
            pick(self.values),
            pick(self.columns),
            _offsets(counts),
            tuple(n for row in chosen for n in self.lengths[row * H : (row + 1) * H]),
            len(chosen),
            H,
        )

    def before(self, column: int) -> Ragged:
        """Only the tokens whose column is below `column`; waits for the device once."""
        keep = self.columns < column
        passed = _offsets(keep)
        offsets = passed.index_select(0, self.offsets)
        lengths = tuple(offsets.diff().tolist())
        if lengths == self.lengths:
            return self
        index = _where(keep, sum(lengths))
        return replace(
            self,
            keys=self.keys.index_select(0, index),
            values=self.values.index_select(0, index),
            columns=self.columns.index_select(0, index),
            offsets=offsets,
            lengths=lengths,
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Ragged:
        """The same on another device."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=non_blocking)

        return replace(
            self,
            keys=move(self.keys),
            values=move(self.values),
            columns=move(self.columns),
            offsets=move(self.offsets),
        )

    def dense(self) -> tuple[Tensor, Tensor, Tensor]:
        """Padded keys [B, H, longest, D], values [B, H, longest, Dv], bool [B, H, longest]."""
        heads = torch.arange(len(self.lengths), dtype=torch.int32, device=self.keys.device)
        place = _spread(heads * self.longest - self.offsets[:-1], self)

        def pad(tensor: Tensor) -> Tensor:
            out = tensor.new_zeros(len(self.lengths) * self.longest, *tensor.shape[1:])
            out.index_copy_(0, place, tensor)
            return out.view(self.batch, self.heads, self.longest, *tensor.shape[1:])

        return pad(self.keys), pad(self.values), pad(torch.ones_like(self.columns)).bool()

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """`offsets` on the host."""
        return (0, *accumulate(self.lengths))

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
    tail_mask: Tensor | None,
    scaling: float,
    backend: str = "auto",
) -> Tensor:
    """Attention to the whole prefix and to a dense tail.

    Args:
        query: [B, Hq, Q, D]; Hq is a multiple of the prefix's heads.
        prefix: what was kept; every query sees all of it.
        tail_keys: [B, H, T, D]; T may be 0.
        tail_values: [B, H, T, Dv].
        tail_mask: of the tail alone, as in `dense_partial`.
        scaling: factor of the dot products.
        backend: "auto" or one of `BACKENDS`. "reference" is plain and slow; "cpu" has no
            padding and runs on any device; "varlen" needs CUDA, half precision and a torch that
            has `varlen_attn`; "triton" needs CUDA, one query, and a mask shared by the heads.

    Returns:
        [B, Hq, Q, Dv] in the query's dtype; rows that see nothing are 0.

    Raises:
        ValueError: shapes do not fit, or the backend is unknown or cannot run this.
    """
    _check(query, prefix)
    if backend == "auto":
        backend = choose_backend(query, prefix, tail_mask)
    if backend == "triton":
        if not _triton_runs(query, prefix, tail_mask):
            raise ValueError(
                "The triton backend needs CUDA and triton, one query, head dims up to 256 and a "
                'mask shared by all heads; use "auto".'
            )
        from . import ragged_triton

        return ragged_triton.attend(query, prefix, tail_keys, tail_values, tail_mask, scaling)
    first = partial(query, prefix, scaling, backend)
    if not tail_keys.shape[2]:
        return first[0]
    second = (_plain if backend == "reference" else dense_partial)(
        query, tail_keys, tail_values, tail_mask, scaling
    )
    return merge(first, second)[0]


def choose_backend(query: Tensor, prefix: Ragged, tail_mask: Tensor | None = None) -> str:
    """What "auto" means: triton for one query on CUDA, else varlen where it runs, else cpu."""
    if query.is_cuda and _triton_runs(query, prefix, tail_mask):
        return "triton"
    return "varlen" if varlen_runs(query, prefix) else "cpu"


def partial(query: Tensor, prefix: Ragged, scaling: float, backend: str = "auto") -> Pair:
    """Attention of every query to the whole prefix.

    Args:
        query: [B, Hq, Q, D].
        prefix: the same B, and a number of heads that divides Hq.
        scaling: factor of the dot products.
        backend: "auto", "reference", "cpu" or "varlen", as in `attend`.

    Returns:
        Output [B, Hq, Q, Dv] in the query's dtype, and log-sum-exp [B, Hq, Q] float32. Where a
        head kept nothing they are 0 and -inf.

    Raises:
        ValueError: shapes do not fit, or the backend is unknown or cannot run this.
    """
    _check(query, prefix)
    if backend == "auto":
        backend = "varlen" if varlen_runs(query, prefix) else "cpu"
    if backend not in _PARTIAL:
        raise ValueError(f'No backend "{backend}" here; choose one of {", ".join(_PARTIAL)}.')
    if backend == "varlen" and not varlen_runs(query, prefix):
        raise ValueError(
            "The varlen backend needs CUDA, float16 or bfloat16, equal key and value dims and a "
            'torch with torch.nn.attention.varlen; use "auto".'
        )
    B, Hq, Q, D = query.shape
    # The queries of a KV head's group become rows of one sequence.
    rows = query.reshape(B * prefix.heads, Hq // prefix.heads * Q, D)
    out, lse = _PARTIAL[backend](rows, prefix, scaling, Q)
    out = out.to(query.dtype).reshape(B, Hq, Q, prefix.values.shape[1])
    return out, lse.reshape(B, Hq, Q)


def dense_partial(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scaling: float
) -> Pair:
    """Attention to a dense cache, with what `merge` needs.

    Args:
        query: [B, Hq, Q, D].
        keys: [B, H, T, D]; H divides Hq, T may be 0.
        values: [B, H, T, Dv].
        mask: None, or [B or 1, 1 or Hq, Q, T], bool (True: attend) or added to the scores.
        scaling: factor of the dot products.

    Returns:
        Output [B, Hq, Q, Dv] in the query's dtype, and log-sum-exp [B, Hq, Q] float32. Rows
        that see nothing get 0 and -inf.
    """
    (B, Hq, Q, D), (H, T) = query.shape, keys.shape[1:3]
    if not T:
        return query.new_zeros(B, Hq, Q, values.shape[3]), _nothing(query, B, Hq, Q)
    rows = query.reshape(B, H, Hq // H * Q, D)
    if mask is not None:
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, -torch.inf)
        if Q == 1 and mask.shape[1] == 1:
            mask = mask.expand(B, H, rows.shape[2], T)
        else:
            mask = mask.expand(B, Hq, Q, T).reshape(B, H, rows.shape[2], T)
    out, lse = _rows_partial(rows, keys, values, scaling, mask)
    out = out.to(query.dtype).reshape(B, Hq, Q, values.shape[3])
    return out, lse.reshape(B, Hq, Q)


def merge(first: Pair, second: Pair) -> Pair:
    """Two results over disjoint sets of keys as the result over all of them.

    Args:
        first: output [..., Dv] and log-sum-exp [...] float32.
        second: the same shapes.

    Returns:
        The same shapes; output 0 and -inf where both saw nothing.
    """
    (a, lse_a), (b, lse_b) = first, second
    # Where neither saw a key the difference is NaN, and both outputs are 0.
    share = torch.sigmoid(lse_b - lse_a).nan_to_num_(0.0)[..., None]
    out = a.float().lerp(b.float(), share).to(a.dtype)
    return out, torch.logaddexp(lse_a, lse_b)


def varlen_runs(query: Tensor, prefix: Ragged) -> bool:
    """Whether torch's variable-length attention can attend to the prefix; never raises."""
    D, device = query.shape[3], query.device
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.dtype == prefix.keys.dtype == prefix.values.dtype
        and prefix.values.shape[1] == D
        and D % 8 == 0
        and D <= 256
        and torch.cuda.get_device_capability(device) >= (8, 0)
        and _has_varlen()
    )


@lru_cache(maxsize=1)
def _has_varlen() -> bool:
    try:
        from torch.nn.attention.varlen import AuxRequest, varlen_attn
    except ImportError:
        return False
    has = inspect.signature(varlen_attn).parameters
    return AuxRequest is not None and {"enable_gqa", "return_aux", "scale"} <= set(has)


def _triton_runs(query: Tensor, prefix: Ragged, mask: Tensor | None) -> bool:
    if (
        query.shape[2] != 1
        or max(query.shape[3], prefix.values.shape[1]) > 256
        or (mask is not None and mask.shape[1] != 1)
    ):
        return False
    try:
        from . import ragged_triton
    except Exception:  # A triton that does not fit the machine fails in many ways.
        return False
    return ragged_triton.runs(query.device)


def _reference(rows: Tensor, prefix: Ragged, scaling: float, _: int) -> Pair:
    n, R, _D = rows.shape
    out = rows.new_zeros(n, R, prefix.values.shape[1], dtype=torch.float32)
    lse = _nothing(rows, n, R)
    for i, (start, length) in enumerate(zip(prefix.starts, prefix.lengths, strict=False)):
        if length:
            part = slice(start, start + length)
            scores = rows[i].float() @ prefix.keys[part].float().T * scaling
            out[i] = scores.softmax(dim=-1) @ prefix.values[part].float()
            lse[i] = scores.logsumexp(dim=-1)
    return out, lse


def _plain(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scaling: float
) -> Pair:
    """`dense_partial` in float32, step by step."""
    group = query.shape[1] // keys.shape[1]
    keys, values = (x.float().repeat_interleave(group, dim=1) for x in (keys, values))
    scores = query.float() @ keys.transpose(2, 3) * scaling
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -torch.inf)
    elif mask is not None:
        scores = scores + mask
    out = scores.softmax(dim=-1).nan_to_num(0.0) @ values
    return out.to(query.dtype), scores.logsumexp(dim=-1)


def _cpu(rows: Tensor, prefix: Ragged, scaling: float, _: int) -> Pair:
    """One call for each run of neighbours of equal length, which is a dense batch as it lies."""
    R, D, Dv = rows.shape[1], rows.shape[2], prefix.values.shape[1]
    parts, first = [], 0
    for length, run in groupby(prefix.lengths):
        n = len(list(run))
        if length:
            part = slice(prefix.starts[first], prefix.starts[first + n])
            keys = prefix.keys[part].view(n, 1, length, D)
            values = prefix.values[part].view(n, 1, length, Dv)
            parts.append(_rows_partial(rows[first : first + n, None], keys, values, scaling))
        else:
            parts.append((rows.new_zeros(n, 1, R, Dv), _nothing(rows, n, 1, R)))
        first += n
    if not parts:
        return rows.new_zeros(0, R, Dv), _nothing(rows, 0, R)
    if len(parts) == 1:
        return parts[0][0][:, 0], parts[0][1][:, 0]
    return torch.cat([out for out, _ in parts])[:, 0], torch.cat([lse for _, lse in parts])[:, 0]


def _rows_partial(
    rows: Tensor, keys: Tensor, values: Tensor, scaling: float, mask: Tensor | None = None
) -> Pair:
    """Rows [n, h, R, D] over keys [n, h, T, D], T > 0; `mask` is added to the scores."""
    flash = (
        rows.device.type == "cpu"
        and rows.numel() > 0
        and rows.dtype == keys.dtype == values.dtype
        and rows.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and rows.shape[-1] == values.shape[-1]
        and rows.stride(-1) == keys.stride(-1) == values.stride(-1) == 1
    )
    if flash:
        # The public function does not return the log-sum-exp.
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            rows, keys, values, attn_mask=mask, scale=scaling
        )
    else:
        scores = rows.float() @ keys.float().transpose(-1, -2) * scaling
        if mask is not None:
            scores = scores + mask
        lse = scores.logsumexp(dim=-1)
        out = (scores - lse[..., None]).exp_() @ values.float()
    if mask is not None:
        unseen = (mask == -torch.inf).all(dim=-1)
        lse = lse.masked_fill(unseen, -torch.inf)
        out = out.masked_fill(unseen[..., None], 0.0)
    return out, lse


def _varlen(rows: Tensor, prefix: Ragged, scaling: float, count: int) -> Pair:
    """One sequence for each (sample, KV head), of Q tokens and a head for each of its group."""
    from torch.nn.attention.varlen import AuxRequest, varlen_attn

    n, R, D = rows.shape
    Q, G = count, R // max(count, 1)
    if not prefix.longest or not R:
        return rows.new_zeros(n, R, prefix.values.shape[1]), _nothing(rows, n, R)
    out, lse = varlen_attn(
        rows.view(n, G, Q, D).transpose(1, 2).reshape(n * Q, G, D),
        prefix.keys[:, None],
        prefix.values[:, None],
        torch.arange(0, n * Q + 1, Q, dtype=torch.int32, device=rows.device),
        prefix.offsets,
        Q,
        prefix.longest,
        return_aux=AuxRequest(lse=True),
        scale=scaling,
        enable_gqa=True,
    )
    out = out.view(n, Q, G, -1).transpose(1, 2).reshape(n, R, -1)
    if _heads_first(varlen_attn, AuxRequest, rows.device, rows.dtype, D):
        lse = lse.view(G, n, Q).transpose(0, 1)
    else:
        lse = lse.view(n, Q, G).transpose(1, 2)
    lse = lse.reshape(n, R)
    if 0 in prefix.lengths:
        # What the kernel leaves there differs between its versions.
        empty = (prefix.offsets.diff() == 0)[:, None]
        out, lse = out.masked_fill(empty[..., None], 0.0), lse.masked_fill(empty, -torch.inf)
    return out, lse


@lru_cache(maxsize=8)
def _heads_first(
    varlen_attn: Callable[..., Any], aux: Any, device: torch.device, dtype: torch.dtype, dim: int
) -> bool:
    """Whether the log-sum-exp is [heads, tokens], as is so, or [tokens, heads], as is written."""
    tokens = torch.zeros(2, 1, dim, dtype=dtype, device=device)
    ends = torch.tensor([0, 2], dtype=torch.int32, device=device)
    _, lse = varlen_attn(tokens, tokens, tokens, ends, ends, 2, 2, return_aux=aux(lse=True))
    return tuple(lse.shape) == (1, 2)


_PARTIAL: dict[str, Callable[[Tensor, Ragged, float, int], Pair]] = {
    "reference": _reference,
    "cpu": _cpu,
    "varlen": _varlen,
}


def _check(query: Tensor, prefix: Ragged) -> None:
    fits = (
        query.ndim == 4
        and query.shape[0] == prefix.batch
        and query.shape[1] % max(prefix.heads, 1) == 0
        and query.shape[3] == prefix.keys.shape[1]
    )
    if not fits:
        raise ValueError(
            f"query {tuple(query.shape)} does not fit a prefix of {prefix.batch} samples by "
            f"{prefix.heads} heads with keys of {prefix.keys.shape[1]}."
        )


def _nothing(like: Tensor, *shape: int) -> Tensor:
    return torch.full(shape, -torch.inf, device=like.device)


def _offsets(counts: Tensor) -> Tensor:
    """[n] counts (or bools) as [n + 1] cumulative int32."""
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)


def _where(keep: Tensor, total: int) -> Tensor:
    """Indices of the `total` true values of [N], without waiting for the device."""
    # All that is false is written to one place past the end.
    place = torch.where(keep, keep.cumsum(0) - 1, total)
    index = torch.empty(total + 1, dtype=torch.int64, device=keep.device)
    numbers = torch.arange(len(keep), device=keep.device)
    return index.scatter_(0, place, numbers)[:total].clone()


def _rows(tensor: Tensor, index: Tensor) -> Tensor:
    """Rows of [B, H, L, D] by their number in [B · H · L]; never copies what is not asked for."""
    if tensor.is_contiguous():
        return tensor.view(-1, tensor.shape[3]).index_select(0, index)
    H, L = tensor.shape[1:3]
    return tensor[index // (H * L), index // L % H, index % L]


def _spread(shift: Tensor, prefix: Ragged) -> Tensor:
    """Each token's number in `prefix`, plus the `shift` [B · H] of its (sample, head)."""
    total = prefix.starts[-1]
    counts = prefix.offsets.diff()
    shifts = shift.long().repeat_interleave(counts, output_size=total)
    return torch.arange(total, device=shift.device) + shifts
