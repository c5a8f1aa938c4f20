"""LLaVA-NeXT."""

from __future__ import annotations

from typing import Any

from transformers import (
    CLIPVisionConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    MistralConfig,
)

from zoo.base import TEXT, Entry
from zoo.crops import (
    CLIP,
    PINPOINTS,
    any_resolution,
    config_of,
)


def llava_next() -> Any:
    """LLaVA-NeXT: any resolution."""
    config = config_of(
        LlavaNextConfig,
        CLIPVisionConfig(**CLIP),
        MistralConfig(**TEXT, sliding_window=None),
        image_grid_pinpoints=PINPOINTS,
    )
    return LlavaNextForConditionalGeneration(config)


FAMILIES: dict[str, Entry] = {
    "llava_next": Entry("LLaVA-NeXT", llava_next, any_resolution),
}
