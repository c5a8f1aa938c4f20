"""Real classes in known shapes with random weights, and prompts for them: speed with no download.

The weights are larger than at the start of a training, so that attention differs from token to
token. What such a model says means nothing; how long it takes is what the shape takes.
"""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlmprune import costs, plan
from vlmprune.errors import VlmpruneError

# A decoder and a tower that a CPU runs in seconds; 576 visual tokens an image, as LLaVA-1.5 has.
_SMALL: dict[str, Any] = {
    "model_type": "llava",
    "text_config": {
        "hidden_size": 512,
        "intermediate_size": 1376,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    },
    "vision_config": {
        "model_type": "clip_vision_model",
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "image_size": 336,
        "patch_size": 14,
    },
}

NAMES = (*plan.KNOWN, "small")

GIB = 2**30
_BOS, _PAD, _IMAGE, _FIRST_WORD = 1, 0, 3, 4
_VOCABULARY = {"small": 4096}
_LLAVA_VOCABULARY = 32064
# Attention heads of the towers are 64 wide, as CLIP's are.
_TOWER_HEAD = 64
# LLaVA-NeXT's grid of two by two crops, the largest that it takes.
_GRID = 2


def config_of(name: str) -> Any:
    """The Transformers config of a shape.

    Raises:
        VlmpruneError: there is no such shape.
    """
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaNextConfig

    if name not in NAMES:
        raise VlmpruneError(f"shape {name!r} is unknown; use one of {', '.join(NAMES)}.")
    shape = _SMALL if name == "small" else asdict(plan.KNOWN[name])
    tower = {k: v for k, v in shape["vision_config"].items() if k != "model_type"}
    classes = {"llava": LlavaConfig, "llava_next": LlavaNextConfig}
    return classes[shape["model_type"]](
        text_config=LlamaConfig(
            vocab_size=_VOCABULARY.get(name, _LLAVA_VOCABULARY),
            max_position_embeddings=2**17,
            pad_token_id=_PAD,
            bos_token_id=_BOS,
            eos_token_id=None,
            **shape["text_config"],
        ),
        vision_config=CLIPVisionConfig(
            num_attention_heads=tower["hidden_size"] // _TOWER_HEAD, **tower
        ),
        image_token_index=_IMAGE,
        tie_word_embeddings=False,
    )


def tokens_per_image(config: Any) -> int:
    """Visual tokens of one image; of an any-resolution model at its largest, newlines included."""
    side = config.vision_config.image_size // config.vision_config.patch_size
    if config.model_type == "llava":
        return int(side**2)
    fine = _GRID * side
    return int(side**2 + fine**2 + fine)


def crops_of(config: Any) -> int:
    """Crops of one image: the base view and, of an any-resolution model, its grid."""
    return 1 if config.model_type == "llava" else 1 + _GRID**2


def images_for(config: Any, visual_tokens: int) -> int:
    """The fewest images that have at least so many visual tokens."""
    return -(-visual_tokens // tokens_per_image(config))


def parameters(config: Any) -> int:
    """How many weights the model has; none is made."""
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
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
    from transformers import AutoModelForImageTextToText

    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(seed)
        with device:
            model: Any = AutoModelForImageTextToText.from_config(config, dtype=dtype)
        with torch.no_grad():
            for weight in model.parameters():
                if weight.ndim > 1:
                    weight.normal_(std=0.8 / weight[0].numel() ** 0.5)
    # No end token: every call goes its full length.
    model.generation_config.pad_token_id = _PAD
    model.generation_config.eos_token_id = None
    return model.eval()


def prompt(
    model: Any, batch: int, images: int, text_tokens: int, seed: int = 1
) -> dict[str, Tensor]:
    """A made-up request: in each row other random pictures amid other random words.

    Args:
        model: from `build`.
        batch: rows.
        images: pictures of each row, one after the other.
        text_tokens: words of each row, 1 or more; half of them come after the pictures.
        seed: of pictures and words.

    Returns:
        `input_ids` and `attention_mask` [batch, L], `pixel_values`, and `image_sizes` where the
        class wants them, on the model's device.
    """
    config = model.config
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(
        _FIRST_WORD, config.text_config.vocab_size, (batch, text_tokens), generator=generator
    )
    words[:, 0] = _BOS
    visual = torch.full((batch, images * tokens_per_image(config)), config.image_token_id)
    before = text_tokens // 2
    ids = torch.cat((words[:, :before], visual, words[:, before:]), dim=1)
    side = config.vision_config.image_size
    crops = () if config.model_type == "llava" else (crops_of(config),)
    pixels = torch.randn(batch * images, *crops, 3, side, side, generator=generator)
    inputs = {
        "input_ids": ids.to(model.device),
        "attention_mask": torch.ones_like(ids).to(model.device),
        "pixel_values": pixels.to(model.device, model.dtype),
    }
    if crops:
        sizes = torch.full((batch * images, 2), _GRID * side)
        inputs["image_sizes"] = sizes.to(model.device)
    return inputs
