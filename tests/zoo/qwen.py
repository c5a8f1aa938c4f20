"""The Qwen line and what has its parts: patches in one sequence, merged 2 x 2, positions in 3-D."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from transformers import (
    CohereCompassConfig,
    CohereCompassForConditionalGeneration,
    Cosmos3OmniConfig,
    Cosmos3OmniForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

from zoo.base import (
    ALTERNATING,
    END,
    FAR,
    IMAGE,
    NEAR,
    START,
    TEXT,
    VIDEO,
    WORDS,
    Entry,
    Media,
    Modality,
    Place,
    flat,
    in_order,
    noise,
    ranges,
)

PATCH, MERGE = 4, 2
# (time, rows, columns) in patches: not square, and wider than Qwen2.5's windows of 2 x 2 tokens.
IMAGES = [(1, 6, 4), (1, 4, 10), (1, 8, 6), (1, 2, 2)]
VIDEOS = [(2, 4, 6), (3, 6, 4)]
TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
    "tie_word_embeddings": False,
}
VISION = {
    "num_heads": 4,
    "in_channels": 3,
    "patch_size": PATCH,
    "spatial_merge_size": MERGE,
    "temporal_patch_size": 2,
}


def _text(**changes: Any) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    return {**TEXT, "rope_parameters": rope, **changes}


def qwen2_vl() -> Any:
    """Qwen2-VL."""
    vision = {**VISION, "depth": 3, "embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2}
    config = Qwen2VLConfig(vision_config=vision, text_config=_text(), **TOKENS)
    return Qwen2VLForConditionalGeneration(config)


def qwen2_5_vl() -> Any:
    """Qwen2.5-VL: windows of 2 x 2 tokens in blocks 0 and 2, full attention in 1 and 3."""
    vision = {
        **VISION,
        "depth": 4,
        "hidden_size": 32,
        "intermediate_size": 48,
        "out_hidden_size": 32,
        "window_size": 2 * MERGE * PATCH,
        "fullatt_block_indexes": [1, 3],
        "tokens_per_second": 2,
    }
    config = Qwen2_5_VLConfig(vision_config=vision, text_config=_text(), **TOKENS)
    return Qwen2_5_VLForConditionalGeneration(config)


# Features of two earlier blocks are added in the first decoder layers.
DEEP = {
    **VISION,
    "depth": 4,
    "hidden_size": 32,
    "intermediate_size": 48,
    "out_hidden_size": 32,
    "num_position_embeddings": 36,
    "deepstack_visual_indexes": [0, 2],
}


def _interleaved(**changes: Any) -> dict[str, Any]:
    text = _text(head_dim=8, **changes)
    return {**text, "rope_parameters": {**text["rope_parameters"], "mrope_interleaved": True}}


def qwen3_vl() -> Any:
    """Qwen3-VL: features of two earlier blocks are added in the first decoder layers."""
    config = Qwen3VLConfig(vision_config=dict(DEEP), text_config=_interleaved(), **TOKENS)
    return Qwen3VLForConditionalGeneration(config)


def qwen3_vl_moe() -> Any:
    """Qwen3-VL with experts, two of four a token."""
    text = _interleaved(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)
    config = Qwen3VLMoeConfig(vision_config=dict(DEEP), text_config=text, **TOKENS)
    return Qwen3VLMoeForConditionalGeneration(config)


def cosmos3_omni() -> Any:
    """Cosmos 3 Omni: Qwen3-VL under another name."""
    config = Cosmos3OmniConfig(
        vision_config=dict(DEEP),
        text_config={**_interleaved(), "model_type": "qwen3_vl_text"},
        **TOKENS,
    )
    return Cosmos3OmniForConditionalGeneration(config)


def cohere_compass(window: int = FAR) -> Any:
    """Cohere Compass: layers with a window that turn, and one that neither has one nor turns."""
    text = _text(
        sliding_window=window,
        layer_types=ALTERNATING,
        rope_parameters={
            "sliding_attention": _text()["rope_parameters"],
            "full_attention": None,
        },
        logit_scale=0.5,
    )
    config = CohereCompassConfig(vision_config=dict(DEEP), text_config=text, **TOKENS)
    return CohereCompassForConditionalGeneration(config)


def _media(model: Any, rows: list[list[Modality]], generator: torch.Generator) -> Media:
    third = not model.config.model_type.startswith("qwen2")
    inputs: dict[str, Tensor] = {}
    pieces: dict[Modality, list[list[int]]] = {"image": [], "video": []}
    places: dict[Modality, list[Place]] = {"image": [], "video": []}
    names: dict[Modality, tuple[str, str, list[tuple[int, int, int]], int]] = {
        "image": ("pixel_values", "image_grid_thw", IMAGES, IMAGE),
        "video": ("pixel_values_videos", "video_grid_thw", VIDEOS, VIDEO),
    }
    for modality, (pixels, grid_name, choice, token) in names.items():
        count = flat(rows, modality)
        if not count:
            continue
        grids = [choice[i % len(choice)] for i in range(count)]
        patches = [t * h * w for t, h, w in grids]
        inputs[pixels] = noise(generator, sum(patches), 3 * 2 * PATCH * PATCH)
        inputs[grid_name] = torch.tensor(grids)
        places[modality] = ranges(pixels, patches)
        for time, height, width in grids:
            frame = [token] * (height * width // MERGE**2)
            if modality == "video" and third:
                # Each frame stands on its own behind the time at which it was shown.
                shown = [[WORDS + i, START, *frame, END] for i in range(time)]
                pieces[modality].append([*chain(*shown)])
            else:
                pieces[modality].append([START, *frame * time, END])
    if "video_grid_thw" in inputs and model.config.model_type == "qwen2_5_vl":
        inputs["second_per_grid_ts"] = torch.ones(len(inputs["video_grid_thw"]))
    return Media(
        inputs,
        in_order(rows, pieces["image"], pieces["video"]),
        in_order(rows, places["image"], places["video"]),
    )


def _aligned(ids: Tensor) -> dict[str, Tensor]:
    return {"mm_token_type_ids": (ids == IMAGE).int() + 2 * (ids == VIDEO).int()}


_BOTH: tuple[Modality, ...] = ("image", "video")
FAMILIES: dict[str, Entry] = {
    "qwen2_vl": Entry("Qwen2-VL", qwen2_vl, _media, _BOTH, _aligned),
    "qwen2_5_vl": Entry("Qwen2.5-VL", qwen2_5_vl, _media, _BOTH, _aligned),
    "qwen3_vl": Entry("Qwen3-VL", qwen3_vl, _media, _BOTH, _aligned),
    "qwen3_vl_moe": Entry("Qwen3-VL-MoE", qwen3_vl_moe, _media, _BOTH, _aligned),
    "cosmos3_omni": Entry("Cosmos3 Omni", cosmos3_omni, _media, _BOTH, _aligned),
    "cohere_compass": Entry("Cohere Compass", cohere_compass, _media, _BOTH, _aligned),
}
# As `tiles.WINDOWED`.
WINDOWED: dict[str, Entry] = {
    "cohere_compass": replace(FAMILIES["cohere_compass"], make=partial(cohere_compass, NEAR))
}
