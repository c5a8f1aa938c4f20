"""InternVL."""

from __future__ import annotations

from typing import Any

import torch
from transformers import InternVLConfig, InternVLForConditionalGeneration, Qwen2Config

from zoo.base import (
    END,
    IMAGE,
    START,
    TEXT,
    VISION,
    Entry,
    Media,
    Modality,
    ranges,
)
from zoo.tiles import PATCH, SIDE, TOKENS, grids_of, stacked, tiles_of


def internvl() -> Any:
    """InternVL: a CLS token that is dropped, pixel shuffle."""
    config = InternVLConfig(
        vision_config={**VISION, "image_size": [SIDE, SIDE], "patch_size": [PATCH, PATCH]},
        text_config=Qwen2Config(**TEXT),
        image_token_id=IMAGE,
        image_seq_length=TOKENS,
        tie_word_embeddings=False,
    )
    return InternVLForConditionalGeneration(config)


def _internvl(model: Any, rows: list[list[Modality]], generator: torch.Generator) -> Media:
    grids = grids_of(rows)
    pieces = [[START, *[IMAGE] * TOKENS * tiles_of(grid), END] for grid in grids]
    return Media(stacked(grids, generator), pieces, ranges("pixel_values", map(tiles_of, grids)))


FAMILIES: dict[str, Entry] = {
    "internvl": Entry("InternVL", internvl, _internvl),
}
