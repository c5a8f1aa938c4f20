"""Square tiles, as the processors of the families that cut images into them make them."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.base import (
    VISION,
    Modality,
    flat,
    noise,
)

SIDE, PATCH = 48, 8  # a tile of 6 x 6 patches, 3 x 3 visual tokens once merged
TOKENS = 9
# (rows, columns) of tiles of the images of a batch; (1, 1) is an image that is not cut.
GRIDS = [(1, 2), (1, 1), (2, 2), (3, 1)]
SQUARE = {**VISION, "image_size": SIDE, "patch_size": PATCH}


def grids_of(rows: list[list[Modality]]) -> list[tuple[int, int]]:
    """Tiles by rows and columns of each image."""
    return [GRIDS[i % len(GRIDS)] for i in range(flat(rows, "image"))]


def tiles_of(grid: tuple[int, int]) -> int:
    """Tiles of an image, with the view of the whole that comes with a cut one."""
    return grid[0] * grid[1] + (grid != (1, 1))


def stacked(grids: list[tuple[int, int]], generator: torch.Generator) -> dict[str, Tensor]:
    """The tiles of all images in one stack; nothing says where an image begins."""
    count = sum(map(tiles_of, grids))
    return {"pixel_values": noise(generator, count, 3, SIDE, SIDE)} if count else {}
