"""A grid of cells seen at a lower resolution: its size, and which cell stands where.

Imports torch alone.
"""

from __future__ import annotations

from math import isqrt

import torch
from torch import Tensor

Grid = tuple[int, int]


def smaller(grid: Grid, keep: int) -> Grid:
    """The largest grid of the same shape with at most `keep` cells, sides rounded down.

    Args:
        grid: (rows, columns).
        keep: from 1 to rows · columns. Of a grid that is no square, a side that would vanish
            stays 1, so that of a long strip `keep` cells are left.
    """
    rows, columns = grid
    high, wide = isqrt(keep * rows // columns), isqrt(keep * columns // rows)
    return (high or 1, wide if high else keep) if wide else (keep, 1)


def sources(grid: Grid, small: Grid) -> Tensor:
    """[rows · columns] int64; the cell of a small grid over each cell's centre, both one size."""
    high, wide = (
        (2 * torch.arange(n) + 1) * fewer // (2 * n) for n, fewer in zip(grid, small, strict=True)
    )
    return (high[:, None] * small[1] + wide).flatten()


def ranks(grid: Grid, small: Grid) -> Tensor:
    """[rows · columns] int64; cells by how near they are to the centre of their small cell.

    Of two that are equally near the lower number comes first.
    """
    offsets = []
    for n, fewer, other in zip(grid, small, reversed(small), strict=True):
        at = torch.arange(n)
        source = (2 * at + 1) * fewer // (2 * n)
        # In cells, times 2 · fewer; times the other side's number both directions are alike.
        offsets.append(((2 * at + 1) * fewer - (2 * source + 1) * n) * other)
    distance = (offsets[0].square()[:, None] + offsets[1].square()).flatten()
    order = distance.argsort(stable=True)
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
