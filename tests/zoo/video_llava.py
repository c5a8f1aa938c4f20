"""Video-LLaVA."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    VideoLlavaConfig,
    VideoLlavaForConditionalGeneration,
)

from zoo.base import (
    IMAGE,
    TEXT,
    VIDEO,
    Entry,
    Media,
    Modality,
    flat,
    in_order,
    noise,
    one_each,
)
from zoo.crops import (
    CLIP,
    FRAMES,
    PATCH,
    SIDE,
    config_of,
)


def video_llava() -> Any:
    """Video-LLaVA: a tower for images and one for frames, whose CLS tokens are passed on."""
    config = config_of(VideoLlavaConfig, CLIPVisionConfig(**CLIP), LlamaConfig(**TEXT))
    return VideoLlavaForConditionalGeneration(config)


def _two_towers(model: Any, rows: list[list[Modality]], generator: torch.Generator) -> Media:
    images, videos = flat(rows, "image"), flat(rows, "video")
    inputs = {}
    # The argument was renamed; the processor of each release fits its model.
    takes = inspect.signature(type(model).forward).parameters
    name = "pixel_values" if "pixel_values" in takes else "pixel_values_images"
    if images:
        inputs[name] = noise(generator, images, 3, SIDE, SIDE)
    if videos:
        inputs["pixel_values_videos"] = noise(generator, videos, FRAMES, 3, SIDE, SIDE)
    patches = (SIDE // PATCH) ** 2
    shown = [[VIDEO] * FRAMES * (patches + 1)] * videos
    pieces = in_order(rows, [[IMAGE] * patches] * images, shown)
    return Media(inputs, pieces, one_each(rows, name))


FAMILIES: dict[str, Entry] = {
    "video_llava": Entry("Video-LLaVA", video_llava, _two_towers, ("image", "video")),
}
