"""What is counted of images, and of the rows of a batch that they stand in."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice

import torch
from torch import Tensor

from vlmprune.views.layout import Layout


def joined(
    first: Sequence[Tensor], then: Sequence[Tensor], reached: Sequence[Tensor]
) -> list[Tensor]:
    """Where tokens went in two steps, either of which may have merged nothing.

    Args:
        first: before the language model.
        then: inside it.
        reached: for each image a [n] bool, what is left in the end.
    """
    if not first and not then:
        return []
    stay = [torch.arange(len(mask)) for mask in reached]
    ends = [torch.where(mask, at, -1) for mask, at in zip(reached, stay, strict=True)]
    pairs = zip(first or stay, then or ends, strict=True)
    return [torch.where(at >= 0, after[at.clamp(min=0)], -1) for at, after in pairs]


def on_host(kept: list[Tensor]) -> list[Tensor]:
    """For each image its [n] bool on the CPU, fetched all at once."""
    if len({one.device for one in kept}) != 1:
        return [one.cpu() for one in kept]
    return list(torch.cat(kept).cpu().split([len(one) for one in kept]))


def of_no_patch(layouts: Sequence[Layout], kept: Sequence[Tensor]) -> int:
    """How many of the kept visual tokens, for each image a [n] bool, belong to no patch."""
    pairs = zip(layouts, kept, strict=True)
    return sum(int((mask & (one.labels.cpu() < 0)).sum()) for one, mask in pairs)


def by_row(rows: list[int], counts: Iterable[int]) -> list[int]:
    """Sums over each row of a batch with so many images, of one count an image."""
    left = iter(counts)
    return [sum(islice(left, images)) for images in rows]
