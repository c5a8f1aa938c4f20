"""Where the images and videos of a request lie, in it and in themselves, whole and pruned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from vlmprune.errors import VlmpruneError
from vlmprune.hosts.families.media import Medium
from vlmprune.views.layout import Layout


@dataclass(frozen=True)
class Span:
    """Where an item's visual tokens lie in a prompt.

    Attributes:
        row: row of the batch.
        columns: [n] int64 columns, ascending.
        first: the first of them; 0 where there is none.
    """

    row: int
    columns: Tensor
    first: int = 0

    @property
    def order(self) -> tuple[int, int]:
        """Sorts spans as the prompt has them."""
        return self.row, self.first


@dataclass(frozen=True)
class Item:
    """One image or video of a request.

    Attributes:
        medium: its modality, as a place in the family's `media`.
        number: its place among the items of that modality.
        layout: where its visual tokens lie within it.
        span: where they lie in the prompt.
    """

    medium: int
    number: int
    layout: Layout
    span: Span


@dataclass(frozen=True)
class Geometry:
    """The geometry of a request's items, in prompt order, known before any is encoded."""

    items: tuple[Item, ...] = ()

    @property
    def layouts(self) -> list[Layout]:
        """One an item."""
        return [item.layout for item in self.items]

    @property
    def lengths(self) -> list[int]:
        """Visual tokens of each item, as the language model would see them."""
        return [len(item.layout.labels) for item in self.items]

    @property
    def cells(self) -> int:
        """Cells of the largest crop."""
        return max((item.layout.patches for item in self.items), default=0)

    @property
    def candidates(self) -> Tensor:
        """[crops, cells] bool over all items; False where a crop has fewer cells."""
        # Images of a request often share a layout.
        found = {id(one): one for one in self.layouts}
        cells = self.cells
        made = {key: wide(one.candidates(), cells) for key, one in found.items()}
        return torch.cat([made[id(one)] for one in self.layouts])

    @property
    def images(self) -> tuple[int, ...]:
        """Item of each crop."""
        return tuple(i for i, one in enumerate(self.layouts) for _ in range(one.crops))

    def of(self, medium: int) -> list[int]:
        """Places of one modality's items, in the order in which it encodes them."""
        own = [i for i, item in enumerate(self.items) if item.medium == medium]
        return sorted(own, key=lambda i: self.items[i].number)

    def rows(self, batch: int, medium: int | None = None) -> list[int]:
        """How many items, of one modality or of all, each row of the batch holds."""
        counts = [0] * batch
        for item in self.items:
            counts[item.span.row] += medium is None or item.medium == medium
        return counts


@dataclass(frozen=True)
class VisualColumns:
    """The visual tokens that a prompt brings, as the language model gets them: which, and where.

    Attributes:
        visual: [B, S] bool; their columns among all of the prompt, those of a cache included.
        lengths: how many there are of each image (or video), row by row.
        numbers: for each image, [n] int64 in the order of its columns, the number of each of its
            visual tokens among those that it would have without any pruning.
        layouts: for each image, where the latter lie within it.
    """

    visual: Tensor
    lengths: Sequence[Sequence[int]]
    numbers: Sequence[Tensor]
    layouts: Sequence[Layout]

    @classmethod
    def of(cls, geometry: Geometry, visual: Tensor, numbers: Sequence[Tensor]) -> VisualColumns:
        """Those of a request's items, given the columns and, for each item, its tokens' numbers."""
        lengths: list[list[int]] = [[] for _ in range(len(visual))]
        for item, own in zip(geometry.items, numbers, strict=True):
            lengths[item.span.row].append(len(own))
        return cls(visual, lengths, numbers, geometry.layouts)

    @property
    def longest(self) -> int:
        """The largest number of visual tokens of a row."""
        return max((sum(row) for row in self.lengths), default=0)

    @property
    def counts(self) -> Tensor:
        """[B, I] int64 visual tokens of each image of a row; 0 where it has fewer images."""
        most = max((len(row) for row in self.lengths), default=0)
        rows = [[*row, *[0] * (most - len(row))] for row in self.lengths]
        return torch.tensor(rows, dtype=torch.long, device=self.visual.device).view(len(rows), most)

    @property
    def images(self) -> Tensor:
        """[B, S] int64 image of each visual token, counted within its row; -1 elsewhere."""
        zeros = [torch.zeros_like(own) for own in self.numbers]
        return self.placed(self._in_rows(zeros, [1] * len(zeros)))

    @property
    def frames(self) -> Tensor:
        """[B, S] int64 frame of each visual token, counted within its row; -1 elsewhere."""
        own = [frames_of(*each) for each in zip(self.layouts, self.numbers, strict=True)]
        counts = [int(one.max()) + 1 if len(one) else 0 for one in own]
        return self.placed(self._in_rows(own, counts))

    @property
    def row_numbers(self) -> list[Tensor]:
        """For each row, [v] the numbers of its visual tokens, its images one after the other."""
        totals = [len(one.labels) for one in self.layouts]
        flat = _joined(self._in_rows(self.numbers, totals))
        return list(flat.split([sum(row) for row in self.lengths]))

    def placed(self, values: Sequence[Tensor]) -> Tensor:
        """[B, S] int64: for each image [n] values of its visual tokens; -1 in other columns."""
        out = torch.full_like(self.visual, -1, dtype=torch.long)
        out[self.visual] = _joined(values).to(out.device)
        return out

    def of_images(self, values: Tensor, absent: int | bool) -> list[Tensor]:
        """What holds of columns [B, S], for each image, on the CPU.

        Args:
            values: [B, S].
            absent: what holds of visual tokens that the language model does not get.

        Returns:
            [n] over the visual tokens that the image would have without any pruning.
        """
        parts = values[self.visual].cpu().split([n for row in self.lengths for n in row])
        return [
            part.new_full((len(layout.labels),), absent).scatter(0, numbers, part)
            for layout, numbers, part in zip(self.layouts, self.numbers, parts, strict=True)
        ]

    def _in_rows(self, values: Sequence[Tensor], counts: Sequence[int]) -> list[Tensor]:
        """For each image, numbers within it as numbers within its row; of so many an image."""
        out, left = list[Tensor](), zip(values, counts, strict=True)
        for row in self.lengths:
            before = 0
            for own, count in islice(left, len(row)):
                out.append(own + before)
                before += count
        return out


