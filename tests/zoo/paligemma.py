"""PaliGemma and PaliGemma 2."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from transformers import (
    Gemma2Config,
    GemmaConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    SiglipVisionConfig,
)

from zoo.base import (
    ALTERNATING,
    FAR,
    IMAGE,
    NEAR,
    TEXT,
    Entry,
    Media,
    Modality,
    flat,
    noise,
    one_each,
)
from zoo.tiles import PATCH, SQUARE


def _paligemma(text: Any) -> Any:
    config = PaliGemmaConfig(
        vision_config=SiglipVisionConfig(**{**SQUARE, "image_size": 32}, vision_use_head=False),
        text_config=text,
        image_token_index=IMAGE,
        projection_dim=32,
        hidden_size=32,
        vocab_size=TEXT["vocab_size"],
        tie_word_embeddings=False,
    )
    return PaliGemmaForConditionalGeneration(config)


def paligemma() -> Any:
    """PaliGemma: SigLIP, no merging, the whole prompt seen both ways."""
    return _paligemma(GemmaConfig(**TEXT, head_dim=8))


def paligemma2(window: int = FAR) -> Any:
    """PaliGemma 2: the same on Gemma 2, which has sliding windows."""
    more = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": window}
    return _paligemma(Gemma2Config(**TEXT, **more, layer_types=ALTERNATING))


def _paligemma_media(model: Any, rows: list[list[Modality]], generator: torch.Generator) -> Media:
    count, side = flat(rows, "image"), model.config.vision_config.image_size
    pixels = {"pixel_values": noise(generator, count, 3, side, side)} if count else {}
    return Media(pixels, [[IMAGE] * (side // PATCH) ** 2] * count, one_each(rows))


FAMILIES: dict[str, Entry] = {
    "paligemma": Entry(
        "PaliGemma",
        paligemma,
        _paligemma_media,
        aligned=lambda ids: {"token_type_ids": torch.zeros_like(ids)},
        images_first=True,
    ),
    "paligemma2": Entry(
        "PaliGemma 2",
        paligemma2,
        _paligemma_media,
        aligned=lambda ids: {"token_type_ids": torch.zeros_like(ids)},
        images_first=True,
        decoder_attention="eager",
    ),
}

WINDOWED: dict[str, Entry] = {
    "paligemma2": replace(FAMILIES["paligemma2"], make=partial(paligemma2, NEAR))
}
