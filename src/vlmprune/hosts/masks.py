"""Attention masks of Transformers: what they say, whatever their form.

A mask is None, where nothing is hidden but what comes later in a causal call; [B, C] of which 0 is
padding; or [B or 1, 1 or H, Q or 1, C], bool (True is seen) or added to the scores, when it hides
by its type's least number. Nobody else tells these apart.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlmprune.errors import VlmpruneError
from vlmprune.select.softmax import softmax


def readable(mask: Any, what: str) -> Tensor | None:
    """The mask, if it is of a form that is known.

    Args:
        mask: what a host gives its attention.
        what: what it is to be used with, in words.

    Raises:
        VlmpruneError: it is of another kind, such as flex attention's.
    """
    if mask is None or (isinstance(mask, Tensor) and mask.ndim in (2, 4)):
        return mask
    raise VlmpruneError(
        f"attention masks of {type(mask).__name__} cannot be used with {what}; load the model "
        "with attn_implementation='sdpa'."
    )


def visible(mask: Tensor) -> Tensor:
    """A mask as bool, True where it lets see; of the same shape."""
    if mask.dtype == torch.bool:
        return mask
    return mask != 0 if mask.ndim == 2 else mask > torch.finfo(mask.dtype).min / 2


def real(mask: Tensor) -> Tensor:
    """[B or 1, C] bool; the keys that any query sees, all others being padding."""
    seen = visible(mask)
    return seen if mask.ndim == 2 else seen.flatten(1, 2).any(dim=1)


def added(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to scores to hide what is not seen."""
    return torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)


def hidden(mask: Tensor, seen: Tensor) -> Tensor:
    """A mask of four dimensions that hides more; `seen` is bool, of a shape that fits."""
    if mask.dtype == torch.bool:
        return mask & seen
    return mask.masked_fill(~seen, torch.finfo(mask.dtype).min)


def last(mask: Tensor | None, columns: int) -> Tensor | None:
    """What a mask says of the last columns."""
    return None if mask is None else mask[..., mask.shape[-1] - columns :]


def lines(
    mask: Tensor | None, rows: Tensor | None, columns: int | Tensor, ahead: int | None
) -> Tensor:
    """What some queries see of some keys.

    Args:
        mask: as above. Of more columns than keys the padding at the left counts in two dimensions,
            and room at the right in four.
        rows: [B or 1, n] int64 numbers of queries; None for all, of a mask of four dimensions.
        columns: how many keys there are, all of which are meant; or [B or 1, m] int64, some of
            the mask's own columns.
        ahead: keys before the first query's own, which sees no later ones; None where all see all.
            A mask of four dimensions says so itself.

    Returns:
        [B or 1, 1 or H, n, m], bool or, where the mask is, additive.
    """
    if mask is not None and mask.ndim == 4:
        found = mask
        if rows is not None:
            # One line may be that of all queries.
            at = rows.to(mask.device).clamp(max=mask.shape[2] - 1)[:, None, :, None]
            found = mask.expand(max(len(mask), len(rows)), -1, -1, -1)
            at = at.expand(len(found), mask.shape[1], -1, mask.shape[3])
            found = found.gather(2, at)
        if isinstance(columns, int):
            return found[..., :columns]
        found = found.expand(len(columns), -1, -1, -1)
        at = columns.to(mask.device)[:, None, None]
        return found.gather(3, at.expand(-1, found.shape[1], found.shape[2], -1))
    assert rows is not None
    if isinstance(columns, int):
        at = torch.arange(columns, device=rows.device)[None]
        real = None if mask is None else visible(mask)[:, mask.shape[1] - columns :]
    else:
        at = columns
        real = None if mask is None else visible(mask).gather(1, columns)
    if ahead is None:
        seen = torch.ones(1, 1, rows.shape[1], at.shape[1], dtype=torch.bool, device=rows.device)
    else:
        seen = at[:, None, None] <= rows[:, None, :, None] + ahead
    return seen if real is None else seen & real[:, None, None]


def spread(mask: Tensor | None, queries: int, columns: int, device: torch.device) -> Tensor | None:
    """What each query of a causal call sees of the last keys, the last of which are its own.

    Args:
        mask: as above.
        queries: number Q of queries.
        columns: number T of keys.
        device: of the queries.

    Returns:
        [B or 1, 1 or H, Q or 1, T], bool or additive; None where all see all.
    """
    mask = last(mask, columns)
    if mask is None and queries == 1:
        return None
    if mask is not None and (mask.ndim == 4 or queries == 1):
        return mask if mask.ndim == 4 else visible(mask)[:, None, None]
    return lines(mask, torch.arange(queries, device=device)[None], columns, columns - queries)


def seeing(mask: Tensor | None, queries: int, columns: int, causal: bool) -> Tensor | None:
    """[B or 1, Q or 1] bool; which queries see a key, told without a line for each; None for all.

    Args:
        mask: as above.
        queries: number of queries.
        columns: number of keys.
        causal: whether none sees later keys.
    """
    if mask is None:
        return None
    if mask.ndim == 4:
        return visible(mask[..., :columns]).any(dim=-1).any(dim=1)
    real = visible(mask)[:, mask.shape[1] - columns :]
    if not causal:
        return real.any(dim=1, keepdim=True)
    return real.long().cumsum(dim=1)[:, columns - queries :] > 0


def weights(scores: Tensor, mask: Tensor | None, beside: Tensor | None = None) -> Tensor:
    """Attention by scores under a mask.

    Args:
        scores: [B, H, n, C] float32, as `select.softmax.scores` makes them.
        mask: None for nothing hidden, or what `lines` returns.
        beside: as in `select.softmax.softmax`.

    Returns:
        [B, H, n, C] float32; 0 in rows that see nothing.
    """
    if mask is None:
        return softmax(scores, None, beside)
    if mask.dtype != torch.bool:
        scores = scores + mask.float()
    return softmax(scores, visible(mask), beside)
