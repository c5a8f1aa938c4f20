"""FLOPs and bytes of a vision-language model, as the formulas behind the published tables.

A multiply and an add count as two FLOPs where a function is not told otherwise. Configs are read by
attribute only, in the field names of Hugging Face Transformers, so anything with those fields will
do. What a config does not tell is `UNKNOWN` (`math.nan`), and nothing raises because of it;
`costs.units` has the word for it, and JSON gets null.

Source: the tables of FasterVLM, VisPruner and CDPruner, whose figures these formulas reproduce, and
of SparseVLM, PyramidDrop and CATP, which count one FLOP for a multiply and an add.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vlmprune.hosts import layer_sizes, sizes
from vlmprune.hosts.layer_sizes import UNKNOWN, LayerSizes

Layers = Sequence[LayerSizes]
"""What `spent_of` has to know of a language model."""

PER_MULTIPLY_ADD = 2
"""FLOPs of a multiply and an add, in the published tables of VisPruner, FasterVLM and CDPruner."""


def prefill_flops(
    config: Any, visual_tokens: int, per_multiply_add: int = PER_MULTIPLY_ADD
) -> float:
    """FLOPs that the decoder layers spend on the visual tokens of one prompt at prefill.

    Per layer `2 * (2nd*q + 2nd*kv + 2n^2*q + 3ndm)` for n tokens, hidden size d, feed-forward size
    m, `q = heads * head_dim` and `kv = kv_heads * head_dim`. With as many KV heads as query heads
    and q = d this is the published `2 * (4nd^2 + 2n^2d + 3ndm)`.

    As in the published tables the text tokens, embeddings, norms, rotary angles and the output head
    do not count, and attention counts as a full n x n square although it is causal. Mixtures of
    experts count the experts that a token goes through, without their router. A layer with a window
    or chunks of w tokens counts n * min(n, w) instead of n^2, a recurrent layer (linear attention,
    Mamba, convolution) what its recurrence takes for each token.

    Args:
        config: a VLM's config (its `text_config` is used) or a decoder's own config.
        visual_tokens: number n of visual tokens that enter the decoder, 0 or more.
        per_multiply_add: FLOPs that a multiply and an add count as, 2 or 1.

    Returns:
        FLOPs (not TFLOPs), as a float; `UNKNOWN` where the config does not tell.

    Raises:
        ValueError: a negative count, or another `per_multiply_add`.
    """
    layers = layer_sizes.layers(config)
    _count("visual_tokens", visual_tokens)
    if layers is None:
        return UNKNOWN
    return _flops(layers, [visual_tokens] * len(layers), per_multiply_add)


@dataclass(frozen=True)
class Spent:
    """What a language model spends on visual tokens.

    Attributes:
        flops: of prefill, as `prefill_flops` counts them.
        kv_bytes: of their keys and values.
        kv_bytes_by_layer: of `kv_bytes` those of each decoder layer; empty where their number is
            unknown.
    """

    flops: float
    kv_bytes: float
    kv_bytes_by_layer: Sequence[float] = ()


def spent(
    config: Any,
    visual_tokens: Sequence[int],
    bytes_per_value: int = 2,
    per_multiply_add: int = PER_MULTIPLY_ADD,
) -> Spent:
    """What a batch of prompts spends.

    Args:
        config: as `prefill_flops` takes it.
        visual_tokens: of each prompt.
        bytes_per_value: as `kv_bytes` takes it.
        per_multiply_add: as `prefill_flops` takes it.

    Raises:
        ValueError: as these two.
    """
    return spent_of(layer_sizes.layers(config), visual_tokens, bytes_per_value, per_multiply_add)


def spent_of(
    layers: Layers | None,
    visual_tokens: Sequence[int],
    bytes_per_value: int = 2,
    per_multiply_add: int = PER_MULTIPLY_ADD,
) -> Spent:
    """As `spent`, of decoder layers whose sizes are known; to read them of a config takes longer.

    Args:
        layers: as `hosts.layer_sizes.layers` reads them.
        visual_tokens: as `spent` takes it.
        bytes_per_value: likewise.
        per_multiply_add: likewise.
    """
    if layers is None:
        return Spent(UNKNOWN, UNKNOWN)
    every = [[n] * len(layers) for n in visual_tokens]
    flops = float(sum(_flops(layers, one, per_multiply_add) for one in every))
    each = _layers_bytes(layers, [visual_tokens] * len(layers), bytes_per_value)
    return Spent(flops, sum(each), each)


def layered(config: Any, visual_tokens: Sequence[Sequence[int]], bytes_per_value: int = 2) -> Spent:
    """What a batch of prompts spends where not all visual tokens reach every layer.

    Args:
        config: as `prefill_flops` takes it.
        visual_tokens: for each decoder layer, of each prompt the number of visual tokens that
            enter it.
        bytes_per_value: as `kv_bytes` takes it.

    Returns:
        What `spent` does, with the same numbers everywhere.
    """
    layers = layer_sizes.layers(config)
    if layers is None or len(layers) != len(visual_tokens):
        return Spent(UNKNOWN, UNKNOWN, [UNKNOWN] * len(visual_tokens))
    flops = float(sum(_flops(layers, one) for one in zip(*visual_tokens, strict=True)))
    each = _layers_bytes(layers, visual_tokens, bytes_per_value)
    return Spent(flops, sum(each), each)


def layered_flops(
    config: Any, visual_tokens: Sequence[int], per_multiply_add: int = PER_MULTIPLY_ADD
) -> float:
    """`prefill_flops` where fewer visual tokens reach later layers.

    Args:
        config: as there.
        visual_tokens: for each decoder layer the number of visual tokens that enter it.
        per_multiply_add: as there.

    Returns:
        FLOPs; with the same number everywhere those of `prefill_flops`.
    """
    layers = layer_sizes.layers(config)
    return UNKNOWN if layers is None else _flops(layers, visual_tokens, per_multiply_add)


def _flops(
    layers: Sequence[LayerSizes],
    visual_tokens: Sequence[int],
    per_multiply_add: int = PER_MULTIPLY_ADD,
) -> float:
    """FLOPs of some decoder layers, each on so many visual tokens."""
    _convention(per_multiply_add)
    return float(per_multiply_add * sum(map(_multiply_adds, layers, visual_tokens)))


def _multiply_adds(layer: LayerSizes, visual_tokens: int) -> float:
    n = _count("visual_tokens", visual_tokens)
    if not n:
        return 0
    seen = n if layer.window is None else min(n, layer.window)
    return n * (layer.weights + layer.states + seen * layer.pairs)


def attention_flops(width: int, tokens: int) -> float:
    """FLOPs of one layer's attention among so many tokens: the `2 * 2n^2*q` of `prefill_flops`.

    Args:
        width: of all query heads together.
        tokens: number n of tokens that attend to each other.
    """
    return float(4 * tokens * tokens * width)


def kv_bytes(config: Any, tokens: int, bytes_per_value: int = 2) -> float:
    """Bytes that the keys and values of one prompt's tokens take in the KV cache of all layers.

    Args:
        config: a VLM's config (its `text_config` is used) or a decoder's own config.
        tokens: number of cached tokens, 0 or more.
        bytes_per_value: 2 for float16 and bfloat16, 4 for float32, 1 for 8-bit caches.

    Returns:
        `2 * layers * kv_heads * head_dim * bytes_per_value * tokens` bytes, a whole number, over
        the layers that cache keys and values of their own; a layer with a window of w holds w - 1
        tokens at most, and one whose keys and values are made of a latent holds that. `UNKNOWN`
        where the config does not tell. The published "MB" are MiB (2**20 bytes).

    Raises:
        ValueError: a negative count, or `bytes_per_value` below 1.
    """
    layers = layer_sizes.layers(config)
    if layers is None:
        layers = [layer_sizes.NOTHING_KNOWN]
    return sum(_layers_bytes(layers, [[tokens]] * len(layers), bytes_per_value))


def _layers_bytes(
    layers: Sequence[LayerSizes], tokens: Sequence[Sequence[int]], bytes_per_value: int
) -> list[float]:
    """Bytes of each layer's cache, of the tokens of each prompt that enter it."""
    if bytes_per_value < 1:
        raise ValueError(f"bytes_per_value={bytes_per_value} must be 1 or more.")
    return [
        _held(layer, own) * layer.cached * bytes_per_value if any(own) else 0
        for layer, own in zip(layers, tokens, strict=True)
    ]


