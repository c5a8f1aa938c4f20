"""LLaVA-OneVision."""

from __future__ import annotations

from typing import Any

from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen2Config,
    SiglipVisionConfig,
)

from zoo.base import TEXT, Entry
from zoo.crops import (
    ASPECT,
    CLIP,
    PINPOINTS,
    any_resolution,
    config_of,
)


def llava_onevision() -> Any:
    """LLaVA-OneVision: SigLIP, any resolution scaled down where large, frames pooled after."""
    config = config_of(
        LlavaOnevisionConfig,
        SiglipVisionConfig(**CLIP, vision_use_head=False),
        Qwen2Config(**TEXT),
        image_grid_pinpoints=PINPOINTS,
        vision_aspect_ratio=ASPECT,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    return LlavaOnevisionForConditionalGeneration(config)


FAMILIES: dict[str, Entry] = {
    "llava_onevision": Entry(
        "LLaVA-OneVision", llava_onevision, any_resolution, ("image", "video")
    ),
}
