"""Attention among some of a prompt's tokens: rows and columns picked out, and results put back.

Pure functions that import torch alone. Samples may pick unequal numbers; the shorter ones are
filled up on the left with copies of their first token, which nobody sees as a key.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmprune.runtime.attention import ragged
from vlmprune.runtime.attention.ragged_tokens import Ragged


@dataclass(frozen=True)
class Picked:
    """Some of the tokens of each sample, in order.

    Attributes:
        index: [B, n] int64.
        real: [B, n] bool; False where a sample has fewer than n.
        even: whether all have n.
    """

    index: Tensor
    real: Tensor
    even: bool

    def of(self, states: Tensor) -> Tensor:
        """The picked ones of [B, H, L, D] states: [B, H, n, D]."""
        _, heads, _, width = states.shape
        return states.gather(2, self.index[:, None, :, None].expand(-1, heads, -1, width))

    def back(self, out: Tensor, length: int) -> Tensor:
        """[B, n, H, D] results at their places among `length` rows; the others are 0."""
        batch, width = out.shape[0], out.shape[1]
        number = torch.arange(width, device=out.device).expand(batch, -1)
        # A place past the end takes what belongs to nobody.
        at = torch.where(self.real, self.index, length)
        place = at.new_full((batch, length + 1), -1).scatter(1, at, number)[:, :length]
        found = out.gather(1, place.clamp(min=0)[..., None, None].expand(-1, -1, *out.shape[2:]))
        return found.masked_fill((place < 0)[..., None, None], 0.0)


def attend(
    plain: Callable[..., Tensor],
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    chosen: Tensor,
    prefix: Ragged | None,
    scale: float,
    flash: bool,
) -> Tensor:
    """Attention of the chosen rows to the chosen columns, and to all of a prefix.

    Args:
        plain: attention without a prefix: (query, keys, values, mask) to [B, Q, Hq, Dv].
        query: [B, Hq, Q, D], of the last Q of the columns.
        keys: [B, H, T, D].
        values: [B, H, T, Dv].
        mask: as Transformers has it: None, [B, columns], or [B or 1, h, Q, columns], bool or
            additive; of which the last T columns are meant.
        chosen: [B, T] bool.
        prefix: what came before, which every chosen row sees.
        scale: factor of the dot products.
        flash: whether `plain` is causal by itself, so that it takes masks of padding alone.

    Returns:
        [B, Q, Hq, Dv]; 0 in rows that were not chosen.
    """
    length, total = query.shape[2], keys.shape[2]
    ahead = total - length
    columns = pick(chosen)
    rows = pick(chosen[:, ahead:]) if ahead else columns
    mask = None if mask is None else mask[..., mask.shape[-1] - total :]
    few = rows.of(query), columns.of(keys), columns.of(values)
    if prefix is not None:
        seen = mask_among(mask, rows, columns, ahead)
        out = ragged.attend(few[0], prefix, *few[1:], seen, scale).transpose(1, 2)
    else:
        out = plain(*few, plain_mask(mask, rows, columns, ahead, flash, query.dtype))
    return rows.back(out, length)


def pick(chosen: Tensor) -> Picked:
    """What [B, L] bool says, in order; waits for the device once, for the largest number."""
    counts = chosen.sum(dim=1)
    most, least = torch.stack((counts.amax(), counts.amin())).tolist()
    order = chosen.long().argsort(dim=1, stable=True)[:, chosen.shape[1] - most :]
    missing = (most - counts)[:, None]
    real = torch.arange(most, device=chosen.device) >= missing
    first = order.gather(1, missing.clamp(max=max(most - 1, 0)))
    return Picked(torch.where(real, order, first), real, most == least)


def mask_among(mask: Tensor | None, rows: Picked, columns: Picked, ahead: int) -> Tensor:
    """What each picked row sees of the picked columns.

    Args:
        mask: None (all earlier columns), [B, T] of which 0 is padding (the same among what is no
            padding), or [B or 1, h, Q, T], bool or additive.
        rows: of the Q rows, n.
        columns: of the T columns, m.
        ahead: number of columns before the first row's own.

    Returns:
        [B, h, n, m], bool or, where the mask is, additive.
    """
    real = columns.real[:, None, None]
    if mask is None or mask.ndim == 2:
        seen = columns.index[:, None, None] <= rows.index[:, None, :, None] + ahead
        if mask is not None:
            real = real & mask.bool().gather(1, columns.index)[:, None, None]
        return seen & real
    sample = torch.arange(mask.shape[0], device=mask.device)[:, None, None]
    found = mask[sample, :, rows.index[:, :, None], columns.index[:, None]].permute(0, 3, 1, 2)
    if found.dtype == torch.bool:
        return found & real
    return found if columns.even else found.masked_fill(~real, torch.finfo(found.dtype).min)


def plain_mask(
    mask: Tensor | None, rows: Picked, columns: Picked, ahead: int, flash: bool, dtype: torch.dtype
) -> Tensor | None:
    """The same in the form in which Transformers would hand it to its attention function."""
    if mask is not None and mask.ndim == 4:
        return mask_among(mask, rows, columns, ahead)
    if mask is not None:
        return mask.bool().gather(1, columns.index) & columns.real
    if columns.even and (flash or not ahead):
        return None
    if flash:
        return columns.real
    seen = mask_among(None, rows, columns, ahead)
    return torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
