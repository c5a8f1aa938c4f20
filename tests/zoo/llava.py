"""The LLaVA line: one crop, any resolution, pooled video, and Pixtral's own resolution."""

from __future__ import annotations

import inspect
from math import ceil, sqrt
from typing import Any

import torch
import transformers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextVideoConfig,
    LlavaNextVideoForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    PixtralVisionConfig,
    Qwen2Config,
    SiglipVisionConfig,
    VideoLlavaConfig,
    VideoLlavaForConditionalGeneration,
)
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from zoo.base import (
    BREAK,
    END,
    IMAGE,
    TEXT,
    VIDEO,
    VISION,
    Entry,
    Media,
    Modality,
    flat,
    in_order,
    noise,
    one_each,
)

SIDE, PATCH = 56, 14  # a crop of 4 x 4 patches
# LLaVA-OneVision reads its limit off this name: beyond two crops' worth of patches it scales down.
ASPECT = "anyres_max_2"
PINPOINTS = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE], [SIDE, 3 * SIDE]]
# (height, width) before processing: wide, tall and square, with and without padding to cut away.
SIZES = [(90, 60), (50, 160), (200, 40), (64, 64), (33, 100)]
# (rows, columns) of visual tokens of images that keep their own resolution.
OWN = [(3, 2), (2, 4), (4, 1), (1, 3)]
FRAMES = 3

CLIP = {**VISION, "image_size": SIDE, "patch_size": PATCH}
PIXTRAL = {**VISION, "image_size": 64, "patch_size": 8, "head_dim": 8}


def _config(cls: Any, vision: Any, text: Any, **changes: Any) -> Any:
    tokens = {"image_token_index": IMAGE}
    if "video_token_index" in inspect.signature(cls).parameters:
        tokens["video_token_index"] = VIDEO
    return cls(
        vision_config=vision, text_config=text, tie_word_embeddings=False, **tokens, **changes
    )


def llava() -> Any:
    """LLaVA-1.5: CLIP, second-last layer, CLS dropped."""
    return LlavaForConditionalGeneration(
        _config(
            LlavaConfig,
            CLIPVisionConfig(**CLIP),
            LlamaConfig(**TEXT),
            vision_feature_layer=-2,
            vision_feature_select_strategy="default",
        )
    )


def llava_next() -> Any:
    """LLaVA-NeXT: any resolution."""
    config = _config(
        LlavaNextConfig,
        CLIPVisionConfig(**CLIP),
        MistralConfig(**TEXT, sliding_window=None),
        image_grid_pinpoints=PINPOINTS,
    )
    return LlavaNextForConditionalGeneration(config)


def llava_next_video() -> Any:
    """LLaVA-NeXT-Video: any-resolution images, frames pooled 2 x 2 before the projector."""
    config = _config(
        LlavaNextVideoConfig,
        CLIPVisionConfig(**CLIP),
        LlamaConfig(**TEXT),
        image_grid_pinpoints=PINPOINTS,
    )
    return LlavaNextVideoForConditionalGeneration(config)


