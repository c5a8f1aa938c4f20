"""Tiny models of classes that no record knows, and requests for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    Cohere2Config,
    Cohere2VisionConfig,
    Cohere2VisionForConditionalGeneration,
    DeepseekVLConfig,
    DeepseekVLForConditionalGeneration,
    GotOcr2Config,
    GotOcr2ForConditionalGeneration,
    LlamaConfig,
    Ovis2Config,
    Ovis2ForConditionalGeneration,
    Qwen2Config,
    SiglipVisionConfig,
    VipLlavaConfig,
    VipLlavaForConditionalGeneration,
)

from vlmprune.runtime.family import family_of
from zoo.base import ALTERNATING, IMAGE, TEXT, WORDS, loud, pad
from zoo.tiles import SQUARE

SIDE = SQUARE["image_size"]


def cohere2_vision() -> Any:
    """No CLS token, squares of 2 x 2 merged, sliding windows."""
    config = Cohere2VisionConfig(
        vision_config=SiglipVisionConfig(**SQUARE, vision_use_head=False),
        text_config=Cohere2Config(**TEXT, sliding_window=1024, layer_types=ALTERNATING),
        image_token_id=IMAGE,
        alignment_intermediate_size=64,
    )
    return Cohere2VisionForConditionalGeneration(config)


def vipllava() -> Any:
    """A CLS token that is dropped, and features of two layers."""
    config = VipLlavaConfig(
        vision_config=CLIPVisionConfig(**SQUARE),
        text_config=LlamaConfig(**TEXT),
        image_token_index=IMAGE,
    )
    # Its name in earlier releases and in later ones.
    config.vision_feature_layers = config.vision_feature_layer = [-2, 1]
    return VipLlavaForConditionalGeneration(config)


def deepseek_vl() -> Any:
    """The projector under another name."""
    config = DeepseekVLConfig(
        vision_config=SiglipVisionConfig(**SQUARE, vision_use_head=False),
        text_config=LlamaConfig(**TEXT),
        image_token_id=IMAGE,
    )
    return DeepseekVLForConditionalGeneration(config)


def ovis2() -> Any:
    """Visual tokens are mixtures of a table's rows."""
    config = Ovis2Config(
        vision_config={**SQUARE, "vocab_size": 64},
        text_config=Qwen2Config(**TEXT),
        image_token_id=IMAGE,
        vocab_size=TEXT["vocab_size"],
        hidden_size=TEXT["hidden_size"],
    )
    return Ovis2ForConditionalGeneration(config)


def got_ocr2() -> Any:
    """Convolutions between the tower and the language model, which mix patches."""
    vision = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 64,
        "patch_size": 8,
        "output_channels": 16,
        "mlp_dim": 32,
        "global_attn_indexes": [1],
        "window_size": 4,
    }
    config = GotOcr2Config(
        text_config=Qwen2Config(**TEXT), vision_config=vision, image_token_id=IMAGE
    )
    return GotOcr2ForConditionalGeneration(config)


MAKES = [cohere2_vision, vipllava, deepseek_vl, ovis2]


def built_by(make: Callable[[], Any], attention: str = "sdpa") -> Any:
    torch.manual_seed(0)
    model = loud(make())
    model.set_attn_implementation(
        {"": attention, "vision_config": attention, "text_config": attention}
    )
    return model


def request(built: Any, rows: list[int]) -> dict[str, Tensor]:
    """A batch whose row r holds `rows[r]` images."""
    each = (SIDE // SQUARE["patch_size"]) ** 2 // merge(built) ** 2
    prompts = [
        [1, *([WORDS + r, *[IMAGE] * each] * count), *range(WORDS + 5, WORDS + 9 + r)]
        for r, count in enumerate(rows)
    ]
    ids, mask = pad(prompts, "left")
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(sum(rows), 3, SIDE, SIDE, generator=generator)
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}


def merge(built: Any) -> int:
    return family_of(built).media[0].merge(built)  # type: ignore[attr-defined]
