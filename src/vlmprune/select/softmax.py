"""Attention of a few queries, written out in float32: the scores and their softmax.

Imports torch alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlmprune.select.precision import unrounded

# Numbers of keys that are made float32 at once, so that copies of half precision stay small.
_AT_ONCE = 2**24


def scores(rows: Tensor, keys: Tensor, scale: float, softcap: float | None = None) -> Tensor:
    """The products of queries and keys, scaled and capped.

    Args:
        rows: [B, H, n, D] queries.
        keys: [B, H', C, D], H' a divisor of H.
        scale: factor of the products.
        softcap: cap of the scores, where the model has one.

    Returns:
        [B, H, n, C] float32.
    """
    batch, heads, columns, width = keys.shape
    # The queries of a KV head's group are rows of one product, so that no key is repeated.
    grouped = _single(rows.reshape(batch, heads, -1, width))
    part = max(256, _AT_ONCE // max(1, batch * heads * width))
    with unrounded(rows):
        if columns <= part:
            found = grouped @ _single(keys).transpose(2, 3)
        else:
            parts = [grouped @ _single(some).transpose(2, 3) for some in keys.split(part, dim=2)]
            found = torch.cat(parts, dim=-1)
    found = found * scale
    if softcap is not None:
        found = (found / softcap).tanh() * softcap
    return found.view(*rows.shape[:3], columns)


def _single(states: Tensor) -> Tensor:
    """In float32; without a step where they are."""
    return states if states.dtype == torch.float32 else states.float()


def softmax(found: Tensor, seen: Tensor | None = None, beside: Tensor | None = None) -> Tensor:
    """The weights that scores make.

    Args:
        found: [B, H, n, C] float32.
        seen: bool, of a shape that fits; False where a query does not see a key. None for all.
        beside: [B, H, n] log of the sum of exponentials of what each query sees besides.

    Returns:
        [B, H, n, C] float32; 0 in rows that see nothing. What is not a number stays so.
    """
    if seen is not None:
        found = found.masked_fill(~seen, -torch.inf)
    if beside is None:
        weights = found.softmax(dim=-1)
        if seen is None:
            return weights
        return weights.masked_fill(~seen.any(dim=-1, keepdim=True), 0.0)
    total = torch.logaddexp(found.logsumexp(dim=-1), beside)[..., None]
    return (found - total).exp().masked_fill(total.isneginf(), 0.0)
