"""Rows of a batch of sequences between two decoder layers: which ones go on, in which order.

Of this package it imports `hosts.masks` alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vlmprune.hosts import masks


@dataclass(frozen=True)
class Going:
    """The rows of a forward that reach a layer, padded on the left to equal number.

    Columns are counted from the forward's first.

    Attributes:
        source: [B, R] int64; the column whose row it is.
        slot: [B, R] int64, ascending; the column that it stands at. It differs from `source` only
            where a method put rows behind others.
        real: [B, R] bool; False where a sample has fewer.
        counts: real rows of each sample.
        flat: [n] int64; places b · L + source of the real rows in the full states.
        taken: [n] int64; their places b · R + row among the rows.
    """

    source: Tensor
    slot: Tensor
    real: Tensor
    counts: list[int]
    flat: Tensor
    taken: Tensor

    @property
    def padded(self) -> bool:
        """Whether any sample has fewer rows than others."""
        return min(self.counts) < max(self.counts)

    def scatter(self, full: Tensor, hidden: Tensor) -> Tensor:
        """Full-length states [B, L, D] with those of the rows [B, R, D] in their places."""
        out = full.flatten(0, 1)
        rows = hidden.flatten(0, 1)[self.taken.to(hidden.device)]
        return out.index_copy(0, self.flat.to(hidden.device), rows).view(full.shape)

    def moved(self, rows: Tensor, length: int) -> Going:
        """The same places with other rows in them.

        Args:
            rows: [B, R] the row that comes to each place.
            length: columns of the forward.
        """
        source = self.source.gather(1, rows)
        batch = torch.arange(len(source), device=source.device)[:, None]
        flat = (batch * length + source).flatten()[self.taken]
        return replace(self, source=source, flat=flat)


def pack(source: Tensor, slot: Tensor, kept: Tensor, length: int) -> tuple[Going, Tensor]:
    """The rows that go on, the padding first.

    Args:
        source: [B, R] as in `Going`.
        slot: [B, R] likewise.
        kept: [B, R] bool.
        length: columns of the forward.

    Returns:
        The rows, and [B, R'] the place of each among those before.
    """
    counts = [int(n) for n in kept.sum(dim=1).tolist()]
    longest = max(1, *counts)
    order = kept.long().sort(dim=1, stable=True).indices[:, kept.shape[1] - longest :]
    real = kept.gather(1, order)
    batch = torch.arange(len(counts), device=source.device)[:, None]
    source, slot = source.gather(1, order), slot.gather(1, order)
    taken = real.flatten().nonzero()[:, 0]
    flat = (batch * length + source).flatten()[taken]
    return Going(source, slot, real, counts, flat, taken), order


def behind(images: Tensor, last: Tensor) -> Tensor:
    """Put rows behind the others of their image, which keeps its places.

    Args:
        images: [B, R] image of each row, -1 for text.
        last: [B, R] bool.

    Returns:
        [B, R] int64; the row that comes to each place.
    """
    places = images.argsort(dim=1, stable=True)
    rows = (images * 2 + (last & (images >= 0))).argsort(dim=1, stable=True)
    return torch.empty_like(places).scatter_(1, places, rows)


def gather_rows(states: Tensor, rows: Tensor) -> Tensor:
    """[B, n, D] of [B, R, D]."""
    rows = rows.to(states.device)
    return states.gather(1, rows[..., None].expand(-1, -1, states.shape[2]))


def gather_angles(angles: Tensor, rows: Tensor) -> Tensor:
    """Rotary angles [..., B or 1, R, D] of some rows [B, n]."""
    if angles.ndim == 2:
        angles = angles[None]
    rows = rows.to(angles.device)
    lead = angles.shape[:-3]
    angles = angles.expand(*lead, len(rows), *angles.shape[-2:])
    index = rows[..., None].expand(*lead, *rows.shape, angles.shape[-1])
    return angles.gather(-2, index)


def visual_places(visual: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """[B, longest] places of the True entries in order, and whether there is one."""
    order = visual.long().sort(dim=1, descending=True, stable=True).indices[:, :longest]
    return order, visual.gather(1, order)


def rows_mask(
    mask: Tensor | None,
    rows: Tensor,
    columns: Tensor,
    start: int,
    length: int,
    real: Tensor | None,
    padded: bool,
    flat: bool,
) -> Tensor | None:
    """What the rows of a layer see of the columns that it stores, from the host's own mask.

    Args:
        mask: the host's, as `hosts.masks` reads it, over the last T columns.
        rows: [B, R] int64; where each row stands among the forward's columns.
        columns: [B, C] int64; the column of each stored one, the rows' own last; -1 for padding.
        start: columns before the forward's first.
        length: columns of the forward.
        real: [B, R] bool; None where all are.
        padded: whether `columns` may contain -1.
        flat: whether masks of two dimensions are wanted where the host gave none.

    Returns:
        A mask of the same kind as the host's; None stays where nothing is padded.
    """
    device = columns.device if mask is None else mask.device
    rows, columns = rows.to(device), columns.to(device)
    real = None if real is None else real.to(device)
    if mask is None and not padded:
        return None
    if mask is None and flat:
        return columns >= 0
    # A mask says something of the last columns only.
    index = columns if mask is None else columns - (start + length - mask.shape[-1])
    seen, index = (columns >= 0) & (index >= 0), index.clamp(min=0)
    if mask is not None and mask.ndim == 2:
        return masks.visible(mask).expand(len(columns), -1).gather(1, index) & seen
    some = mask is None or rows.shape[1] < length or real is not None
    out = masks.lines(mask, rows if some else None, index, start)
    out = masks.hidden(out, seen[:, None, None])
    if real is None:
        return out
    # A padding row sees itself, for attention to nothing is not a number.
    count = columns.shape[1]
    at = torch.arange(count, device=device)
    own = at == (torch.arange(rows.shape[1], device=device) + count - rows.shape[1])[:, None]
    alone = own if out.dtype == torch.bool else masks.added(own, out.dtype)
    return torch.where(real[:, None, :, None], out, alone)


def image_counts(images: Tensor, count: int) -> Tensor:
    """[B, count] how many of [B, n] there are of each image; -1 counts for none."""
    out = torch.zeros(len(images), count + 1, dtype=torch.long, device=images.device)
    out.scatter_add_(1, images + 1, torch.ones_like(images))
    return out[:, 1:]
