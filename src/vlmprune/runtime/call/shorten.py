"""A shorter but otherwise ordinary request: drop columns of a prompt, keep the rest exact.

Nothing in the decoder is changed. Ids, mask, positions and labels are gathered with the same
keep mask, so that cache lengths and mask growth come out right by themselves. For a later turn,
`Prefix` remembers what a cache was filled with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn

from vlmprune.hosts.requests import ALIGNED, LABELS, SHIFTED
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
        whole: whether it holds all columns, so that a model without a pruner can go on as well.
        answer: [B, A] what was generated behind it; placeholders in it stand for no image.
    """

    full_ids: Tensor
    prompt: Prompt
    next_position: Tensor
    items: tuple[int, ...]
    shift: Tensor
    refusal: str | None = None
    whole: bool = True
    answer: Tensor | None = None

    def answered(self, ids: Tensor, known: int) -> Tensor:
        """[B, L] bool; the new columns that the model generated in the turn before.

        The last token of an answer is in no cache, nor are those that were cropped away since.

        Args:
            ids: [B, L] the new columns.
            known: columns before them.
        """
        found = torch.zeros_like(ids, dtype=torch.bool)
        if self.answer is not None:
            left = self.answer[:, known - self.full_ids.shape[1] :].to(ids.device)
            width = min(left.shape[1], ids.shape[1])
            found[:, :width] = (left[:, :width] == ids[:, :width]).cumprod(dim=1) != 0
        return found

    def repeat(self, times: int) -> Prefix:
        """The prefix of a cache whose rows were each repeated."""
        if times == 1:
            return self

        rows = torch.arange(len(self.full_ids), device=self.full_ids.device)
        return self.select(rows.repeat_interleave(times))

    def select(self, rows: Tensor) -> Prefix:
        """The prefix of a cache of which the samples `rows` were taken, in their order."""

        def taken(tensor: Tensor, dim: int = 0) -> Tensor:
            return tensor.index_select(dim, rows.to(tensor.device))

        short = self.prompt
        return replace(
            self,
            full_ids=taken(self.full_ids),
            prompt=Prompt(
                taken(short.ids),
                taken(short.mask),
                taken(short.positions, short.positions.ndim - 2),
            ),
            next_position=taken(self.next_position),
            shift=taken(self.shift),
            answer=None if self.answer is None else taken(self.answer),
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
    if not bool(dropped.any()):
        # Not even padding between real columns, as a later turn of a batch may have it, moves.
        return prompt, following
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
    # A row's first column has no predecessor, so nothing predicts it; padding that comes to stand
    # before it must not begin to.
    unpredicted = nn.functional.pad(added[:, :-1], (1, 0))

    def take(values: Tensor, padding: int) -> Tensor:
        return values.gather(-1, order.expand(*values.shape[:-1], -1)).masked_fill(added, padding)

    aligned = dict(prompt.aligned)
    if SHIFTED in aligned:
        aligned[SHIFTED] = unshifted(aligned[SHIFTED])
    aligned = {name: take(values, ALIGNED[name]) for name, values in aligned.items()}
    for name in aligned.keys() & {LABELS, SHIFTED}:
        aligned[name] = aligned[name].masked_fill(unpredicted, ALIGNED[name])
    if SHIFTED in aligned:
        aligned[SHIFTED] = _shifted(aligned[SHIFTED], ~added, prompt.aligned[SHIFTED][:, -1])
    short = Prompt(take(prompt.ids, pad_id), take(prompt.mask, 0), take(moved, 0), aligned)
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


def silent_columns(prompt: Prompt, dropped: Tensor) -> Tensor:
    """Columns that foretell nothing: dropped ones that no kept one follows, or that follow none.

    The last dropped column before one that is left foretells it, as the kept one before does.

    Args:
        prompt: [B, L] columns.
        dropped: [B, L] bool, columns that `shorten` takes out.

    Returns:
        [B, L] bool.
    """
    kept = (prompt.mask != 0) & ~dropped
    followed = nn.functional.pad(~dropped[:, 1:], (0, 1), value=True)
    return dropped & ~(followed & (kept.cumsum(dim=1) > 0))


def unshifted(values: Tensor) -> Tensor:
    """[B, L] labels of the columns, from those that each column predicts.

    The last is of a column behind these, and is not among them.
    """
    return nn.functional.pad(values[:, :-1], (1, 0), value=ALIGNED[LABELS])


def _shifted(labels: Tensor, own: Tensor, behind: Tensor) -> Tensor:
    """[B, S] what each column predicts: the label of the next one that is left.

    Args:
        labels: [B, S] of the columns.
        own: [B, S] bool; columns that were there before, not added padding.
        behind: [B] what the last column predicted.
    """
    moved = nn.functional.pad(labels[:, 1:], (0, 1), value=ALIGNED[LABELS])
    last = own.shape[1] - 1 - own.flip(1).int().argmax(dim=1)
    return moved.scatter(1, last[:, None], behind[:, None])


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
    stays = [one.to(like.device) for one in kept]
    if stays:
        sizes = torch.tensor([len(one) for one in stays], device=like.device)
        rows = torch.tensor([span.row for span in places], device=like.device)
        total = sum(len(one) for one in stays)
        at = rows.repeat_interleave(sizes, output_size=total)
        columns = torch.cat([span.columns.to(like.device) for span in places])
        dropped[at, columns] = ~torch.cat(stays)
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
