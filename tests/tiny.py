"""Tiny random models of the real classes, and requests for them without a tokenizer.

Weights are scaled up: with the default initialisation every logit is near zero and errors hide.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    Dinov2Config,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    Qwen2Config,
    SiglipVisionConfig,
)

from zoo.base import unusual_scales

IMAGE, PAD, EOS = 5, 0, 2
SIDE, PATCH = 56, 14  # 4 x 4 = 16 patches a crop
VOCABULARY = 64


def tower(kind: str = "clip") -> Any:
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    common = {**shape, "num_attention_heads": 4, "image_size": SIDE, "patch_size": PATCH}
    if kind == "dinov2":
        return Dinov2Config(**{**common, "intermediate_size": None}, mlp_ratio=2)
    return {"clip": CLIPVisionConfig, "siglip": SiglipVisionConfig}[kind](**common)


def model(
    family: str = "llava",
    attention: str = "sdpa",
    kind: str = "clip",
    seed: int = 0,
    **changes: Any,
) -> Any:
    """A model of a family ("llava" or "llava_next") with scaled-up random weights."""
    text = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        pad_token_id=PAD,
        bos_token_id=1,
        eos_token_id=EOS,
    )
    common = {
        "vision_config": tower(kind),
        "text_config": text,
        "image_token_id": IMAGE,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "full" if kind == "siglip" else "default",
        **changes,
    }
    torch.manual_seed(seed)
    if family == "llava":
        built: Any = LlavaForConditionalGeneration(LlavaConfig(**common))
    else:
        pinpoints = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE], [SIDE, 3 * SIDE]]
        config = LlavaNextConfig(**common, image_grid_pinpoints=pinpoints)
        built = LlavaNextForConditionalGeneration(config)
    with torch.no_grad():
        for name, weight in built.named_parameters():
            if weight.ndim > 1 and "norm" not in name:
                weight.normal_(std=0.8 / weight.shape[-1] ** 0.5)
            elif "norm" not in name and "lambda" not in name:
                weight.normal_(std=0.1)
    built.set_attn_implementation(attention)
    built.generation_config.pad_token_id = PAD
    # No end token: every run goes its full length and steps can be compared.
    built.generation_config.eos_token_id = None
    return unusual_scales(built.eval())


def text_config(kv_heads: int = 2, **changes: Any) -> Any:
    return LlamaConfig(
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": kv_heads,
            "max_position_embeddings": 512,
            "pad_token_id": PAD,
            "bos_token_id": 1,
            "eos_token_id": EOS,
            **changes,
        }
    )


def sliding_config() -> Any:
    """The same with a window of 12 columns in the middle layer."""
    return Qwen2Config(
        **{
            **text_config().to_dict(),
            "model_type": "qwen2",
            "use_sliding_window": True,
            "sliding_window": 12,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        }
    )


@dataclass
class Request:
    """A batch as a processor would make it."""

    inputs: dict[str, Tensor]
    lengths: list[int]  # visual tokens of each image


SIZES = [(90, 60), (50, 160), (200, 40), (64, 64), (33, 100)]


def request(
    built: Any, images: list[int], text: int | list[int] = 5, seed: int = 1, side: str = "left"
) -> Request:
    """A batch whose rows hold `images[row]` images of different sizes among random text."""
    generator = torch.Generator().manual_seed(seed)
    count = sum(images)
    inputs: dict[str, Tensor] = {}
    lengths: list[int] = []
    if count and built.config.model_type == "llava":
        inputs["pixel_values"] = torch.randn(count, 3, SIDE, SIDE, generator=generator)
    elif count:
        from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

        sizes = torch.tensor([SIZES[i % len(SIZES)] for i in range(count)])
        crops = [
            image_size_to_num_patches(s, built.config.image_grid_pinpoints, SIDE) for s in sizes
        ]
        pixels = torch.zeros(count, max(crops), 3, SIDE, SIDE)
        for one, n in zip(pixels, crops, strict=True):
            one[:n] = torch.randn(n, 3, SIDE, SIDE, generator=generator)
        inputs |= {"pixel_values": pixels, "image_sizes": sizes}
    if count:
        with torch.no_grad():
            features = built.get_image_features(**inputs).pooler_output
        lengths = [len(f) for f in features]

    def words(n: int) -> list[int]:
        return torch.randint(6, VOCABULARY, (n,), generator=generator).tolist()

    rows, left = [], list(lengths)
    for row, n in enumerate(images):
        ids = [1, *words(2 + row)]
        for _ in range(n):
            ids += [IMAGE] * left.pop(0) + words(3)
        rows.append(ids + words(text if isinstance(text, int) else text[row]))
    longest = max(map(len, rows))
    padded, mask = [], []
    for ids in rows:
        pad = [PAD] * (longest - len(ids))
        zeros, ones = [0] * len(pad), [1] * len(ids)
        padded.append(pad + ids if side == "left" else ids + pad)
        mask.append(zeros + ones if side == "left" else ones + zeros)
    inputs |= {"input_ids": torch.tensor(padded), "attention_mask": torch.tensor(mask)}
    return Request(inputs, lengths)


def dropped_columns(req: Request, kept: list[Tensor]) -> Tensor:
    """[B, L] bool, written apart from the library: which columns pruning takes out."""
    ids = req.inputs["input_ids"]
    dropped = torch.zeros_like(ids, dtype=torch.bool)
    places = [
        (row, col)
        for row, line in enumerate(ids.tolist())
        for col, t in enumerate(line)
        if t == IMAGE
    ]
    start = 0
    for indices, length in zip(kept, req.lengths, strict=True):
        keep = set(indices.tolist())
        for i in range(length):
            if i not in keep:
                dropped[places[start + i]] = True
        start += length
    return dropped


def positions_of(mask: Tensor, dropped: Tensor, policy: str) -> Tensor:
    """[B, L] positions of the full sequence under a policy, written apart from the library."""
    counted = mask.bool() if policy == "original" else mask.bool() & ~dropped
    return (counted.long().cumsum(1) - 1).clamp(min=0)
