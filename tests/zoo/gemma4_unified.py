"""Gemma 4 unified."""

from __future__ import annotations

from functools import partial
from typing import Any

from transformers import Gemma4UnifiedConfig, Gemma4UnifiedForConditionalGeneration

from zoo.base import END, FAR, IMAGE, START, TEXT, VIDEO, Entry
from zoo.placed import KINDS, media, mild
from zoo.qwen import BOTH

_TEXT = {**TEXT, "num_hidden_layers": len(KINDS), "head_dim": 8, "sliding_window": FAR}


def gemma4_unified() -> Any:
    """Gemma 4 unified: squares of pixels, each embedded alone."""
    own = {"layer_types": KINDS, "global_head_dim": 16, "use_bidirectional_attention": "vision"}
    config = Gemma4UnifiedConfig(
        vision_config={
            "patch_size": 2,
            "pooling_kernel_size": 2,
            "mm_embed_dim": 24,
            "mm_posemb_size": 160,
            "output_proj_dims": 24,
        },
        text_config={**_TEXT, **own},
        audio_config=None,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        audio_token_id=50,
        boi_token_id=START,
        eoi_token_id=END,
        tie_word_embeddings=False,
    )
    return mild(Gemma4UnifiedForConditionalGeneration(config))


FAMILIES: dict[str, Entry] = {
    "gemma4_unified": Entry(
        "Gemma 4 unified",
        gemma4_unified,
        partial(media, side=1, patch=4),
        BOTH,
        attends=False,
    )
}
