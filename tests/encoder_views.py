"""A view of crops made by hand, for methods that choose before the language model."""

from __future__ import annotations

import torch

from vlmprune.views import EncoderView


def view_of(
    images: tuple[int, ...] = (0, 0, 1),
    grid: tuple[int, int] = (4, 5),
    boxes: dict[int, tuple[int, int]] | None = None,
    videos: tuple[bool, ...] = (),
    seed: int = 0,
) -> EncoderView:
    """A view with all that a method may ask for, of random scores.

    Args:
        images: image of each crop.
        grid: of each crop.
        boxes: of crops that are unpadded, how many rows and columns stay, at the lower right.
        videos: as in the view.
        seed: of the scores.
    """
    rows, columns = grid
    n, crops = rows * columns, len(images)
    seen = torch.ones(crops, rows, columns, dtype=torch.bool)
    for crop, (down, across) in (boxes or {}).items():
        seen[crop] = False
        seen[crop, rows - down :, columns - across :] = True
    generator = torch.Generator().manual_seed(seed)

    def scores() -> torch.Tensor:
        return torch.rand(crops, n, generator=generator)

    def features(size: int) -> torch.Tensor:
        return torch.randn(crops, n, size, generator=generator)

    return EncoderView(
        scores(),
        features(6),
        seen.flatten(1),
        images,
        (grid,) * crops,
        videos or (False,) * (max(images) + 1),
        {layer: scores() for layer in (1, 2, 3)},
        scores(),
        scores(),
        features(3),
        features(5),
        scores(),
        joined=scores(),
        joined_keys=features(4),
    )