def _held(layer: LayerSizes, tokens: Sequence[int]) -> int:
    """Tokens of each prompt that a layer's cache holds, added up."""
    most = math.inf if layer.window is None else layer.window - 1
    return int(sum(min(_count("tokens", n), most) for n in tokens))


def kv_layers(config: Any) -> int:
    """Number of decoder layers that cache keys and values, as `caching_layers` tells."""
    return sum(caching_layers(config))


def caching_layers(config: Any) -> list[bool]:
    """For each decoder layer whether it caches keys and values of its own.

    Those of linear attention do not, nor those that use another layer's. Empty where the number of
    layers is unknown.
    """
    return [layer.cached != 0 for layer in layer_sizes.layers(config) or ()]


def encoder_flops(
    config: Any,
    crops: int = 1,
    *,
    patches: int | None = None,
    pixels: int | Sequence[int] | None = None,
    merges: Sequence[int] = (),
    per_multiply_add: int = PER_MULTIPLY_ADD,
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
        merges: by how many tokens a crop becomes fewer between attention and feed-forward of each
            layer, from the first on, where a method merges or drops them; the layers after those
            see all again.
        per_multiply_add: FLOPs that a multiply and an add count as, 2 or 1.

    Returns:
        FLOPs (not TFLOPs), as a float; `UNKNOWN` where the config does not tell.

    Raises:
        ValueError: a negative count, or both `patches` and `pixels`.
    """
    count = _count("crops", crops)
    if patches is not None and pixels is not None:
        raise ValueError("give patches or pixels, not both.")
    if pixels is not None:
        _sides("pixels", pixels)
    _count("patches", patches or 0)
    _convention(per_multiply_add)
    try:
        return per_multiply_add * _tower(config, count, patches, pixels, merges)
    except layer_sizes.UNTOLD:
        return UNKNOWN


def _tower(
    config: Any,
    count: int,
    patches: int | None,
    pixels: int | Sequence[int] | None,
    merges: Sequence[int],
) -> float:
    """Multiply-adds of a tower; raises what reading a config that says too little comes to."""
    if patches is None:
        patches = patch_count(config, pixels)
    n = patches + sizes.extra_tokens(config)
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
    return float(count * (linear + 2 * n * seen * d - saved))


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
        FLOPs (not TFLOPs), as a float; `UNKNOWN` where the config does not tell.
    """
    try:
        seen = patches + sizes.extra_tokens(config) + tokens
        d = sizes.width(config)
        each = 4 * d * d + d * sizes.feed_forward(config) + 2 * seen * d
    except layer_sizes.UNTOLD:
        return UNKNOWN
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


def _convention(per_multiply_add: int) -> None:
    if per_multiply_add not in (1, 2):
        raise ValueError(f"per_multiply_add={per_multiply_add} is no convention; use 2 or 1.")


def _sides(name: str, size: int | Sequence[int]) -> tuple[int, int]:
    sides = (size, size) if isinstance(size, int) else tuple(size)
    if len(sides) != 2 or min(sides) < 1:
        raise ValueError(f"{name}={size} must be a positive side or (height, width).")
    return sides[0], sides[1]
