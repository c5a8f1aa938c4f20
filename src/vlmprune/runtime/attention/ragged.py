"""Attention over a ragged KV cache: each KV head of each sample keeps tokens of its own.

What was kept never changes while decoding, so it lies packed, without padding; new tokens go to
a small dense tail. A query attends to both, and the two results are merged by log-sum-exp.
`ragged_triton` is loaded only where it runs.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from vlmprune.hosts.attention import AttentionCall
from vlmprune.runtime.attention import ragged_varlen
from vlmprune.runtime.attention.ragged_tokens import Pair, Ragged
from vlmprune.runtime.attention.ragged_varlen import nothing
from vlmprune.select.softmax import scores, softmax

BACKENDS = ("reference", "cpu", "varlen", "triton")
Mask = Tensor | None


def attend(call: AttentionCall, prefix: Ragged, backend: str = "auto") -> Tensor:
    """Attention of a call's queries [B, Hq, Q, D] to a whole prefix and to a dense tail.

    Keys and values of the call are the tail, [B, H, T, D] and [B, H, T, Dv], and its mask, None or
    in four dimensions, is as in `dense_partial`. Backends: "reference", plain and slow; "cpu",
    without padding, on any device; "varlen", on CUDA in half precision with a torch that has
    `varlen_attn`; "triton", on CUDA for one query and a mask shared by the heads; "auto", what
    `choose_backend` says. Returns [B, Hq, Q, Dv] in the query's dtype; rows that see nothing are 0.

    Raises:
        ValueError: shapes do not fit, or the backend is unknown or cannot run this.
    """
    query, scaling = call.query, call.scale
    tail = call.key, call.value, call.mask, scaling
    _check(query, prefix)
    if backend == "auto":
        backend = choose_backend(query, prefix, call.mask)
    if backend == "triton":
        if not _triton_runs(query, prefix, call.mask):
            raise ValueError("triton needs CUDA, one query, dims up to 256, a mask for all heads.")
        return _triton().attend(query, prefix, *tail)
    first = partial(query, prefix, scaling, backend)
    if not call.key.shape[2]:
        return first[0]
    second = dense_partial(query, *tail, backend == "reference")
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


def step(query: Tensor, keys: Tensor, values: Tensor, scale: float, added: Mask) -> Tensor:
    """Attention of one query, as the host returns it.

    Args:
        query: [B, Hq, 1, D].
        keys: [B, H, T, D].
        values: [B, H, T, Dv].
        scale: factor of the dot products.
        added: [B, H, 1, T] added to the scores, in the type of the keys; some key is left to see.

    Returns:
        [B, 1, Hq, Dv].
    """
    batch, heads, _, width = query.shape
    # The queries of a KV head's group are rows of one product, so that no key is repeated.
    rows = query.reshape(batch, keys.shape[1], heads // keys.shape[1], width)
    out = _attention(rows, (keys, values), scale, added, sure=True)[0]
    out = out if out.dtype == query.dtype else out.to(query.dtype)
    return out.reshape(batch, 1, heads, out.shape[-1])


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
            found = scores(rows[i, None, None], prefix.keys[part][None, None], scaling)[0, 0]
            out[i] = softmax(found) @ prefix.values[part].float()
            lse[i] = found.logsumexp(dim=-1)
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
    rows: Tensor,
    cache: Pair,
    scaling: float,
    mask: Mask = None,
    plain: bool = False,
    sure: bool = False,
) -> Pair:
    """Rows [n, h, R, D] over keys and values [n, h, T, D]; `mask` is added to the scores.

    `sure` says that every row sees a key under it.
    """
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
        found = scores(rows, keys, scaling)
        found = found if mask is None else found + mask
        lse = found.logsumexp(dim=3)
        out = (found - lse[..., None]).exp_() @ values.float()
    if mask is not None and not sure:
        unseen = (mask == -torch.inf).all(dim=3)
        lse = lse.masked_fill(unseen, -torch.inf)
        out = out.masked_fill(unseen[..., None], 0.0)
    return out, lse


_PARTIAL = {"reference": _reference, "cpu": _cpu, "varlen": ragged_varlen.attend}


def _check(query: Tensor, prefix: Ragged) -> None:
    shape, B, H, D = tuple(query.shape), prefix.batch, prefix.heads, prefix.keys.shape[1]
    if len(shape) != 4 or shape[0] != B or shape[1] % max(H, 1) or shape[3] != D:
        raise ValueError(f"query {shape} does not fit {B} samples, {H} KV heads and keys of {D}.")
