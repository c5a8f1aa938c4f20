"""Attention among some of a prompt's tokens: rows and columns picked out, and results put back.

Samples may pick unequal numbers; the shorter ones are filled up on the left with copies of their
first token, which nobody sees as a key.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vlmprune.hosts import masks
from vlmprune.hosts.attention import AttentionCall
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
    proceed: Callable[[AttentionCall], Any],
    call: AttentionCall,
    chosen: Tensor,
    prefix: Ragged | None,
) -> Tensor:
    """Attention of the chosen rows to the chosen columns, and to all of a prefix.

    Args:
        proceed: makes the call without a prefix.
        call: on the T columns behind the prefix, with Transformers' mask of these or of more, of
            which the last T are meant.
        chosen: [B, T] bool.
        prefix: what came before, which every chosen row sees.

    Returns:
        [B, Q, Hq, Dv]; 0 in rows that were not chosen.
    """
    length, ahead = call.query.shape[2], call.ahead
    columns = pick(chosen)
    rows = pick(chosen[:, ahead:]) if ahead else columns
    mask = masks.last(call.mask, call.key.shape[2])
    # Positions of all rows would not fit, and gaps in them look like packed sequences.
    few = replace(
        call.without_positions(),
        query=rows.of(call.query),
        key=columns.of(call.key),
        value=columns.of(call.value),
        mask=None,
    )
    if prefix is not None:
        few = replace(few, mask=mask_among(mask, rows, columns, ahead))
        return rows.back(ragged.attend(few, prefix).transpose(1, 2), length)
    few = replace(few, mask=_plain_mask(mask, rows, columns, ahead, call))
    return rows.back(proceed(few)[0], length)


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
        mask: as `hosts.masks` reads it, of the T columns.
        rows: of the Q rows, n.
        columns: of the T columns, m.
        ahead: number of columns before the first row's own.

    Returns:
        [B, h, n, m], bool or, where the mask is, additive.
    """
    found = masks.lines(mask, rows.index, columns.index, ahead)
    return found if columns.even else masks.hidden(found, columns.real[:, None, None])


def _plain_mask(
    mask: Tensor | None, rows: Picked, columns: Picked, ahead: int, call: AttentionCall
) -> Tensor | None:
    """The same in the form in which Transformers would hand it to its attention function."""
    if mask is not None and mask.ndim == 4:
        return mask_among(mask, rows, columns, ahead)
    if mask is not None:
        return masks.visible(mask).gather(1, columns.index) & columns.real
    if columns.even and (call.flash or not ahead):
        return None
    if call.flash:
        return columns.real
    return masks.added(mask_among(None, rows, columns, ahead), call.query.dtype)
