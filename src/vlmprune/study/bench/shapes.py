"""Known shapes as models with random weights, and prompts for them: speed with no download.

What is made up, and how, stands in `hosts.made_up`; here is which shapes there are, how many visual
tokens a picture has in them, and whether they fit into memory.
"""

from __future__ import annotations

import math
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlmprune import costs
from vlmprune.costs.architectures import (
    ANY_SIZE_TOKENS,
    CROPS,
    SHAPES,
    SMALL,
    Crops,
    QwenTower,
    grid_of,
)
from vlmprune.errors import VlmpruneError
from vlmprune.hosts import sizes
from vlmprune.hosts.made_up import (
    Picture,
    any_size,
    depths,
    llava_config,
    parameters,
    qwen_config,
    request,
)
from vlmprune.hosts.made_up import model_of as build
from vlmprune.io.options import one_of

NAMES = tuple(SHAPES)
GIB = 2**30


def config_of(name: str, layers: int | None = None, tower_layers: int | None = None) -> Any:
    """The Transformers config of a shape.

    Args:
        name: one of `NAMES`.
        layers: only so many of the language model's layers; by default all.
        tower_layers: only so many of the vision tower's.

    Raises:
        VlmpruneError: there is no such shape, or it has fewer layers.
    """
    shape = SHAPES[one_of("shape", name, NAMES)]
    text, tower = shape.text_config, shape.vision_config
    own = _fewer(name, "--layers", layers, 1, text.num_hidden_layers)
    text = replace(text, num_hidden_layers=own)
    if isinstance(tower, QwenTower):
        tower = replace(tower, depth=_fewer(name, "--tower-layers", tower_layers, 1, tower.depth))
        return qwen_config(asdict(text), asdict(tower), name in SMALL)
    # The model takes the output of the layer before the last.
    own = _fewer(name, "--tower-layers", tower_layers, 2, tower.num_hidden_layers)
    tower = replace(tower, num_hidden_layers=own)
    return llava_config(shape.model_type, asdict(text), asdict(tower), name in SMALL)


def _fewer(name: str, option: str, layers: int | None, least: int, most: int) -> int:
    """How many layers an option leaves."""
    if layers is None:
        return most
    if not least <= layers <= most:
        raise VlmpruneError(
            f"{option} {layers} is not from {least} to the {most} that shape {name!r} has."
        )
    return layers


def tokens_per_image(config: Any, visual_tokens: int = ANY_SIZE_TOKENS) -> int:
    """Visual tokens of one image; of an any-resolution model at its largest, newlines included.

    Args:
        config: from `config_of`.
        visual_tokens: of a model that takes any size, how many are wanted.
    """
    if any_size(config):
        return math.prod(grid_of(visual_tokens))
    crop = tokens_per_crop(config)
    fine = _grid(config) * math.isqrt(crop)
    return crop + fine**2 + fine


def tokens_per_crop(config: Any, visual_tokens: int = ANY_SIZE_TOKENS) -> int:
    """Visual tokens of one crop, newlines apart."""
    if any_size(config):
        return tokens_per_image(config, visual_tokens)
    return costs.patch_count(config)


def crops_of(config: Any) -> int:
    """Crops of one image: the base view and, of an any-resolution model, its grid."""
    return CROPS.get(config.model_type, Crops()).count


def _grid(config: Any) -> int:
    return CROPS.get(config.model_type, Crops()).grid


def images_for(config: Any, visual_tokens: int) -> int:
    """The fewest images that have at least so many visual tokens."""
    if any_size(config):
        return 1
    return -(-visual_tokens // tokens_per_image(config))


def check_memory(
    name: str, config: Any, device: torch.device, dtype: torch.dtype, tokens: int
) -> None:
    """Refuse a shape that does not fit, before anything of it is made.

    Args:
        name: of the shape.
        config: its config.
        device: where it is to be.
        dtype: of weights and KV cache.
        tokens: cached tokens of all rows together.

    Raises:
        VlmpruneError: weights, KV cache and a prefill's hidden states take more than is free.
    """
    free = free_bytes(device)
    if free is None:
        return
    size = dtype.itemsize
    weights = size * parameters(config)
    cache = costs.kv_bytes(config, tokens, size)
    # A layer at work: hidden states, queries, keys and values, and its feed-forward's two widths.
    width, inner = sizes.decoder_width(config), sizes.decoder_inner(config)
    work = size * tokens * (6 * width + 3 * inner)
    if weights + cache + work > free:
        raise VlmpruneError(
            f"shape {name!r} needs {(weights + cache + work) / GIB:.1f} GiB on {device} "
            f"({weights / GIB:.1f} of weights in {str(dtype).removeprefix('torch.')}, "
            f"{cache / GIB:.1f} of KV cache, {work / GIB:.1f} at work) and {free / GIB:.1f} GiB "
            "are free; use a smaller shape, a smaller batch or another --dtype."
        )


def free_bytes(device: torch.device) -> int | None:
    """Memory that is free on a device; None where it cannot be told."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    if device.type != "cpu":
        return None
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    except OSError:
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    # Windows has no sysconf, other systems lack these names.
    except (AttributeError, ValueError, OSError):
        return None


def prompt(
    model: Any,
    batch: int,
    images: int,
    text_tokens: int,
    seed: int = 1,
    visual_tokens: int = ANY_SIZE_TOKENS,
) -> dict[str, Tensor]:
    """A made-up request for a model of a shape, as `hosts.made_up.request` makes it.

    Args:
        model: from `build`.
        batch: rows.
        images: pictures of each row.
        text_tokens: words of each row, 1 or more.
        seed: of pictures and words.
        visual_tokens: of each picture of a model that takes any size, as `tokens_per_image` has it.
    """
    config = model.config
    rows, columns = grid_of(visual_tokens) if any_size(config) else (_grid(config),) * 2
    picture = Picture(tokens_per_image(config, visual_tokens), rows, columns)
    return request(model, batch, images, text_tokens, picture, seed)


__all__ = [
    "NAMES",
    "any_size",
    "build",
    "check_memory",
    "config_of",
    "crops_of",
    "depths",
    "free_bytes",
    "grid_of",
    "images_for",
    "parameters",
    "prompt",
    "tokens_per_crop",
    "tokens_per_image",
]
