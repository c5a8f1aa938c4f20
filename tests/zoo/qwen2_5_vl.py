"""Qwen2.5-VL."""

from __future__ import annotations

from typing import Any

from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from zoo.base import Entry
from zoo.qwen import BOTH, MERGE, PATCH, TOKENS, VISION, aligned, media, text_of


def qwen2_5_vl() -> Any:
    """Qwen2.5-VL: windows of 2 x 2 tokens in blocks 0 and 2, full attention in 1 and 3."""
    vision = {
        **VISION,
        "depth": 4,
        "hidden_size": 32,
        "intermediate_size": 48,
        "out_hidden_size": 32,
        "window_size": 2 * MERGE * PATCH,
        "fullatt_block_indexes": [1, 3],
        "tokens_per_second": 2,
    }
    config = Qwen2_5_VLConfig(vision_config=vision, text_config=text_of(), **TOKENS)
    return Qwen2_5_VLForConditionalGeneration(config)


FAMILIES: dict[str, Entry] = {
    "qwen2_5_vl": Entry("Qwen2.5-VL", qwen2_5_vl, media, BOTH, aligned),
}
