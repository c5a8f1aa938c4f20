"""Qwen3.5 and its mixture of experts: Qwen3-VL's tower, and a decoder that is half recurrent."""

from __future__ import annotations

from typing import Any

from transformers import (
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeConfig,
    Qwen3_5MoeForConditionalGeneration,
)

from zoo.base import Entry
from zoo.qwen import BOTH, TOKENS, VISION, aligned, media, text_of

TOWER = {
    **VISION,
    "depth": 4,
    "hidden_size": 32,
    "intermediate_size": 48,
    "out_hidden_size": 32,
    "num_position_embeddings": 36,
}


def _text(**changes: Any) -> dict[str, Any]:
    text = text_of(
        num_hidden_layers=4,
        layer_types=["linear_attention", "full_attention"] * 2,
        head_dim=16,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        **changes,
    )
    # Half of each head's values turn, as a quarter do in the released models.
    more = {"mrope_interleaved": True, "partial_rotary_factor": 0.5}
    return {**text, "rope_parameters": {**text["rope_parameters"], **more}}


def qwen3_5() -> Any:
    """Qwen3.5: every other decoder layer is a gated delta rule."""
    config = Qwen3_5Config(vision_config=dict(TOWER), text_config=_text(), **TOKENS)
    return Qwen3_5ForConditionalGeneration(config)


def qwen3_5_moe() -> Any:
    """Qwen3.5 with experts, two of four a token, and one beside them."""
    text = _text(
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=24,
    )
    config = Qwen3_5MoeConfig(vision_config=dict(TOWER), text_config=text, **TOKENS)
    return Qwen3_5MoeForConditionalGeneration(config)


FAMILIES: dict[str, Entry] = {
    "qwen3_5": Entry("Qwen3.5", qwen3_5, media, BOTH, aligned),
    "qwen3_5_moe": Entry("Qwen3.5-MoE", qwen3_5_moe, media, BOTH, aligned),
}
