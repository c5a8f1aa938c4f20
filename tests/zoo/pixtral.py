"""Pixtral: its tower in LLaVA's class, and images as its processor makes them."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    PixtralVisionConfig,
)

from zoo.base import (
    BREAK,
    END,
    IMAGE,
    TEXT,
    VISION,
    Entry,
    Media,
    Modality,
    flat,
    noise,
    one_each,
)
from zoo.crops import config_of

# (rows, columns) of visual tokens of images that keep their own resolution.
OWN = [(3, 2), (2, 4), (4, 1), (1, 3)]

PIXTRAL = {**VISION, "image_size": 64, "patch_size": 8, "head_dim": 8}


def pixtral() -> Any:
    """Pixtral: its tower, at the image's own resolution, in LLaVA's class."""
    config = config_of(
        LlavaConfig,
        PixtralVisionConfig(**PIXTRAL),
        MistralConfig(**TEXT, sliding_window=None),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    return LlavaForConditionalGeneration(config)


def own_resolution(model: Any, rows: list[list[Modality]], generator: torch.Generator) -> Media:
    """Images of their own size, padded to the largest; each line of patches ends in a token."""
    count = flat(rows, "image")
    if not count:
        return Media({}, [], [])
    step = 8 * getattr(model.config, "spatial_merge_size", 1)
    grids = [OWN[i % len(OWN)] for i in range(count)]
    sizes = [(rows * step, columns * step) for rows, columns in grids]
    pixels = torch.zeros(count, 3, max(h for h, _ in sizes), max(w for _, w in sizes))
    pieces = []
    for one, (height, width), (lines, columns) in zip(pixels, sizes, grids, strict=True):
        one[:, :height, :width] = noise(generator, 3, height, width)
        pieces.append(([IMAGE] * columns + [BREAK]) * lines)
        pieces[-1][-1] = END
    inputs = {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}
    return Media(inputs, pieces, one_each(rows))


FAMILIES: dict[str, Entry] = {
    "pixtral": Entry("Pixtral", pixtral, own_resolution),
}
