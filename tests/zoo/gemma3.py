"""Gemma 3."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, SiglipVisionConfig

from zoo.base import (
    ALTERNATING,
    END,
    FAR,
    IMAGE,
    NEAR,
    NEWLINE,
    START,
    TEXT,
    Entry,
    Media,
    Modality,
    flat,
    noise,
    one_each,
)
from zoo.tiles import SIDE, SQUARE, TOKENS


def gemma3(window: int = FAR) -> Any:
    """Gemma 3: SigLIP, average pooling, sees an image's tokens both ways, sliding windows."""
    text = {**TEXT, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": window}
    config = Gemma3Config(
        vision_config=SiglipVisionConfig(**SQUARE, vision_use_head=False),
        text_config={**text, "layer_types": ALTERNATING},
        mm_tokens_per_image=TOKENS,
        image_token_index=IMAGE,
        boi_token_index=START,
        eoi_token_index=END,
        tie_word_embeddings=False,
    )
    return Gemma3ForConditionalGeneration(config)


def _gemma3(model: Any, rows: list[list[Modality]], generator: torch.Generator) -> Media:
    count = flat(rows, "image")
    pixels = {"pixel_values": noise(generator, count, 3, SIDE, SIDE)} if count else {}
    return Media(
        pixels, [[NEWLINE, START, *[IMAGE] * TOKENS, END, NEWLINE]] * count, one_each(rows)
    )


FAMILIES: dict[str, Entry] = {
    "gemma3": Entry(
        "Gemma 3",
        gemma3,
        _gemma3,
        aligned=lambda ids: {"token_type_ids": (ids == IMAGE).long()},
    ),
}

WINDOWED: dict[str, Entry] = {"gemma3": replace(FAMILIES["gemma3"], make=partial(gemma3, NEAR))}