def llava_onevision() -> Any:
    """LLaVA-OneVision: SigLIP, any resolution scaled down where large, frames pooled after."""
    config = _config(
        LlavaOnevisionConfig,
        SiglipVisionConfig(**CLIP, vision_use_head=False),
        Qwen2Config(**TEXT),
        image_grid_pinpoints=PINPOINTS,
        vision_aspect_ratio=ASPECT,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    return LlavaOnevisionForConditionalGeneration(config)


def video_llava() -> Any:
    """Video-LLaVA: a tower for images and one for frames, whose CLS tokens are passed on."""
    config = _config(VideoLlavaConfig, CLIPVisionConfig(**CLIP), LlamaConfig(**TEXT))
    return VideoLlavaForConditionalGeneration(config)


def pixtral() -> Any:
    """Pixtral: its tower, at the image's own resolution, in LLaVA's class."""
    config = _config(
        LlavaConfig,
        PixtralVisionConfig(**PIXTRAL),
        MistralConfig(**TEXT, sliding_window=None),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    return LlavaForConditionalGeneration(config)


def mistral3() -> Any:
    """Mistral 3: Pixtral's tower, every 2 x 2 patches merged."""
    config = _config(
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


def _one_crop(model: Any, rows: list[list[Modality]], generator: torch.Generator) -> Media:
    count = flat(rows, "image")
    pixels = {"pixel_values": noise(generator, count, 3, SIDE, SIDE)} if count else {}
    return Media(pixels, [[IMAGE] * (SIDE // PATCH) ** 2] * count, one_each(rows))


def _any_resolution(model: Any, rows: list[list[Modality]], generator: torch.Generator) -> Media:
    """Any-resolution images; a row of several images gets one crop each in LLaVA-OneVision."""
    inputs: dict[str, Any] = {}
    images, videos = flat(rows, "image"), flat(rows, "video")
    onevision = model.config.model_type == "llava_onevision"
    # The processor tells rows of one image from rows of several, and crops only the former.
    per_row = [sum(one == "image" for one in row) for row in rows]
    alone = [not onevision or n == 1 for n in per_row for _ in range(n)]
    sizes = [SIZES[i % len(SIZES)] for i in range(images)]
    pieces = []
    if images:
        crops = [
            image_size_to_num_patches(size, PINPOINTS, SIDE) if single else 1
            for size, single in zip(sizes, alone, strict=True)
        ]
        pixels = torch.zeros(images, max(crops), 3, SIDE, SIDE)
        for one, n in zip(pixels, crops, strict=True):
            one[:n] = noise(generator, n, 3, SIDE, SIDE)
        inputs |= {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}
        if onevision:
            inputs["batch_num_images"] = torch.tensor([n for n in per_row if n])
        limit = int(ASPECT.rsplit("_", 1)[1]) if onevision else None
        patches = (SIDE // PATCH) ** 2
        pieces = [
            [IMAGE] * (_packed(size, limit) if single else patches + 1)
            for size, single in zip(sizes, alone, strict=True)
        ]
    shown: list[list[int]] = []
    if videos:
        inputs["pixel_values_videos"] = noise(generator, videos, FRAMES, 3, SIDE, SIDE)
        side = ceil(SIDE // PATCH / 2)
        shown = [[VIDEO] * (FRAMES * side * side + onevision)] * videos
    return Media(inputs, in_order(rows, pieces, shown), one_each(rows))


def _packed(size: tuple[int, int], limit: int | None) -> int:
    """Visual tokens of an any-resolution image, as its processor counts them."""
    height, width = size

    def quality(grid: list[int]) -> tuple[int, int]:
        scale = min(grid[1] / width, grid[0] / height)
        used = min(int(width * scale) * int(height * scale), width * height)
        return used, -(grid[0] * grid[1] - used)

    best = max(PINPOINTS, key=quality)
    rows, columns = best[0] // PATCH, best[1] // PATCH
    if width / height > columns / rows:
        rows -= (rows - int(round(height * columns / width, 7))) // 2 * 2
    else:
        columns -= (columns - int(round(width * rows / height, 7))) // 2 * 2
    base = (SIDE // PATCH) ** 2
    ratio = sqrt(rows * columns / (limit * base)) if limit else 0
    if ratio > 1.1:
        rows, columns = int(rows // ratio), int(columns // ratio)
    return base + rows * (columns + 1)


def _two_towers(model: Any, rows: list[list[Modality]], generator: torch.Generator) -> Media:
    images, videos = flat(rows, "image"), flat(rows, "video")
    inputs = {}
    # The argument was renamed; the processor of each release fits its model.
    takes = inspect.signature(type(model).forward).parameters
    name = "pixel_values" if "pixel_values" in takes else "pixel_values_images"
    if images:
        inputs[name] = noise(generator, images, 3, SIDE, SIDE)
    if videos:
        inputs["pixel_values_videos"] = noise(generator, videos, FRAMES, 3, SIDE, SIDE)
    patches = (SIDE // PATCH) ** 2
    shown = [[VIDEO] * FRAMES * (patches + 1)] * videos
    pieces = in_order(rows, [[IMAGE] * patches] * images, shown)
    return Media(inputs, pieces, one_each(rows, name))


def _own_resolution(model: Any, rows: list[list[Modality]], generator: torch.Generator) -> Media:
    """Images of their own size, padded to the largest; each line of patches ends in a token."""
    count = flat(rows, "image")
    if not count:
        return Media({}, [], [])
    step = 8 * getattr(model.config, "spatial_merge_size", 1)
    grids = [OWN[i % len(OWN)] for i in range(count)]
    sizes = [(rows * step, columns * step) for rows, columns in grids]
    pixels = torch.zeros(count, 3, max(h for h, _ in sizes), max(w for _, w in sizes))
    pieces = []
    for one, (height, width), (lines, columns) in zip(pixels, sizes, grids, strict=True):
        one[:, :height, :width] = noise(generator, 3, height, width)
        pieces.append(([IMAGE] * columns + [BREAK]) * lines)
        pieces[-1][-1] = END
    inputs = {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}
    return Media(inputs, pieces, one_each(rows))


FAMILIES: dict[str, Entry] = {
    "llava": Entry("LLaVA-1.5", llava, _one_crop),
    "llava_next": Entry("LLaVA-NeXT", llava_next, _any_resolution),
    "llava_onevision": Entry(
        "LLaVA-OneVision", llava_onevision, _any_resolution, ("image", "video")
    ),
    "llava_next_video": Entry(
        "LLaVA-NeXT-Video", llava_next_video, _any_resolution, ("image", "video")
    ),
    "video_llava": Entry("Video-LLaVA", video_llava, _two_towers, ("image", "video")),
    "pixtral": Entry("Pixtral", pixtral, _own_resolution),
    "mistral3": Entry("Mistral 3", mistral3, _own_resolution),
    "mistral_large4": Entry("Mistral Large 4", mistral_large4, _own_resolution),
}
