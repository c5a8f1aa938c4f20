"""Attention over a ragged prefix by torch's variable-length attention, on CUDA.

Imports torch alone.
"""

from __future__ import annotations

import inspect
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from vlmprune.runtime.attention.ragged_tokens import Pair, Ragged


def runs(query: Tensor, prefix: Ragged) -> bool:
    """Whether torch's variable-length attention can attend to the prefix; never raises."""
    D, dtype = query.shape[3], query.dtype
    return (
        (query.is_cuda and torch.version.hip is None)
        and dtype in (torch.float16, torch.bfloat16)
        and dtype == prefix.keys.dtype == prefix.values.dtype
        and (prefix.values.shape[1] == D and D % 8 == 0 and D <= 256)
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
        and _has_varlen()
    )


@lru_cache(maxsize=1)
def _has_varlen() -> bool:
    try:
        from torch.nn.attention.varlen import AuxRequest, varlen_attn
    except ImportError:
        return False
    known = inspect.signature(varlen_attn).parameters
    return "lse" in dir(AuxRequest) and {"enable_gqa", "return_aux", "scale"} <= set(known)


def attend(rows: Tensor, prefix: Ragged, scaling: float, count: int) -> Pair:
    """One sequence for each (sample, KV head), of `count` tokens and a head for each query head."""
    from torch.nn.attention.varlen import AuxRequest, varlen_attn

    if not prefix.longest or not rows.numel():
        return nothing(rows, prefix.values)
    (n, R, D), cache = rows.shape, (prefix.keys[:, None], prefix.values[:, None])
    group = R // count
    queries = rows.view(n, group, count, D).transpose(1, 2).reshape(n * count, group, D)
    ends = torch.arange(0, n * count + 1, count, dtype=torch.int32, device=rows.device)
    sizes: Any = (ends, prefix.offsets, count, prefix.longest)
    wanted: dict[str, Any] = {"return_aux": AuxRequest(lse=True), "enable_gqa": True}
    out, lse = varlen_attn(queries, *cache, *sizes, scale=scaling, **wanted)
    out = out.view(n, count, group, D).transpose(1, 2).reshape(n, R, D)
    if not _heads_first(varlen_attn, AuxRequest, rows.device, rows.dtype, D):
        lse = lse.T
    lse = lse.reshape(group, n, count).transpose(0, 1).reshape(n, R)
    if 0 in prefix.lengths:
        # What the kernel leaves there differs between its versions.
        empty = (prefix.offsets.diff() == 0)[:, None]
        out, lse = out.masked_fill(empty[..., None], 0.0), lse.masked_fill(empty, -torch.inf)
    return out, lse


@lru_cache(maxsize=8)
def _heads_first(attn: Any, aux: Any, device: torch.device, dtype: torch.dtype, dim: int) -> bool:
    """Whether the log-sum-exp is [heads, tokens], as torch's code has it, and not as it says."""
    tokens = torch.zeros(2, 1, dim, dtype=dtype, device=device)
    ends = torch.tensor([0, 2], dtype=torch.int32, device=device)
    _, lse = attn(tokens, tokens, tokens, ends, ends, 2, 2, return_aux=aux(lse=True))
    return tuple(lse.shape) == (1, 2)


def nothing(rows: Tensor, values: Tensor) -> Pair:
    """The result over no keys."""
    lse = torch.full(rows.shape[:-1], -torch.inf, device=rows.device)
    return rows.new_zeros(*lse.shape, values.shape[-1]), lse
