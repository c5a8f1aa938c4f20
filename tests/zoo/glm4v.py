"""GLM-4.1V, 4.5V, 4.6V and GLM-OCR: a convolution makes a token of 2 x 2 patches."""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import Tensor
from transformers import (
    Glm4vConfig,
    Glm4vForConditionalGeneration,
    Glm4vMoeConfig,
    Glm4vMoeForConditionalGeneration,
    Glm46VConfig,
    Glm46VForConditionalGeneration,
    GlmOcrConfig,
    GlmOcrForConditionalGeneration,
)

from zoo.base import (
    END,
    GLOBAL,
    IMAGE,
    NEWLINE,
    START,
    VIDEO,
    WORDS,
    Entry,
    Media,
    Modality,
    flat,
    noise,
    ranges,
)
from zoo.qwen import BOTH, IMAGES, MERGE, PATCH, VIDEOS, VISION, text_of

# What stands around a video; each of its frames stands between those of an image.
VIDEO_START, VIDEO_END = NEWLINE, GLOBAL
TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "image_start_token_id": START,
    "image_end_token_id": END,
    "video_start_token_id": VIDEO_START,
    "video_end_token_id": VIDEO_END,
    "tie_word_embeddings": False,
}
TOWER = {
    **VISION,
    "depth": 3,
    "hidden_size": 32,
    "intermediate_size": 48,
    "out_hidden_size": 32,
    "image_size": 6 * PATCH,
}


def glm4v() -> Any:
    """GLM-4.1V."""
    config = Glm4vConfig(vision_config=dict(TOWER), text_config=text_of(), **TOKENS)
    return Glm4vForConditionalGeneration(config)


def glm4v_moe() -> Any:
    """GLM-4.5V: one dense decoder layer, then experts, two of four a token."""
    text = text_of(
        head_dim=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        n_shared_experts=1,
        first_k_dense_replace=1,
    )
    # Half of each head's values turn.
    text["rope_parameters"]["partial_rotary_factor"] = 0.5
    config = Glm4vMoeConfig(vision_config=dict(TOWER), text_config=text, **TOKENS)
    return Glm4vMoeForConditionalGeneration(config)


def glm46v() -> Any:
    """GLM-4.6V."""
    config = Glm46VConfig(vision_config=dict(TOWER), text_config=text_of(), **TOKENS)
    return Glm46VForConditionalGeneration(config)


def glm_ocr() -> Any:
    """GLM-OCR: norms of queries and keys in the tower, and no positions added to patches."""
    config = GlmOcrConfig(vision_config=dict(TOWER), text_config=text_of(head_dim=8), **TOKENS)
    return GlmOcrForConditionalGeneration(config)


def media(model: Any, rows: list[list[Modality]], generator: torch.Generator) -> Media:
    """Images, or videos: each frame of one stands between marks of its own, and its time behind."""
    images, videos = flat(rows, "image"), flat(rows, "video")
    assert not (images and videos), "both have one placeholder"
    pixels, grid = "pixel_values", "image_grid_thw"
    choice = IMAGES
    if videos:
        pixels, grid, choice = "pixel_values_videos", "video_grid_thw", VIDEOS
    grids = [choice[i % len(choice)] for i in range(images + videos)]
    patches = [t * h * w for t, h, w in grids]
    pieces = []
    for time, height, width in grids:
        frame = [START, *[IMAGE] * (height * width // MERGE**2), END]
        shown = [[*frame, WORDS + i] for i in range(time)]
        pieces.append([VIDEO_START, *chain(*shown), VIDEO_END] if videos else frame)
    made = {
        pixels: noise(generator, sum(patches), 3 * 2 * PATCH * PATCH),
        grid: torch.tensor(grids),
    }
    return Media(made if grids else {}, pieces, ranges(pixels, patches))


def aligned(ids: Tensor) -> dict[str, Tensor]:
    """1 for images and 2 for frames of a video, as the processor tells them apart."""
    within = (ids == VIDEO_START).cumsum(1) > (ids == VIDEO_END).cumsum(1)
    return {"mm_token_type_ids": (ids == IMAGE).int() * (1 + within.int())}


def _entry(name: str, make: Any) -> Entry:
    return Entry(name, make, media, BOTH, aligned, one_placeholder=True)


FAMILIES: dict[str, Entry] = {
    "glm4v": _entry("GLM-4.1V", glm4v),
    "glm4v_moe": _entry("GLM-4.5V", glm4v_moe),
    "glm46v": _entry("GLM-4.6V", glm46v),
    "glm_ocr": _entry("GLM-OCR", glm_ocr),
}
