"""Idefics3 and SmolVLM."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    LlamaConfig,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

from zoo.base import (
    GLOBAL,
    IMAGE,
    NEWLINE,
    PAD,
    START,
    TEXT,
    TILES,
    Entry,
    Media,
    Modality,
    Place,
    noise,
    ranges,
)
from zoo.tiles import SIDE, SQUARE, TOKENS, grids_of, tiles_of


def _sizes() -> dict[str, Any]:
    """What the configs of both have."""
    return {
        "vision_config": SQUARE,
        "text_config": LlamaConfig(**TEXT),
        "image_token_id": IMAGE,
        "scale_factor": 2,
        "pad_token_id": PAD,
        "tie_word_embeddings": False,
    }


def idefics3() -> Any:
    """Idefics3: its own SigLIP, pixel shuffle."""
    return Idefics3ForConditionalGeneration(Idefics3Config(**_sizes()))


def smolvlm() -> Any:
    """SmolVLM: as Idefics3."""
    return SmolVLMForConditionalGeneration(SmolVLMConfig(**_sizes()))


def _idefics3(model: Any, rows: list[list[Modality]], generator: torch.Generator) -> Media:
    """Tiles by row of the batch, padded with empty ones."""
    grids, pieces = grids_of(rows), []
    for lines, columns in grids:
        ids: list[int] = []
        for line in range(lines if (lines, columns) != (1, 1) else 0):
            for column in range(columns):
                ids += [START, TILES + 6 * line + column, *[IMAGE] * TOKENS]
            ids.append(NEWLINE)
        pieces.append([*ids, START, GLOBAL, *[IMAGE] * TOKENS, START])
    if not grids:
        return Media({}, [], [])
    left = iter(grids)
    tiles = [[tiles_of(next(left)) for _ in row] for row in rows]
    counts = [sum(row) for row in tiles]
    pixels = torch.zeros(len(rows), max(counts), 3, SIDE, SIDE)
    mask = torch.zeros(len(rows), max(counts), SIDE, SIDE, dtype=torch.long)
    for one, seen, n in zip(pixels, mask, counts, strict=True):
        one[:n], seen[:n] = noise(generator, n, 3, SIDE, SIDE), 1
    places: list[Place] = [
        (name, (number, where))
        for number, row in enumerate(tiles)
        for name, where in ranges("pixel_values", row)
    ]
    return Media({"pixel_values": pixels, "pixel_attention_mask": mask}, pieces, places)


FAMILIES: dict[str, Entry] = {
    "idefics3": Entry("Idefics3", idefics3, _idefics3),
    "smolvlm": Entry("SmolVLM", smolvlm, _idefics3),
}
