"""What all layers of one prompt need alike as their caches are cut, worked out once.

Nothing here waits for a device but `Facts`, once a prompt, before any layer runs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vlmprune.runtime.decoder.prompt_end import PromptEnd, repeated


@dataclass(frozen=True)
class Facts:
    """What is known of a prompt without asking a device again.

    Attributes:
        whole: whether no column is padding.
        ends: whether the last `window` columns are real in every sample.
        text: for each sample, its real columns that are not visual tokens.
        visual: for each sample, its visual tokens.
        even: whether every sample has as many visual tokens.
        one_image: whether every sample has a single image, all of as many visual tokens.
    """

    whole: bool
    ends: bool
    text: list[int]
    visual: list[int]
    even: bool
    one_image: bool

    @classmethod
    def of(cls, prompt: PromptEnd, lengths: list[list[int]], window: int) -> Facts:
        """Those of a prompt, given its images' visual tokens; waits for the device once."""
        mask, visual = prompt.mask, prompt.visual
        rows = torch.stack(
            (
                mask.all(dim=1),
                mask[:, -window:].all(dim=1) & (mask.shape[1] >= window),
                (mask & ~visual).sum(dim=1),
            )
        )
        whole, ends, text = rows.tolist()
        own = [sum(row) for row in lengths]
        even = len({*own}) == 1
        one = even and own[0] > 0 and all(len(row) == 1 for row in lengths)
        return cls(all(whole), all(ends), text, own, even, one)


@dataclass(frozen=True, eq=False)
class Behind:
    """What `LayerView` has of several layers, the samples of each behind those of the former.

    Attributes:
        images: [n · B, V] int64, as in `LayerView`.
        counts: [n · B, I] int64 likewise.
        others: [n · B] int64; as in `Alike`.
        notes: what a method keeps of so many layers for the next as many.
    """

    images: Tensor
    counts: Tensor
    others: Tensor
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Alike:
    """What layers of one prompt need alike whose caches begin at the same column.

    B is the batch of the forward, T the columns from `start` on.

    Attributes:
        start: the column at which the layers' dense parts begin.
        rows: [B, w] int64; which of the forward's rows are the window's, newest first; None where
            they are its last ones, one after the other.
        there: [B, w] bool; False where a sample has fewer, or had them earlier; None where all are.
        counted: [B, 1, 1] int64; how many are there; None where all are.
        sees: [B, w, T] bool; the columns that each of them sees; None where it is all.
        index: [B, Hq, V] int64; columns of the visual tokens behind `start`, for every query head.
        fewer: [B, 1, V] bool; places beyond a sample's visual tokens; None where there are none.
        images: [B, V] int64, as in `LayerView`.
        counts: [B, I] int64 likewise.
        others: [B] int64; real columns behind `start` that stay whatever is chosen.
        stays: [B, H, T] bool; the same columns, and one more where `fewer` says so.
        at: [B, H, V] int64; where each visual token stands in `stays`, the one more where it is
            none.
        made: what `layers` made.
    """

    start: int
    rows: Tensor | None
    there: Tensor | None
    counted: Tensor | None
    sees: Tensor | None
    index: Tensor
    fewer: Tensor | None
    images: Tensor
    counts: Tensor
    others: Tensor
    stays: Tensor
    at: Tensor
    made: dict[int, Behind] = field(default_factory=dict)

    def layers(self, count: int) -> Behind:
        """What so many layers together need."""
        found = self.made.get(count)
        if found is None:
            parts = self.images, self.counts, self.others
            images, counts, others = (
                one if count == 1 else one.repeat(count, *[1] * (one.ndim - 1)) for one in parts
            )
            found = self.made[count] = Behind(images, counts, others)
        return found

    def staying(self, kept: Tensor, count: int = 1) -> Tensor:
        """[n · B, H, T] bool: all columns that stay of so many layers.

        Args:
            kept: [n · B, H, V] bool; those of visual tokens.
            count: n.
        """
        stays, at = (one.expand(count, *one.shape) for one in (self.stays, self.at))
        found = stays.scatter(3, at, kept.unflatten(0, (count, -1))).flatten(0, 1)
        return found if self.fewer is None else found[:, :, :-1]

    @classmethod
    def of(
        cls,
        prompt: PromptEnd,
        facts: Facts,
        window: Tensor,
        shape: tuple[int, int, int],
        start: int,
        times: int,
        device: torch.device,
    ) -> Alike:
        """What layers need that get so many rows.

        Args:
            prompt: the prompt.
            facts: of it.
            window: [b, w] int64 columns of the window, newest first, -1 where a sample has fewer.
            shape: query heads of this process, KV heads of it, and rows of the forward.
            start: as above.
            times: how often each sample of the prompt stands in the forward.
            device: of the layers.
        """
        (heads, own, rows), width = shape, window.shape[1]
        mask, visual = (repeated(one, times).to(device) for one in (prompt.mask, prompt.visual))
        images, counts, places, columns = (
            repeated(one, times).to(device)
            for one in (prompt.images, prompt.counts, prompt.places, window)
        )
        real = mask[:, start:]
        stays = real & ~visual[:, start:]
        plain = facts.ends and width <= rows
        at = columns - (prompt.columns - rows)
        there = None if plain else at >= 0
        sees = None
        if not facts.whole or width > 1 or there is not None:
            reach = (columns - start)[..., None]
            sees = (torch.arange(real.shape[1], device=device) <= reach) & real[:, None]
        index = places - start
        fewer = None if facts.even else images < 0
        slots, among = index, stays
        if fewer is not None:
            slots = torch.where(fewer, real.shape[1], index)
            among = torch.cat((stays, torch.zeros_like(stays[:, :1])), dim=1)
        return cls(
            start,
            None if plain else at.clamp(min=0),
            there,
            None if there is None else there.sum(dim=1).clamp(min=1)[:, None, None],
            sees,
            index.clamp(min=0)[:, None].expand(-1, heads, -1),
            None if fewer is None else fewer[:, None],
            images,
            counts,
            stays.sum(dim=1),
            among[:, None].expand(-1, own, -1).contiguous(),
            slots[:, None].expand(-1, own, -1),
        )
