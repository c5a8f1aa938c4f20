"""Where the images and videos of a request lie, in it and in themselves, before any is encoded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
    """

    row: int
    columns: Tensor

    @property
    def order(self) -> tuple[int, int]:
        """Sorts spans as the prompt has them."""
        return self.row, int(self.columns[0]) if len(self.columns) else 0


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
        return torch.cat([wide(one.candidates(), self.cells) for one in self.layouts])

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
    out = []
    for row, part in zip(rows.split(lengths), columns.split(lengths), strict=True):
        own = row.unique().tolist()
        if len(own) > 1:
            raise VlmpruneError(
                f"the {kind} placeholders of a prompt do not match its {kind}s; pass ids and "
                "pixels from one call of the model's own processor, untruncated."
            )
        out.append(Span(own[0] if own else 0, part))
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
    """Padded with zeros along the last dimension."""
    return nn.functional.pad(values, (0, length - values.shape[-1]))
