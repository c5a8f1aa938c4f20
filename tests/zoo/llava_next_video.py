"""LLaVA-NeXT-Video."""

from __future__ import annotations

from typing import Any

from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextVideoConfig,
    LlavaNextVideoForConditionalGeneration,
)

from zoo.base import TEXT, Entry
from zoo.crops import (
    CLIP,
    PINPOINTS,
    any_resolution,
    config_of,
)


def llava_next_video() -> Any:
    """LLaVA-NeXT-Video: any-resolution images, frames pooled 2 x 2 before the projector."""
    config = config_of(
        LlavaNextVideoConfig,
        CLIPVisionConfig(**CLIP),
        LlamaConfig(**TEXT),
        image_grid_pinpoints=PINPOINTS,
    )
    return LlavaNextVideoForConditionalGeneration(config)


FAMILIES: dict[str, Entry] = {
    "llava_next_video": Entry(
        "LLaVA-NeXT-Video", llava_next_video, any_resolution, ("image", "video")
    ),
}
