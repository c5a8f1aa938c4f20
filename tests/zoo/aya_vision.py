"""Aya Vision."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from transformers import (
    AyaVisionConfig,
    AyaVisionForConditionalGeneration,
    Cohere2Config,
    SiglipVisionConfig,
)

from zoo.base import (
    ALTERNATING,
    END,
    FAR,
    GLOBAL,
    IMAGE,
    NEAR,
    START,
    TEXT,
    TILES,
    Entry,
    Media,
    Modality,
    ranges,
)
from zoo.tiles import SQUARE, TOKENS, grids_of, stacked, tiles_of


def aya_vision(window: int = FAR) -> Any:
    """Aya Vision: SigLIP, pixel shuffle, a decoder with sliding windows."""
    config = AyaVisionConfig(
        vision_config=SiglipVisionConfig(**SQUARE, vision_use_head=False),
        text_config=Cohere2Config(**TEXT, sliding_window=window, layer_types=ALTERNATING),
        image_token_index=IMAGE,
        downsample_factor=2,
        tie_word_embeddings=False,
    )
    return AyaVisionForConditionalGeneration(config)


def _aya_vision(model: Any, rows: list[list[Modality]], generator: torch.Generator) -> Media:
    grids, pieces = grids_of(rows), []
    for grid in grids:
        ids = [START]
        for number in range(1, tiles_of(grid)):
            ids += [TILES + number, *[IMAGE] * TOKENS]
        pieces.append([*ids, GLOBAL, *[IMAGE] * TOKENS, END])
    return Media(stacked(grids, generator), pieces, ranges("pixel_values", map(tiles_of, grids)))


FAMILIES: dict[str, Entry] = {
    "aya_vision": Entry("Aya Vision", aya_vision, _aya_vision),
}

WINDOWED: dict[str, Entry] = {
    "aya_vision": replace(FAMILIES["aya_vision"], make=partial(aya_vision, NEAR))
}
