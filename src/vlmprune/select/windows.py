"""Square windows of a grid of cells. Imports torch alone."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmprune.select import top_k


def windows(grid: tuple[int, int], side: int) -> Tensor:
    """The cells of each window, row by row of windows; those at the far edges may be smaller.

    Args:
        grid: (rows, columns) of cells.
        side: of a window, in cells.

    Returns:
        [W, side²] int64; -1 where a window has fewer cells.
    """
    rows, columns = grid
    numbers = torch.arange(rows * columns).view(rows, columns)
    wide = torch.nn.functional.pad(numbers, (0, -columns % side, 0, -rows % side), value=-1)
    return wide.unfold(0, side, side).unfold(1, side, side).reshape(-1, side * side)


def centres(tiles: Tensor, grid: tuple[int, int], seen: Tensor) -> Tensor:
    """The cell nearest the centre of each window, of those that count; ties to the lower index.

    Args:
        tiles: [W, K] as from `windows`.
        grid: (rows, columns) of cells.
        seen: [B, N] bool; cells that count.

    Returns:
        [B, W] int64; -1 for a window of which no cell counts.
    """
    inside = tiles >= 0
    away = torch.zeros(tiles.shape, device=tiles.device)
    for place in (tiles // grid[1], tiles % grid[1]):
        low = place.masked_fill(~inside, grid[0] + grid[1]).amin(dim=1, keepdim=True)
        high = place.masked_fill(~inside, -1).amax(dim=1, keepdim=True)
        # Twice the distance, in whole numbers.
        away = away + (2 * place - low - high).float() ** 2
    there = inside[None] & seen[:, tiles.clamp(min=0)]
    scores = -away.masked_fill(~there, torch.inf)
    best = top_k(scores.flatten(0, 1), 1).view(scores.shape[:2])
    found = tiles.expand(len(seen), -1, -1).gather(2, best[..., None])[..., 0]
    return found.masked_fill(~there.any(dim=2), -1)
