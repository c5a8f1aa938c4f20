"""Tiny random checkpoints of LLaVA-NeXT and LLaVA-OneVision, as `tiny_checkpoints` has others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from checkpoints import save, scale_up
from tiny_checkpoints import tokenizer
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    Qwen2Config,
    SiglipVisionConfig,
)

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>")
SIDE, PATCH = 56, 7
PINPOINTS = [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]]
# So many crops that a large image is scaled down.
WIDE = [[SIDE * a, SIDE * b] for a in range(1, 5) for b in range(1, 5)]
TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 4096,
}
VISION = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": SIDE,
    "patch_size": PATCH,
}


def _ends(words: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(words),
        "bos_token_id": None,
        "eos_token_id": words.eos_token_id,
        "pad_token_id": words.pad_token_id,
    }


def next_(folder: Path) -> Path:
    """LLaVA-NeXT: CLIP, a Llama decoder."""
    words = tokenizer(SPECIAL, "<image>\n", "<video>\n")
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**VISION, projection_dim=64),
        text_config=LlamaConfig(**TEXT, head_dim=32, **_ends(words)),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=PINPOINTS,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    size = {"shortest_edge": SIDE}
    images = LlavaNextImageProcessor(
        size=size, crop_size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=PINPOINTS
    )
    processor = LlavaNextProcessor(
        image_processor=images,
        tokenizer=words,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=words.chat_template,
    )
    return _write(LlavaNextForConditionalGeneration(config), processor, folder)


def onevision(folder: Path) -> Path:
    """LLaVA-OneVision: SigLIP without a CLS token, a Qwen2 decoder, images and videos."""
    words = tokenizer(SPECIAL, "<image>\n", "<video>\n")
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**VISION, vision_use_head=False),
        text_config=Qwen2Config(**TEXT, **_ends(words)),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        video_token_index=words.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=WIDE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_9",
        tie_word_embeddings=False,
    )
    size = {"height": SIDE, "width": SIDE}
    processor = LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=WIDE),
        tokenizer=words,
        video_processor=LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=(SIDE // PATCH) ** 2,
        vision_feature_select_strategy="full",
        chat_template=words.chat_template,
    )
    return _write(LlavaOnevisionForConditionalGeneration(config), processor, folder)


def _write(model: Any, processor: Any, folder: Path) -> Path:
    scale_up(model)
    model.generation_config.eos_token_id = None
    prefixes = {
        "model.vision_tower.": "vision_tower.vision_model.",
        "vision_tower.": "vision_tower.vision_model.",
    }
    save(model, folder, prefixes)
    processor.save_pretrained(folder)
    return folder
