"""Gemma 4, small and large."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from transformers import Gemma4Config, Gemma4ForConditionalGeneration

from zoo.base import (
    END,
    FAR,
    IMAGE,
    NEAR,
    START,
    TEXT,
    VIDEO,
    VISION,
    Entry,
)
from zoo.placed import KINDS, PATCH, SIDE, media, mild
from zoo.qwen import BOTH, aligned


def _gemma4(kinds: list[str], window: int, **changes: Any) -> Any:
    text = {**TEXT, "num_hidden_layers": len(kinds), "head_dim": 8, "sliding_window": window}
    vision = {
        **VISION,
        "num_key_value_heads": 4,
        "head_dim": 8,
        "patch_size": PATCH,
        "pooling_kernel_size": SIDE,
        "position_embedding_size": 160,
    }
    own = {"layer_types": kinds, "global_head_dim": 16, "hidden_size_per_layer_input": 0}
    more = {"standardize": changes.pop("standardize", False)}
    config = Gemma4Config(
        vision_config={**vision, **more},
        text_config={**text, **own, **changes},
        audio_config=None,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        audio_token_id=50,
        boi_token_id=START,
        eoi_token_id=END,
        tie_word_embeddings=False,
    )
    model = mild(Gemma4ForConditionalGeneration(config))
    if more["standardize"]:
        tower = model.model.vision_tower
        tower.std_bias.normal_(std=0.1)
        tower.std_scale.uniform_(0.5, 1.5)
    return model


def small(window: int = FAR) -> Any:
    """As E2B and E4B: inputs of each layer by token, last layers that share keys and values."""
    per_layer = {"hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 128}
    return _gemma4(KINDS, window, num_kv_shared_layers=2, use_double_wide_mlp=True, **per_layer)


def large(window: int = FAR) -> Any:
    """As 26B-A4B and 31B: experts, images seen both ways where a window is, keys as values."""
    kinds = ["sliding_attention", "full_attention", "full_attention"]
    experts = {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 24}
    keys = {"attention_k_eq_v": True, "num_global_key_value_heads": 1}
    return _gemma4(
        kinds,
        window,
        enable_moe_block=True,
        use_bidirectional_attention="vision",
        standardize=True,
        **experts,
        **keys,
    )


FAMILIES: dict[str, Entry] = {
    "gemma4": Entry("Gemma 4", large, media, BOTH, aligned),
    "gemma4_small": Entry("Gemma 4 (E2B, E4B)", small, media, BOTH, aligned),
}
WINDOWED: dict[str, Entry] = {
    "gemma4": replace(FAMILIES["gemma4"], make=partial(large, NEAR)),
    "gemma4_small": replace(FAMILIES["gemma4_small"], make=partial(small, NEAR)),
}
