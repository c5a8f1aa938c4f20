"""Requests of Gemma 4, with and without a tower: patches with their places, padded."""

from __future__ import annotations

import inspect
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from transformers import Gemma4ForConditionalGeneration

from zoo.base import (
    END,
    IMAGE,
    START,
    VIDEO,
    WORDS,
    Media,
    Modality,
    flat,
    in_order,
    noise,
    one_each,
    ranges,
)

PATCH, SIDE = 4, 2  # pixels of a patch, patches of the side of a visual token
# As the small ones' layers: those at the end share what the last one before has of each kind.
KINDS = ["sliding_attention", "full_attention"] * 3
# The fewest visual tokens of an image to which the processor pads.
FEWEST = 70
# (rows, columns) of patches of the images of a batch, and (frames, rows, columns) of its videos.
IMAGES = [(4, 10), (6, 6), (8, 4), (6, 8)]
VIDEOS = [(2, 4, 6), (3, 6, 4)]
# Early releases take the videos of a batch as one tensor of [videos, frames, …].
LISTED = (
    "num_frames_per_video" in inspect.signature(Gemma4ForConditionalGeneration.forward).parameters
)


def mild(model: Any) -> Any:
    """Shorter queries: of two norms of weight 1 attention is so sharp that rounding shows."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "q_norm" in name:
                weight.fill_(0.35)
    return model


def _placed(rows: int, columns: int, length: int) -> Tensor:
    """[length, 2] the places of a picture's patches, then those of padding."""
    at = torch.arange(rows * columns)
    places = torch.full((length, 2), -1)
    places[: len(at)] = torch.stack((at % columns, at // columns), dim=-1)
    return places


def media(
    model: Any,
    rows: list[list[Modality]],
    generator: torch.Generator,
    side: int = SIDE,
    patch: int = PATCH,
) -> Media:
    """Patches with their places, of which `side` x `side` make a visual token."""
    grids = [IMAGES[i % len(IMAGES)] for i in range(flat(rows, "image"))]
    videos = [VIDEOS[i % len(VIDEOS)] for i in range(flat(rows, "video"))]
    if not LISTED:
        videos = [(2, *size) for _, *size in videos]
    inputs: dict[str, Tensor] = {}
    where = one_each(rows)

    def placed(height: int, width: int) -> Tensor:
        return _placed(height * side // SIDE, width * side // SIDE, FEWEST * side**2)

    def pixels(places: Tensor) -> Tensor:
        random = noise(generator, *places.shape[:-1], 3 * patch**2)
        return random * (places[..., :1] >= 0)

    if grids:
        inputs["image_position_ids"] = torch.stack([placed(*grid) for grid in grids])
        inputs["pixel_values"] = pixels(inputs["image_position_ids"])
    if videos:
        shown = [placed(*size).expand(frames, -1, -1) for frames, *size in videos]
        inputs["video_position_ids"] = torch.cat(shown) if LISTED else torch.stack(shown)
        inputs["pixel_values_videos"] = pixels(inputs["video_position_ids"])
        if LISTED:
            counts = [frames for frames, *_ in videos]
            inputs["num_frames_per_video"] = torch.tensor(counts)
            own = ranges("pixel_values_videos", counts)
            where = in_order(rows, [p for p in where if p[0] == "pixel_values"], own)
    images = [[START, *[IMAGE] * (h * w // SIDE**2), END] for h, w in grids]
    # Each frame stands behind the time at which it was shown.
    pieces = [
        [*chain(*([WORDS + i, START, *[VIDEO] * (h * w // SIDE**2), END] for i in range(frames)))]
        for frames, h, w in videos
    ]
    return Media(inputs, in_order(rows, images, pieces), where)
