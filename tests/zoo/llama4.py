"""Llama 4."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from transformers import Llama4Config, Llama4ForConditionalGeneration

from zoo.base import (
    END,
    FAR,
    GLOBAL,
    IMAGE,
    NEAR,
    NEWLINE,
    SEPARATOR,
    START,
    TEXT,
    Entry,
    Media,
    Modality,
    ranges,
)
from zoo.mended import runs, with_image_outputs
from zoo.tiles import SQUARE, TOKENS, grids_of, stacked, tiles_of


def llama4(window: int = FAR) -> Any:
    """Llama 4: a CLS token at the end, pixel shuffle inside the tower, chunked attention."""
    vision = {
        **SQUARE,
        "intermediate_size": 128,
        "vision_output_dim": 32,
        "projector_input_dim": 32,
        "projector_output_dim": 32,
    }
    text = {
        **TEXT,
        "head_dim": 8,
        "intermediate_size_mlp": 64,
        "num_local_experts": 2,
        "interleave_moe_layer_step": 2,
        "no_rope_layers": [1, 0, 1],
        "layer_types": ["chunked_attention", "full_attention", "chunked_attention"],
        "attention_chunk_size": window,
        "floor_scale": window,
    }
    config = Llama4Config(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        boi_token_index=START,
        eoi_token_index=END,
        tie_word_embeddings=False,
    )
    model = Llama4ForConditionalGeneration(config)
    if runs(model):
        return model
    return with_image_outputs(Llama4ForConditionalGeneration)(config)


def _llama4(model: Any, rows: list[list[Modality]], generator: torch.Generator) -> Media:
    grids, pieces = grids_of(rows), []
    for grid in grids:
        ids = [START]
        for _ in range(grid[0] if grid != (1, 1) else 0):
            for column in range(grid[1]):
                ids += [SEPARATOR] * (column > 0) + [IMAGE] * TOKENS
            ids.append(NEWLINE)
        pieces.append([*ids, GLOBAL, *[IMAGE] * TOKENS, END])
    return Media(stacked(grids, generator), pieces, ranges("pixel_values", map(tiles_of, grids)))


FAMILIES: dict[str, Entry] = {
    "llama4": Entry("Llama 4", llama4, _llama4),
}

WINDOWED: dict[str, Entry] = {"llama4": replace(FAMILIES["llama4"], make=partial(llama4, NEAR))}
