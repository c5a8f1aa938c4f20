"""Qwen2-VL."""

from __future__ import annotations

from typing import Any

from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from zoo.base import Entry
from zoo.qwen import BOTH, TOKENS, VISION, aligned, media, text_of


def qwen2_vl() -> Any:
    """Qwen2-VL."""
    vision = {**VISION, "depth": 3, "embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2}
    config = Qwen2VLConfig(vision_config=vision, text_config=text_of(), **TOKENS)
    return Qwen2VLForConditionalGeneration(config)


FAMILIES: dict[str, Entry] = {
    "qwen2_vl": Entry("Qwen2-VL", qwen2_vl, media, BOTH, aligned),
}
