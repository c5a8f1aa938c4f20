"""Models of which nothing is known but their placeholders, and requests for them.

Hybrids and three positions a token among them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import (
    Glm4vConfig,
    Glm4vForConditionalGeneration,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
)

from unrecorded import got_ocr2
from zoo.base import IMAGE, TEXT, WORDS, loud, pad

QWEN_TOWER = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 4,
    "patch_size": 4,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "out_hidden_size": 32,
}
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
SPECIAL = {"image_token_id": IMAGE, "video_token_id": 6}
HYBRID = {
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "num_hidden_layers": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "head_dim": 8,
}


def qwen3_5() -> Any:
    """Gated DeltaNet in every other layer, and three positions a visual token."""
    text = {**TEXT, **HYBRID, "rope_parameters": ROPE | {"partial_rotary_factor": 1.0}}
    tower = QWEN_TOWER | {"num_position_embeddings": 64}
    specials = SPECIAL | {"vision_start_token_id": 7, "vision_end_token_id": 8}
    config = Qwen3_5Config(text_config=text, vision_config=tower, **specials)
    return Qwen3_5ForConditionalGeneration(config)


def glm4v() -> Any:
    """Three positions a visual token, and a tower of its own."""
    text = {**TEXT, "head_dim": 8, "rope_parameters": ROPE | {"partial_rotary_factor": 1.0}}
    tower = QWEN_TOWER | {"image_size": 32}
    config = Glm4vConfig(
        text_config=text,
        vision_config=tower,
        image_start_token_id=7,
        image_end_token_id=8,
        **SPECIAL,
    )
    return Glm4vForConditionalGeneration(config)


def grids(rows: list[int]) -> dict[str, Tensor]:
    """Pixels of images of 8 x 4 patches, 8 tokens each."""
    generator = torch.Generator().manual_seed(1)
    count = sum(rows)
    return {
        "pixel_values": torch.randn(count * 32, 3 * 2 * 16, generator=generator),
        "image_grid_thw": torch.tensor([[1, 8, 4]] * count),
    }


def squares(rows: list[int]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {"pixel_values": torch.randn(sum(rows), 3, 64, 64, generator=generator)}


# How a model is made, tokens of an image, and its pixels.
Case = tuple[Callable[[], Any], int, Callable[[list[int]], dict[str, Tensor]]]
CASES: dict[str, Case] = {
    "qwen3_5": (qwen3_5, 8, grids),
    "glm4v": (glm4v, 8, grids),
    "got_ocr2": (got_ocr2, 0, squares),
}


def built(name: str, attention: str = "sdpa", dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    model = loud(CASES[name][0]()).to(dtype)
    model.set_attn_implementation(
        {"": attention, "vision_config": attention, "text_config": attention}
    )
    return model


def request(name: str, model: Any, rows: list[int]) -> dict[str, Tensor]:
    """Rows of so many images each, padded at the left."""
    _, each, pixels = CASES[name]
    given = pixels(rows)
    if not each:
        with torch.no_grad():
            one = model.get_image_features(given["pixel_values"][:1].to(model.dtype))
        each = one.pooler_output.shape[-2]
    prompts = [
        [1, *([WORDS + r, 7, *[IMAGE] * each, 8] * count), *range(WORDS + 5, WORDS + 9 + r)]
        for r, count in enumerate(rows)
    ]
    ids, mask = pad(prompts, "left")
    given = {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in given.items()}
    types = {"mm_token_type_ids": (ids == IMAGE).long()} if "image_grid_thw" in given else {}
    return {"input_ids": ids, "attention_mask": mask, **given, **types}
