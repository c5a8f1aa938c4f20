"""Tiny random checkpoints, with processors and tokenizers, that vLLM serves from a folder.

Run `python tiny_checkpoints.py FAMILY FOLDER`. Weights are scaled up: with the default
initialisation every logit is near zero and errors hide. Heads have 32 channels, the fewest that
vLLM's attention on CPUs takes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

QWEN = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
INTERN = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<img>",
    "</img>",
    "<IMG_CONTEXT>",
    "<video>",
)
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if 'image' in c['type'] %}IMAGE{% elif 'video' in c['type'] %}VIDEO"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SIDE, PATCH, MERGE = 56, 4, 2
TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 4096,
}
VISION = {
    "num_heads": 4,
    "in_channels": 3,
    "patch_size": PATCH,
    "spatial_merge_size": MERGE,
    "temporal_patch_size": 2,
}


def tokenizer(special: tuple[str, ...], image: str, video: str, **extra: Any) -> Any:
    """One token a byte, and the special ones."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {word: i for i, word in enumerate((*special, *letters))}
    inner = Tokenizer(models.BPE(vocabulary, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(special),
        chat_template=TEMPLATE.replace("IMAGE", image).replace("VIDEO", video),
        **extra,
    )


def _text(words: Any, **changes: Any) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 4, 4]}
    ends = {"bos_token_id": None, "eos_token_id": words.eos_token_id}
    return {**TEXT, "vocab_size": len(words), "rope_parameters": rope, **ends, **changes}


def _qwen(kind: str) -> tuple[Any, Any]:
    wrapped = "<|vision_start|>{}<|vision_end|>"
    words = tokenizer(QWEN, wrapped.format("<|image_pad|>"), wrapped.format("<|video_pad|>"))
    number = words.convert_tokens_to_ids
    tokens = {
        "image_token_id": number("<|image_pad|>"),
        "video_token_id": number("<|video_pad|>"),
        "vision_start_token_id": number("<|vision_start|>"),
        "vision_end_token_id": number("<|vision_end|>"),
        "tie_word_embeddings": False,
    }
    grid = {"patch_size": PATCH, "merge_size": MERGE, "temporal_patch_size": 2}
    # Small pictures keep their size, to a multiple of eight pixels.
    size = {"shortest_edge": 8 * 8, "longest_edge": 128 * 128}
    # vLLM normalises on the device, videos by what holds for images.
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    images = Qwen2VLImageProcessor(**grid, **half, size=size)
    common = {"tokenizer": words, "image_processor": images, "chat_template": words.chat_template}
    if kind == "qwen2_vl":
        vision = {**VISION, "depth": 3, "embed_dim": 64, "hidden_size": 64, "mlp_ratio": 2}
        config: Any = Qwen2VLConfig(vision_config=vision, text_config=_text(words), **tokens)
        model: Any = Qwen2VLForConditionalGeneration(config)
        videos: Any = Qwen2VLVideoProcessor(**grid, **half, size=size)
        return model, Qwen2VLProcessor(**common, video_processor=videos)
    if kind == "qwen2_5_vl":
        vision = {
            **VISION,
            "depth": 4,
            "hidden_size": 64,
            "intermediate_size": 96,
            "out_hidden_size": 64,
            "window_size": 2 * MERGE * PATCH,
            "fullatt_block_indexes": [1, 3],
            "tokens_per_second": 2,
        }
        config = Qwen2_5_VLConfig(vision_config=vision, text_config=_text(words), **tokens)
        videos = Qwen2VLVideoProcessor(**grid, **half, size=size)
        model = Qwen2_5_VLForConditionalGeneration(config)
        return model, Qwen2_5_VLProcessor(**common, video_processor=videos)
    vision = {
        **VISION,
        "depth": 4,
        "hidden_size": 64,
        "intermediate_size": 96,
        "out_hidden_size": 64,
        "num_position_embeddings": 36,
        "deepstack_visual_indexes": [0, 2],
    }
    rope = {**_text(words)["rope_parameters"], "mrope_interleaved": True}
    text = _text(words, head_dim=32, rope_parameters=rope)
    config = Qwen3VLConfig(vision_config=vision, text_config=text, **tokens)
    videos = Qwen3VLVideoProcessor(**grid, **half, size=size)
    processor = Qwen3VLProcessor(**common, video_processor=videos)
    return Qwen3VLForConditionalGeneration(config), processor


def _internvl() -> tuple[Any, Any]:
    own = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    words = tokenizer(INTERN, "<IMG_CONTEXT>\n", "<video>\n", extra_special_tokens=own)
    vision = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": [SIDE, SIDE],
        "patch_size": [7, 7],
    }
    text = {"model_type": "qwen2", **_text(words)}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0}
    config = InternVLConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=words.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=16,
    )
    size = {"height": SIDE, "width": SIDE}
    processor = InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(
            size=size, crop_to_patches=True, min_patches=1, max_patches=4
        ),
        tokenizer=words,
        video_processor=InternVLVideoProcessor(size=size),
        image_seq_length=16,
        chat_template=words.chat_template,
    )
    return InternVLForConditionalGeneration(config), processor


FAMILIES: dict[str, Callable[[], tuple[Any, Any]]] = {
    "qwen2_vl": lambda: _qwen("qwen2_vl"),
    "qwen2_5_vl": lambda: _qwen("qwen2_5_vl"),
    "qwen3_vl": lambda: _qwen("qwen3_vl"),
    "internvl": _internvl,
}


def build(family: str, folder: Path, seed: int = 0) -> Path:
    """Write a checkpoint of a family into a folder, float32."""
    torch.manual_seed(seed)
    model, processor = FAMILIES[family]()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1 and "norm" not in name:
                weight.normal_(std=0.8 / weight[0].numel() ** 0.5)
            elif "norm" not in name and "lambda" not in name:
                weight.normal_(std=0.1)
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


if __name__ == "__main__":
    build(sys.argv[1], Path(sys.argv[2]))
