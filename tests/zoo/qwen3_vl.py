"""Qwen3-VL, and classes made of it."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from transformers import (
    CohereCompassConfig,
    CohereCompassForConditionalGeneration,
    Cosmos3OmniConfig,
    Cosmos3OmniForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

from zoo.base import (
    ALTERNATING,
    FAR,
    NEAR,
    Entry,
)
from zoo.qwen import BOTH, TOKENS, VISION, aligned, media, text_of

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
    text = text_of(head_dim=8, **changes)
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
    text = text_of(
        sliding_window=window,
        layer_types=ALTERNATING,
        rope_parameters={
            "sliding_attention": text_of()["rope_parameters"],
            "full_attention": None,
        },
        logit_scale=0.5,
    )
    config = CohereCompassConfig(vision_config=dict(DEEP), text_config=text, **TOKENS)
    return CohereCompassForConditionalGeneration(config)


FAMILIES: dict[str, Entry] = {
    "qwen3_vl": Entry("Qwen3-VL", qwen3_vl, media, BOTH, aligned),
    "qwen3_vl_moe": Entry("Qwen3-VL-MoE", qwen3_vl_moe, media, BOTH, aligned),
    "cosmos3_omni": Entry("Cosmos3 Omni", cosmos3_omni, media, BOTH, aligned),
    "cohere_compass": Entry("Cohere Compass", cohere_compass, media, BOTH, aligned),
}

WINDOWED: dict[str, Entry] = {
    "cohere_compass": replace(FAMILIES["cohere_compass"], make=partial(cohere_compass, NEAR))
}
