"""FLOPs and bytes of a vision-language model, as the formulas behind the published tables.

A multiply and an add count as two FLOPs. Configs are read by attribute only, in the field names of
Hugging Face Transformers, so anything with those fields will do.

Source: the tables of FasterVLM, VisPruner and CDPruner, whose figures these formulas reproduce.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vlmprune.hosts import config as configs
from vlmprune.hosts import sizes


def prefill_flops(config: Any, visual_tokens: int) -> float:
    """FLOPs that the decoder layers spend on the visual tokens of one prompt at prefill.

    Per layer `2 * (2nd*q + 2nd*kv + 2n^2*q + 3ndm)` for n tokens, hidden size d, feed-forward size
    m, `q = heads * head_dim` and `kv = kv_heads * head_dim`. With as many KV heads as query heads
    and q = d this is the published `2 * (4nd^2 + 2n^2d + 3ndm)`.

    As in the published tables the text tokens, embeddings, norms, rotary angles and the output head
    do not count, and attention counts as a full n x n square although it is causal.

    Args:
        config: a VLM's config (its `text_config` is used) or a decoder's own config.
        visual_tokens: number n of visual tokens that enter the decoder, 0 or more.

    Returns:
        FLOPs (not TFLOPs), as a float.

    Raises:
        ValueError: a negative count, or a config that lacks a field.
    """
    return float(sizes.decoder_depth(config) * _layer_flops(config, visual_tokens))


@dataclass(frozen=True)
class Spent:
    """What a language model spends on visual tokens.

    Attributes:
        flops: of prefill, as `prefill_flops` counts them.
        kv_bytes: of their keys and values.
    """

    flops: float
    kv_bytes: int


def spent(config: Any, visual_tokens: Sequence[int], bytes_per_value: int = 2) -> Spent:
    """What a batch of prompts spends.

    Args:
        config: as `prefill_flops` takes it.
        visual_tokens: of each prompt.
        bytes_per_value: as `kv_bytes` takes it.

    Raises:
        ValueError: as these two.
    """
    flops = float(sum(prefill_flops(config, n) for n in visual_tokens))
    return Spent(flops, kv_bytes(config, sum(visual_tokens), bytes_per_value))


def layered_flops(config: Any, visual_tokens: Sequence[int]) -> float:
    """`prefill_flops` where fewer visual tokens reach later layers.

    Args:
        config: as there.
        visual_tokens: for each decoder layer the number of visual tokens that enter it.

    Returns:
        FLOPs; with the same number everywhere those of `prefill_flops`.
    """
    return float(sum(_layer_flops(config, n) for n in visual_tokens))


def _layer_flops(config: Any, visual_tokens: int) -> int:
    """FLOPs of one decoder layer on so many visual tokens."""
    n = _count("visual_tokens", visual_tokens)
    d, m = sizes.decoder_width(config), sizes.decoder_inner(config)
    q, kv = _attention_widths(config)
    return int(2 * (2 * n * d * q + 2 * n * d * kv + 2 * n * n * q + 3 * n * d * m))


def attention_flops(width: int, tokens: int) -> float:
    """FLOPs of one layer's attention among so many tokens: the `2 * 2n^2*q` of `prefill_flops`.

    Args:
        width: of all query heads together.
        tokens: number n of tokens that attend to each other.
    """
    return float(4 * tokens * tokens * width)


def kv_bytes(config: Any, tokens: int, bytes_per_value: int = 2) -> int:
    """Bytes that the keys and values of `tokens` tokens take in the KV cache of all layers.

    Args:
        config: a VLM's config (its `text_config` is used) or a decoder's own config.
        tokens: number of cached tokens, 0 or more.
        bytes_per_value: 2 for float16 and bfloat16, 4 for float32, 1 for 8-bit caches.

    Returns:
        `2 * layers * kv_heads * head_dim * bytes_per_value * tokens` bytes, over the layers that
        cache keys and values. The published "MB" are MiB (2**20 bytes).

    Raises:
        ValueError: a negative count, `bytes_per_value` below 1, or a config that lacks a field.
    """
    n = _count("tokens", tokens)
    if bytes_per_value < 1:
        raise ValueError(f"bytes_per_value={bytes_per_value} must be 1 or more.")
    _, kv = _attention_widths(config)
    return int(2 * kv_layers(config) * kv * bytes_per_value * n)


def kv_layers(config: Any) -> int:
    """Number of decoder layers that cache keys and values: all but those of linear attention.

    Raises:
        ValueError: a config that lacks a field.
    """
    return sum(caching_layers(config))


def caching_layers(config: Any) -> list[bool]:
    """For each decoder layer whether it caches keys and values."""
    caching = configs.caching_layers(config)
    if caching is None:
        return [True] * sizes.decoder_depth(config)
    return caching


def encoder_flops(
    config: Any,
    crops: int = 1,
    *,
    patches: int | None = None,
    pixels: int | Sequence[int] | None = None,
    merges: Sequence[int] = (),
) -> float:
    """FLOPs that a ViT tower spends on `crops` crops, all of its layers.

    Per layer `2 * (4nd^2 + 2n^2d + 2ndm)` with n = patches, plus the CLS and register tokens where
    the tower has them; a SwiGLU feed-forward counts three matrices instead of two, and a layer
    with window attention its windows alone, all of them as if full. The patch embedding and the
    projector do not count, as in the published tables.

    Args:
        config: a VLM's config (its `vision_config` is used) or a tower's own config.
        crops: number of crops encoded, 0 or more.
        patches: patches per crop, where it is known.
        pixels: side of a crop, or (height, width), in pixels; for towers that are fed another size
            than their config's `image_size`. Give this or `patches`, not both.
        merges: how many tokens merge away between attention and feed-forward of each layer, from
            the first on, where a method merges them; the layers after those see all again.

    Returns:
        FLOPs (not TFLOPs), as a float.

    Raises:
        ValueError: a negative count, both `patches` and `pixels`, or a config that lacks a field.
    """
    count = _count("crops", crops)
    if patches is None:
        patches = patch_count(config, pixels)
    elif pixels is not None:
        raise ValueError("give patches or pixels, not both.")
    n = _count("patches", patches) + sizes.extra_tokens(config)
    d, layers = sizes.width(config), sizes.depth(config)
    feed_forward = sizes.feed_forward(config)
    linear = layers * (4 * n * d * d + n * d * feed_forward)
    whole = sizes.whole_layers(config)
    seen = layers * n
    if whole is not None:
        wide = len([number for number in whole if number < layers])
        seen = wide * n + (layers - wide) * min(n, sizes.window_patches(config))
    saved, left = 0, n
    for merge in merges:
        saved += 4 * (n - left) * d * d + 2 * (n * n - left * left) * d
        left -= merge
        saved += (n - left) * d * feed_forward
    return float(2 * count * (linear + 2 * n * seen * d - saved))


def beside_flops(config: Any, crops: int, patches: int, tokens: int, layers: int) -> float:
    """FLOPs of tokens that go through a ViT tower beside the patches, which do not see them.

    Per layer `2 * (4td^2 + 2t(n + t)d + 2tdm)` with t tokens and n patches, as in `encoder_flops`.

    Args:
        config: a VLM's config (its `vision_config` is used) or a tower's own config.
        crops: number of crops.
        patches: of each crop.
        tokens: of each crop.
        layers: how many of the tower's layers they go through.

    Returns:
        FLOPs (not TFLOPs), as a float.
    """
    seen = patches + sizes.extra_tokens(config) + tokens
    d = sizes.width(config)
    each = 4 * d * d + d * sizes.feed_forward(config) + 2 * seen * d
    return float(2 * crops * layers * tokens * each)


def patch_count(config: Any, pixels: int | Sequence[int] | None = None) -> int:
    """Number of patches in one crop: whole patches along each side, multiplied.

    Args:
        config: a VLM's config (its `vision_config` is used) or a tower's own config.
        pixels: side or (height, width) in pixels; by default the config's `image_size`.

    Returns:
        Patches per crop, without CLS and register tokens.

    Raises:
        ValueError: a size that is not one or two positive numbers, or a config that lacks a field.
    """
    size = sizes.image_size(config) if pixels is None else pixels
    height, width = _sides("pixels" if pixels is not None else "image_size", size)
    patch_height, patch_width = _sides("patch_size", sizes.patch_size(config))
    return (height // patch_height) * (width // patch_width)


def _count(name: str, value: int) -> int:
    if value < 0:
        raise ValueError(f"{name}={value} is negative; a count is 0 or more.")
    return value


def _sides(name: str, size: int | Sequence[int]) -> tuple[int, int]:
    sides = (size, size) if isinstance(size, int) else tuple(size)
    if len(sides) != 2 or min(sides) < 1:
        raise ValueError(f"{name}={size} must be a positive side or (height, width).")
    return sides[0], sides[1]


def _attention_widths(config: Any) -> tuple[int, int]:
    """Widths of all query heads and of all KV heads together."""
    heads = sizes.query_heads(config)
    head_dim = configs.head_dim(config)
    return heads * head_dim, configs.kv_heads(config) * head_dim
