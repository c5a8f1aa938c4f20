"""The inputs of images that classes take in ways of their own.

Each maker gives a function (model, number) → the inputs of one image, random pixels by its number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from surveyed.sizes import PATCH, SIDE, WORDS

Image = dict[str, Tensor]
Pixels = Callable[[Any, int], Image]
CELL = 3 * PATCH * PATCH


def noise(number: int, *shape: int) -> Tensor:
    """Random pixels of an image."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(number + 1))


def tiles(model: Any, number: int) -> Image:
    """An image of any resolution, as three tiles of the tower's size."""
    return {
        "pixel_values": noise(number, 1, 3, 3, SIDE, SIDE),
        "image_sizes": torch.tensor([[SIDE, 2 * SIDE]]),
    }


def plain(*more: str, side: int = SIDE) -> Pixels:
    """One picture of the tower's size; more of the same under other names."""
    names = ("pixel_values", *more)
    return lambda model, number: {
        name: noise(number + i, 1, 3, side, side) for i, name in enumerate(names)
    }


def grid(*cell: int, more: Mapping[str, Any] | None = None) -> Pixels:
    """Patches of one shape behind one another, with their grid."""

    def make(model: Any, number: int) -> Image:
        rows, columns = 4, 6 if number % 2 else 4
        made = {
            "pixel_values": noise(number, rows * columns, *cell),
            "image_grid_thw": torch.tensor([[1, rows, columns]]),
        }
        return made | {name: torch.tensor(value) for name, value in (more or {}).items()}

    return make


def sized(side: int) -> Pixels:
    """One picture and its size."""
    return lambda model, number: {
        "pixel_values": noise(number, 1, 3, side, side),
        "image_sizes": torch.tensor([[side, side]]),
    }


def cells(model: Any, number: int) -> Image:
    """Squares of patches that are merged, each a small picture, channels last (Inkling)."""
    rows, columns = 2, 3 if number % 2 else 2
    return {
        "pixel_values": noise(number, rows * columns, 2 * PATCH, 2 * PATCH, 3),
        "image_grid_thw": torch.tensor([[1, rows, columns]]),
    }


def placed(cell: int) -> Pixels:
    """Patches with their places (Gemma 4)."""

    def make(model: Any, number: int) -> Image:
        at = torch.arange(36)
        return {
            "pixel_values": noise(number, 1, 36, cell).sigmoid(),
            "image_position_ids": torch.stack((at % 6, at // 6), dim=-1)[None],
        }

    return make


def pooled(model: Any, number: int) -> Image:
    """Patches, and which of them make a token (Molmo 2)."""
    at = torch.arange(64).view(4, 2, 4, 2).transpose(1, 2).reshape(16, 4)
    return {
        "pixel_values": noise(number, 1, 64, CELL),
        "image_token_pooling": at,
        "image_grids": torch.tensor([[4, 4, 0, 0]]),
        "image_num_crops": torch.tensor([1]),
    }


def pooled_join(images: Sequence[Image], rows: Sequence[int]) -> Image:
    """The numbers of patches go on from image to image."""
    made = {name: torch.cat([one[name] for one in images]) for name in images[0]}
    made["image_token_pooling"] = torch.cat(
        [one["image_token_pooling"] + 64 * i for i, one in enumerate(images)]
    )
    return made


def strip(model: Any, number: int) -> Image:
    """Patches side by side in one row of pixels (MiniCPM-V)."""
    rows, columns = 8, 16 if number % 2 else 8
    return {
        "pixel_values": noise(number, 1, 3, PATCH, rows * columns * PATCH),
        "target_sizes": torch.tensor([[rows, columns]]),
    }


def strip_join(images: Sequence[Image], rows: Sequence[int]) -> Image:
    """The strips go on from image to image."""
    return {
        "pixel_values": torch.cat([one["pixel_values"] for one in images], dim=-1),
        "target_sizes": torch.cat([one["target_sizes"] for one in images]),
    }


def hw_grid(model: Any, number: int) -> Image:
    """Patches with rows and columns of the grid (Nemotron)."""
    rows, columns = 4, 6 if number % 2 else 4
    return {
        "pixel_values": noise(number, rows * columns, CELL),
        "image_grid_hw": torch.tensor([[rows, columns]]),
    }


def masked_tiles(model: Any, number: int) -> Image:
    """Tiles by row with a mask of the real ones (Granite Docling)."""
    return {
        "pixel_values": noise(number, 1, 1, 3, SIDE, SIDE),
        "pixel_attention_mask": torch.ones(1, 1, dtype=torch.bool),
    }


def queries(model: Any, image: Image) -> int:
    """As many visual tokens as there are learned queries."""
    return int(model.config.num_query_tokens)


def questioned(*shape: int) -> Pixels:
    """A picture with a question for the Q-Former."""
    return lambda model, number: {
        "pixel_values": noise(number, 1, *shape),
        "qformer_input_ids": torch.full((1, 4), WORDS + number),
        "qformer_attention_mask": torch.ones(1, 4, dtype=torch.long),
    }


def clips(model: Any, number: int) -> Image:
    """A token each, of two moments of a square (Inkling)."""
    return {"pixel_values": noise(number, 6 if number % 2 else 4, 2, PATCH, PATCH, 3)}
