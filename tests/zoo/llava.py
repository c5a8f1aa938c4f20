"""LLaVA-1.5."""

from __future__ import annotations

from typing import Any

from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from zoo.base import TEXT, Entry
from zoo.crops import CLIP, config_of, one_crop


def llava() -> Any:
    """LLaVA-1.5: CLIP, second-last layer, CLS dropped."""
    return LlavaForConditionalGeneration(
        config_of(
            LlavaConfig,
            CLIPVisionConfig(**CLIP),
            LlamaConfig(**TEXT),
            vision_feature_layer=-2,
            vision_feature_select_strategy="default",
        )
    )


FAMILIES: dict[str, Entry] = {
    "llava": Entry("LLaVA-1.5", llava, one_crop),
}
