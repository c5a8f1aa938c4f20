"""A shorter but otherwise ordinary request: drop columns of a prompt, keep the rest exact.

Nothing in the decoder is changed. Ids, mask, positions and labels are gathered with the same
keep mask, so that cache lengths and mask growth come out right by themselves. For a later turn,
`Prefix` remembers what a cache was filled with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from vlmprune.hosts.requests import ALIGNED
from vlmprune.runtime.geometry import Span


@dataclass(frozen=True)
class Prompt:
    """Columns of a batch of prompts.

    Attributes:
        ids: [B, L] token ids.
        mask: [B, L], 0 where a column is padding.
        positions: [B, L] position of each column, or [3, B, L] where the model has three
            (temporal, height, width).
        aligned: further [B, L] inputs by name (labels, token types).
    """

    ids: Tensor
    mask: Tensor
    positions: Tensor
    aligned: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Prefix:
    """What a cache holds: remembered with it, so that a later turn fits.

    Attributes:
        full_ids: [B, P] the prompt as the user knows it; -1 where it is not known.
        prompt: the [B, S] prompt that the cache was filled with.
        next_position: [B] position of the column after it.
        items: number of items of each modality in it.
        shift: [B] how much lower its positions are than the user counts them.
        refusal: if not None, why the cache cannot be continued.
    """

    full_ids: Tensor
    prompt: Prompt
    next_position: Tensor
    items: tuple[int, ...]
    shift: Tensor
    refusal: str | None = None

    def repeat(self, times: int) -> Prefix:
        """The prefix of a cache whose rows were each repeated."""
        if times == 1:
            return self

        def rows(tensor: Tensor) -> Tensor:
            return tensor.repeat_interleave(times, 0)

        short = self.prompt
        return Prefix(
            rows(self.full_ids),
            Prompt(
                rows(short.ids),
                rows(short.mask),
                short.positions.repeat_interleave(times, short.positions.ndim - 2),
            ),
            rows(self.next_position),
            self.items,
            rows(self.shift),
            self.refusal,
        )


def shorten(
    prompt: Prompt,
    dropped: Tensor,
    positions: Literal["compact", "original"],
    pad_id: int,
) -> tuple[Prompt, Tensor]:
    """Take columns out of a prompt and pad the rows to equal length again.

    Padding stays on its side (right if any row ends in padding, else left); a row's own padding
    is used first. Padding common to all rows stays, so that dropping nothing changes nothing.

    Args:
        prompt: [B, L] columns.
        dropped: [B, L] bool, columns to take out.
        positions: "original" keeps each column's position, "compact" renumbers.
        pad_id: token id of added padding.

    Returns:
        The [B, S] prompt, and the [B] position that follows each row.
    """
    real = prompt.mask != 0
    before = dropped.long().cumsum(dim=1)
    following = latest(prompt) + 1
    moved = prompt.positions
    if positions == "compact":
        moved = moved - before
        following = following - before[:, -1]
    common = int((~real).sum(dim=1).min())
    length = int((real & ~dropped).sum(dim=1).max()) + common

    right = bool((~real[:, -1]).any())
    rank = torch.where(real & ~dropped, 2, 1).masked_fill(dropped, 0)
    order = rank.sort(dim=1, descending=right, stable=True).indices
    order = order[:, :length] if right else order[:, order.shape[1] - length :]
    added = dropped.gather(1, order)
    aligned = dict(prompt.aligned)
    if "labels" in aligned and not right:
        # A row's first column has no predecessor, so nothing predicts it; padding that comes to
        # stand before it must not begin to.
        aligned["labels"] = aligned["labels"].clone()
        aligned["labels"][:, 0] = ALIGNED["labels"]

    def take(values: Tensor, padding: int) -> Tensor:
        return values.gather(-1, order.expand(*values.shape[:-1], -1)).masked_fill(added, padding)

    short = Prompt(
        take(prompt.ids, pad_id),
        take(prompt.mask, 0),
        take(moved, 0),
        {name: take(values, ALIGNED[name]) for name, values in aligned.items()},
    )
    return short, following


def stands_for(prompt: Prompt, dropped: Tensor) -> Tensor | None:
    """Which column of the shortened prompt stands for each column of the prompt.

    A kept column's own, and for a dropped one that of the kept column before it, which foretells
    the same; the row's first where nothing stands before it.

    Args:
        prompt: [B, L] columns.
        dropped: [B, L] bool, columns that `shorten` takes out.

    Returns:
        [B, L] int64, or None where nothing was dropped.
    """
    if not bool(dropped.any()):
        return None
    kept = (prompt.mask != 0) & ~dropped
    number, counts = kept.cumsum(dim=1) - 1, kept.sum(dim=1, keepdim=True)
    length = int(counts.max()) + int((prompt.mask == 0).sum(dim=1).min())
    right = bool((prompt.mask[:, -1] == 0).any())
    return number.clamp(min=0) + (0 if right else length - counts)


def dropped_columns(like: Tensor, places: Sequence[Span], kept: Sequence[Tensor]) -> Tensor:
    """Columns that hold a visual token which was not kept.

    Args:
        like: [B, L] anything of the prompt's shape.
        places: one an item.
        kept: for each item a [n] bool over its visual tokens.

    Returns:
        [B, L] bool.
    """
    dropped = torch.zeros_like(like, dtype=torch.bool)
    for span, stays in zip(places, kept, strict=True):
        dropped[span.row, span.columns] = ~stays.to(like.device)
    return dropped


def latest(prompt: Prompt) -> Tensor:
    """[B] the largest position of each row, in any dimension; -1 for a row of padding."""
    highest = prompt.positions.masked_fill(prompt.mask == 0, -1).amax(dim=-1)
    return highest if highest.ndim == 1 else highest.amax(dim=0)


def join(first: Prompt, second: Prompt) -> Prompt:
    """Two prompts one after the other; the first's aligned inputs are not needed any more."""
    return Prompt(
        torch.cat((first.ids, second.ids), dim=1),
        torch.cat((first.mask, second.mask), dim=1),
        torch.cat((first.positions, second.positions), dim=-1),
        dict(second.aligned),
    )
