"""Real classes in known shapes with random weights, and prompts for them: speed with no download.

The weights are larger than at the start of a training, so that attention differs from token to
token. What such a model says means nothing; how long it takes is what the shape takes.
"""

from __future__ import annotations

import math
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlmprune import costs
from vlmprune.costs.architectures import CROPS, SHAPES, SMALL, Crops, QwenTower
from vlmprune.errors import VlmpruneError
from vlmprune.hosts import sizes
from vlmprune.io.options import one_of

NAMES = tuple(SHAPES)
GIB = 2**30
_BOS, _PAD, _IMAGE, _VIDEO, _START, _END, _FIRST_WORD = 1, 0, 3, 4, 5, 6, 7
_NARROW_VOCABULARY, _LLAVA_VOCABULARY, _QWEN_VOCABULARY = 4096, 32064, 152064
# Widths of a Qwen head's rotary angles in time, height and width, as shares of half the head.
_SECTIONS = (2, 3, 3)
# Visual tokens of a picture of a model that takes any size, where nobody says how many.
_ANY_SIZE = 1024
# Attention heads of the towers are 64 wide, as CLIP's are.
_TOWER_HEAD = 64


def config_of(name: str, layers: int | None = None, tower_layers: int | None = None) -> Any:
    """The Transformers config of a shape.

    Args:
        name: one of `NAMES`.
        layers: only so many of the language model's layers; by default all.
        tower_layers: only so many of the vision tower's.

    Raises:
        VlmpruneError: there is no such shape, or it has fewer layers.
    """
    from vlmprune.hosts import pretrained

    shape = asdict(SHAPES[one_of("shape", name, NAMES)])
    text, tower = shape["text_config"], shape["vision_config"]
    if isinstance(SHAPES[name].vision_config, QwenTower):
        return _qwen(name, text, tower, layers, tower_layers)
    del tower["model_type"]
    _fewer(name, text, "num_hidden_layers", layers, 1)
    # The model takes the output of the layer before the last.
    _fewer(name, tower, "num_hidden_layers", tower_layers, 2)
    return pretrained.llava_config(
        shape["model_type"],
        _words(name, _LLAVA_VOCABULARY) | text,
        {"num_attention_heads": tower["hidden_size"] // _TOWER_HEAD, **tower},
        image_token_index=_IMAGE,
        tie_word_embeddings=False,
    )


def _qwen(
    name: str,
    text: dict[str, Any],
    tower: dict[str, Any],
    layers: int | None,
    tower_layers: int | None,
) -> Any:
    from vlmprune.hosts import pretrained

    _fewer(name, text, "num_hidden_layers", layers, 1)
    _fewer(name, tower, "depth", tower_layers, 1)
    whole = [n for n in tower["fullatt_block_indexes"] if n < tower["depth"]]
    tower["fullatt_block_indexes"] = whole or [tower["depth"] - 1]
    half = text["hidden_size"] // text["num_attention_heads"] // 2
    return pretrained.qwen_config(
        text_config={
            **_words(name, _QWEN_VOCABULARY),
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1000000.0,
                "mrope_section": [half * part // sum(_SECTIONS) for part in _SECTIONS],
            },
            **text,
        },
        vision_config={**tower, "out_hidden_size": text["hidden_size"]},
        image_token_id=_IMAGE,
        video_token_id=_VIDEO,
        vision_start_token_id=_START,
        vision_end_token_id=_END,
        tie_word_embeddings=False,
    )


def _words(name: str, vocabulary: int) -> dict[str, Any]:
    """What a decoder's config says of words; of a made-up shape there are fewer."""
    return {
        "vocab_size": _NARROW_VOCABULARY if name in SMALL else vocabulary,
        "max_position_embeddings": 2**17,
        "pad_token_id": _PAD,
        "bos_token_id": _BOS,
        "eos_token_id": None,
    }


def _fewer(name: str, part: dict[str, Any], key: str, layers: int | None, least: int) -> None:
    if layers is None:
        return
    if not least <= layers <= part[key]:
        option = "--tower-layers" if key == "depth" or least == 2 else "--layers"
        raise VlmpruneError(
            f"{option} {layers} is not from {least} to the {part[key]} that shape {name!r} has."
        )
    part[key] = layers


def depths(config: Any) -> tuple[int, int]:
    """Layers of the language model and of the vision tower."""
    return config.text_config.num_hidden_layers, sizes.depth(config)


def any_size(config: Any) -> bool:
    """Whether a picture may have any number of visual tokens."""
    return bool(config.model_type == "qwen2_5_vl")


def grid_of(visual_tokens: int) -> tuple[int, int]:
    """Rows and columns of the squarest picture that has at least so many visual tokens."""
    rows = max(1, math.isqrt(visual_tokens))
    return rows, -(-visual_tokens // rows)


def tokens_per_image(config: Any, visual_tokens: int = _ANY_SIZE) -> int:
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


def tokens_per_crop(config: Any, visual_tokens: int = _ANY_SIZE) -> int:
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


def parameters(config: Any) -> int:
    """How many weights the model has; none is made."""
    from vlmprune.hosts import pretrained

    with torch.device("meta"):
        model = pretrained.model_of(config)
    return sum(weight.numel() for weight in model.parameters())


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
    text = config.text_config
    # A layer at work: hidden states, queries, keys and values, and its feed-forward's two widths.
    work = size * tokens * (6 * text.hidden_size + 3 * text.intermediate_size)
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


def build(config: Any, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Any:
    """A model with random weights, in eval mode, made on the device itself.

    Args:
        config: from `config_of`.
        device: where to.
        dtype: of the weights.
        seed: of the weights; the same ones each time, and the caller's random state is kept.
    """
    from vlmprune.hosts import pretrained

    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(seed)
        with device:
            model: Any = pretrained.model_of(config, dtype=dtype)
        with torch.no_grad():
            for weight in model.parameters():
                if weight.ndim > 1:
                    weight.normal_(std=0.8 / weight[0].numel() ** 0.5)
    # No end token: every call goes its full length.
    model.generation_config.pad_token_id = _PAD
    model.generation_config.eos_token_id = None
    return model.eval()


def prompt(
    model: Any,
    batch: int,
    images: int,
    text_tokens: int,
    seed: int = 1,
    visual_tokens: int = _ANY_SIZE,
) -> dict[str, Tensor]:
    """A made-up request: in each row other random pictures amid other random words.

    Args:
        model: from `build`.
        batch: rows.
        images: pictures of each row, one after the other.
        text_tokens: words of each row, 1 or more; half of them come after the pictures.
        seed: of pictures and words.
        visual_tokens: of each picture of a model that takes any size, as `tokens_per_image` has it.

    Returns:
        `input_ids` and `attention_mask` [batch, L], `pixel_values`, and what else the class wants
        (`image_sizes`; `image_grid_thw` and `mm_token_type_ids`), on the model's device.
    """
    config = model.config
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(
        _FIRST_WORD, config.text_config.vocab_size, (batch, text_tokens), generator=generator
    )
    words[:, 0] = _BOS
    picture = torch.full((tokens_per_image(config, visual_tokens),), config.image_token_id)
    if any_size(config):
        picture = nn.functional.pad(picture, (1, 0), value=_START)
        picture = nn.functional.pad(picture, (0, 1), value=_END)
    visual = picture.repeat(batch, images)
    before = text_tokens // 2
    ids = torch.cat((words[:, :before], visual, words[:, before:]), dim=1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    count = batch * images
    if any_size(config):
        tower = config.vision_config
        rows, columns = (n * tower.spatial_merge_size for n in grid_of(visual_tokens))
        values = tower.in_channels * tower.temporal_patch_size * tower.patch_size**2
        pixels = torch.randn(count * rows * columns, values, generator=generator)
        inputs["image_grid_thw"] = torch.tensor([[1, rows, columns]] * count)
        inputs["mm_token_type_ids"] = (ids == config.image_token_id).long()
    else:
        side = config.vision_config.image_size
        grid = _grid(config)
        crops = (crops_of(config),) if grid else ()
        pixels = torch.randn(count, *crops, 3, side, side, generator=generator)
        if grid:
            inputs["image_sizes"] = torch.full((count, 2), grid * side)
    inputs["pixel_values"] = pixels.to(model.dtype)
    return {name: values.to(model.device) for name, values in inputs.items()}