def frames_of(layout: Layout, numbers: Tensor) -> Tensor:
    """[k] int64 the frame of some of an item's visual tokens; zeros for what is no video.

    Args:
        layout: of the item.
        numbers: [k] of the tokens. One that belongs to no patch goes with the frame before it.
    """
    if layout.kind != "video":
        return torch.zeros_like(numbers)
    crops = layout.crop.clamp(min=0).cummax(dim=0).values
    return crops.to(numbers.device)[numbers]


def _joined(values: Sequence[Tensor]) -> Tensor:
    """[n] int64 of several; of none, too."""
    return torch.cat([torch.zeros(0, dtype=torch.long), *values])


def spans(visual: Tensor, lengths: list[int], kind: str) -> list[Span]:
    """Give a modality's placeholders to its items, in order.

    Args:
        visual: [B, L] bool; columns that are its placeholders.
        lengths: visual tokens of each item.
        kind: "image" or "video".

    Raises:
        VlmpruneError: their numbers differ, or an item's tokens run across two rows.
    """
    rows, columns = visual.nonzero(as_tuple=True)
    if len(columns) != sum(lengths):
        raise VlmpruneError(
            f"the prompt holds {len(columns)} {kind} placeholders but the {kind}s make "
            f"{sum(lengths)} visual tokens; pass ids and pixels from one call of the model's own "
            "processor, untruncated."
        )
    out, start = [], 0
    # All at once, for each reading waits for a device.
    known, places = torch.stack((rows, columns)).tolist()
    for part in columns.split(lengths):
        end = start + len(part)
        own, first = {*known[start:end]}, places[start] if end > start else 0
        start = end
        if len(own) > 1:
            raise VlmpruneError(
                f"the {kind} placeholders of a prompt do not match its {kind}s; pass ids and "
                "pixels from one call of the model's own processor, untruncated."
            )
        out.append(Span(own.pop() if own else 0, part, first))
    return out


def geometry_of(
    model: nn.Module,
    media: Sequence[Medium],
    inputs: Sequence[Mapping[str, Any]],
    visual: Sequence[Tensor],
) -> Geometry:
    """Follow each cell of each item to its place in the prompt.

    Args:
        model: the host.
        media: the family's modalities.
        inputs: for each of them the request's inputs; empty where it brings none.
        visual: for each of them [B, L] bool, the columns that are its placeholders.

    Raises:
        VlmpruneError: the inputs are not what the family's processor makes.
    """
    items = []
    for number, (medium, given, columns) in enumerate(zip(media, inputs, visual, strict=True)):
        found = medium.layouts(model, given, columns) if given else []
        layouts = medium.described(found)
        places = spans(columns, [len(one.labels) for one in layouts], medium.kind)
        items += [
            Item(number, i, layout, place)
            for i, (layout, place) in enumerate(zip(layouts, places, strict=True))
        ]
    return Geometry(tuple(sorted(items, key=lambda item: item.span.order)))


def wide(values: Tensor, length: int) -> Tensor:
    """Padded with zeros along the last dimension, as they are where they are wide enough."""
    missing = length - values.shape[-1]
    return nn.functional.pad(values, (0, missing)) if missing else values
