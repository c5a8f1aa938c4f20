"""Crops of one size, as the processors of the LLaVA line make them."""

from __future__ import annotations

import inspect
from math import ceil, sqrt
from typing import Any

import torch
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from zoo.base import (
    IMAGE,
    VIDEO,
    VISION,
    Media,
    Modality,
    flat,
    in_order,
    noise,
    one_each,
)

SIDE, PATCH = 56, 14  # a crop of 4 x 4 patches
# LLaVA-OneVision reads its limit off this name: beyond two crops' worth of patches it scales down.
ASPECT = "anyres_max_2"
PINPOINTS = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE], [SIDE, 3 * SIDE]]
# (height, width) before processing: wide, tall and square, with and without padding to cut away.
SIZES = [(90, 60), (50, 160), (200, 40), (64, 64), (33, 100)]
FRAMES = 3

CLIP = {**VISION, "image_size": SIDE, "patch_size": PATCH}


def config_of(cls: Any, vision: Any, text: Any, **changes: Any) -> Any:
    """A config of a class of the LLaVA line."""
    tokens = {"image_token_index": IMAGE}
    if "video_token_index" in inspect.signature(cls).parameters:
        tokens["video_token_index"] = VIDEO
    return cls(
        vision_config=vision, text_config=text, tie_word_embeddings=False, **tokens, **changes
    )


def one_crop(model: Any, rows: list[list[Modality]], generator: torch.Generator) -> Media:
    """A crop an image."""
    count = flat(rows, "image")
    pixels = {"pixel_values": noise(generator, count, 3, SIDE, SIDE)} if count else {}
    return Media(pixels, [[IMAGE] * (SIDE // PATCH) ** 2] * count, one_each(rows))


def any_resolution(model: Any, rows: list[list[Modality]], generator: torch.Generator) -> Media:
    """Any-resolution images; a row of several images gets one crop each in LLaVA-OneVision."""
    inputs: dict[str, Any] = {}
    images, videos = flat(rows, "image"), flat(rows, "video")
    onevision = model.config.model_type == "llava_onevision"
    # The processor tells rows of one image from rows of several, and crops only the former.
    per_row = [sum(one == "image" for one in row) for row in rows]
    alone = [not onevision or n == 1 for n in per_row for _ in range(n)]
    sizes = [SIZES[i % len(SIZES)] for i in range(images)]
    pieces = []
    if images:
        crops = [
            image_size_to_num_patches(size, PINPOINTS, SIDE) if single else 1
            for size, single in zip(sizes, alone, strict=True)
        ]
        pixels = torch.zeros(images, max(crops), 3, SIDE, SIDE)
        for one, n in zip(pixels, crops, strict=True):
            one[:n] = noise(generator, n, 3, SIDE, SIDE)
        inputs |= {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}
        if onevision:
            inputs["batch_num_images"] = torch.tensor([n for n in per_row if n])
        limit = int(ASPECT.rsplit("_", 1)[1]) if onevision else None
        patches = (SIDE // PATCH) ** 2
        pieces = [
            [IMAGE] * (_packed(size, limit) if single else patches + 1)
            for size, single in zip(sizes, alone, strict=True)
        ]
    shown: list[list[int]] = []
    if videos:
        inputs["pixel_values_videos"] = noise(generator, videos, FRAMES, 3, SIDE, SIDE)
        side = ceil(SIDE // PATCH / 2)
        shown = [[VIDEO] * (FRAMES * side * side + onevision)] * videos
    return Media(inputs, in_order(rows, pieces, shown), one_each(rows))


def _packed(size: tuple[int, int], limit: int | None) -> int:
    """Visual tokens of an any-resolution image, as its processor counts them."""
    height, width = size

    def quality(grid: list[int]) -> tuple[int, int]:
        scale = min(grid[1] / width, grid[0] / height)
        used = min(int(width * scale) * int(height * scale), width * height)
        return used, -(grid[0] * grid[1] - used)

    best = max(PINPOINTS, key=quality)
    rows, columns = best[0] // PATCH, best[1] // PATCH
    if width / height > columns / rows:
        rows -= (rows - int(round(height * columns / width, 7))) // 2 * 2
    else:
        columns -= (columns - int(round(width * rows / height, 7))) // 2 * 2
    base = (SIDE // PATCH) ** 2
    ratio = sqrt(rows * columns / (limit * base)) if limit else 0
    if ratio > 1.1:
        rows, columns = int(rows // ratio), int(columns // ratio)
    return base + rows * (columns + 1)
