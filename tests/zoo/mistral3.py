"""Mistral 3 and Mistral Large 4."""

from __future__ import annotations

from typing import Any

import transformers
from transformers import (
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    PixtralVisionConfig,
)

from zoo.base import IMAGE, TEXT, Entry
from zoo.crops import config_of
from zoo.pixtral import PIXTRAL, own_resolution


def mistral3() -> Any:
    """Mistral 3: Pixtral's tower, every 2 x 2 patches merged."""
    config = config_of(
        Mistral3Config,
        PixtralVisionConfig(**PIXTRAL),
        MistralConfig(**TEXT, sliding_window=None),
        spatial_merge_size=2,
    )
    return Mistral3ForConditionalGeneration(config)


def mistral_large4() -> Any:
    """Mistral Large 4: that tower; the decoder caches latents and reads a few columns each.

    The first layer's latents serve the last as well, as do the columns that the second chose, which
    does not turn. A column scores nothing where no head of the index has it, so there are many.
    """
    text = transformers.MistralLarge4TextConfig(
        **{**TEXT, "num_key_value_heads": TEXT["num_attention_heads"]},
        kv_lora_rank=16,
        qk_nope_head_dim=4,
        qk_rope_head_dim=4,
        v_head_dim=8,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        index_topk=12,
        index_head_dim=8,
        index_n_heads=16,
        indexer_types=["full", "full", "shared"],
        no_rope_layers=[1, 0, 1],
        kv_source_layers=[0, 1, 0],
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 2.0,
            "original_max_position_embeddings": TEXT["max_position_embeddings"] // 2,
            "attention_factor": 1.0,
        },
    )
    config = transformers.MistralLarge4Config(
        vision_config=PixtralVisionConfig(**PIXTRAL),
        text_config=text,
        spatial_merge_size=2,
        image_token_index=IMAGE,
        tie_word_embeddings=False,
    )
    return transformers.MistralLarge4ForConditionalGeneration(config)


FAMILIES: dict[str, Entry] = {
    "mistral3": Entry("Mistral 3", mistral3, own_resolution),
    "mistral_large4": Entry("Mistral Large 4", mistral_large4, own_resolution),
}
