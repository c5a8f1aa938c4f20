"""Patches in one sequence, merged 2 x 2, positions in 3-D: the Qwen-VL line."""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import Tensor

from zoo.base import (
    END,
    IMAGE,
    START,
    TEXT,
    VIDEO,
    WORDS,
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


def text_of(**changes: Any) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    return {**TEXT, "rope_parameters": rope, **changes}


def media(model: Any, rows: list[list[Modality]], generator: torch.Generator) -> Media:
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


def aligned(ids: Tensor) -> dict[str, Tensor]:
    return {"mm_token_type_ids": (ids == IMAGE).int() + 2 * (ids == VIDEO).int()}


BOTH: tuple[Modality, ...] = ("image", "video")
