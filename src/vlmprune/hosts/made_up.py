"""Models made up from sizes, with random weights, and requests for them as processors make them.

The weights are larger than at the start of a training, so that attention differs from token to
token. What such a model says means nothing; how long it takes is what its sizes take.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlmprune.hosts import pretrained, sizes
from vlmprune.hosts.families import FAMILIES
from vlmprune.views.layout import Layout

_BOS, _PAD, _IMAGE, _VIDEO, _START, _END, _FIRST_WORD = 1, 0, 3, 4, 5, 6, 7
_NARROW_VOCABULARY, _LLAVA_VOCABULARY, _QWEN_VOCABULARY = 4096, 32064, 152064
# Widths of a Qwen head's rotary angles in time, height and width, as shares of half the head.
_SECTIONS = (2, 3, 3)
# Attention heads of the towers are 64 wide, as CLIP's are.
_TOWER_HEAD = 64
# The type of model that takes pictures of any size.
_ANY_SIZE = "qwen2_5_vl"


@dataclass(frozen=True)
class Picture:
    """What a picture is to a model.

    Attributes:
        tokens: visual tokens, newlines included.
        rows: of visual tokens, where it may have any size, else of crops; 0 for a single crop.
        columns: likewise.
    """

    tokens: int
    rows: int
    columns: int


def llava_config(
    kind: str, text: dict[str, Any], tower: dict[str, Any], narrow: bool = False
) -> Any:
    """The config of a LLaVA model.

    Args:
        kind: "llava" or "llava_next".
        text: sizes of the language model, as `costs.architectures.DecoderConfig` has them.
        tower: of the vision tower, as `ClipTower` has them.
        narrow: whether it is to have few words.
    """
    heads = tower["hidden_size"] // _TOWER_HEAD
    return pretrained.llava_config(
        kind,
        _words(narrow, _LLAVA_VOCABULARY) | text,
        {"num_attention_heads": heads, **{k: v for k, v in tower.items() if k != "model_type"}},
        image_token_index=_IMAGE,
        tie_word_embeddings=False,
    )


def qwen_config(text: dict[str, Any], tower: dict[str, Any], narrow: bool = False) -> Any:
    """The config of a Qwen2.5-VL model; likewise, the tower as `QwenTower` has it."""
    whole = [n for n in tower["fullatt_block_indexes"] if n < tower["depth"]]
    layers = {"fullatt_block_indexes": whole or [tower["depth"] - 1]}
    half = text["hidden_size"] // text["num_attention_heads"] // 2
    return pretrained.qwen_config(
        text_config={
            **_words(narrow, _QWEN_VOCABULARY),
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1000000.0,
                "mrope_section": [half * part // sum(_SECTIONS) for part in _SECTIONS],
            },
            **text,
        },
        vision_config={**tower, **layers, "out_hidden_size": text["hidden_size"]},
        image_token_id=_IMAGE,
        video_token_id=_VIDEO,
        vision_start_token_id=_START,
        vision_end_token_id=_END,
        tie_word_embeddings=False,
    )


def _words(narrow: bool, vocabulary: int) -> dict[str, Any]:
    """What a decoder's config says of words."""
    return {
        "vocab_size": _NARROW_VOCABULARY if narrow else vocabulary,
        "max_position_embeddings": 2**17,
        "pad_token_id": _PAD,
        "bos_token_id": _BOS,
        "eos_token_id": None,
    }


def any_size(config: Any) -> bool:
    """Whether a picture may have any number of visual tokens."""
    return bool(config.model_type == _ANY_SIZE)


def parameters(config: Any) -> int:
    """How many weights the model has; none is made."""
    with torch.device("meta"):
        model = pretrained.model_of(config)
    return sum(weight.numel() for weight in model.parameters())


def model_of(config: Any, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Any:
    """A model with random weights, in eval mode, made on the device itself.

    Args:
        config: of the model.
        device: where to.
        dtype: of the weights.
        seed: of the weights; the same ones each time, and the caller's random state is kept.
    """
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


def layout_of(config: Any, size: tuple[int, int]) -> Layout:
    """Where the visual tokens of a picture lie, by the host's own packing, with no weights.

    Args:
        config: of a model of LLaVA's kind, as Transformers has it.
        size: (height, width) of the picture in pixels.
    """
    with torch.device("meta"):
        model = pretrained.model_of(config)
    medium = next(one for one in FAMILIES[config.model_type].media if one.kind == "image")
    side = config.vision_config.image_size
    inputs = {"pixel_values": torch.zeros(1, 3, side, side), "image_sizes": torch.tensor([size])}
    (layout,) = medium.layouts(model, inputs, torch.empty(0))
    return layout


def request(
    model: Any, batch: int, images: int, text_tokens: int, picture: Picture, seed: int = 1
) -> dict[str, Tensor]:
    """A request: in each row other random pictures amid other random words.

    Args:
        model: from `model_of`.
        batch: rows.
        images: pictures of each row, one after the other.
        text_tokens: words of each row, 1 or more; half of them come after the pictures.
        picture: each of them.
        seed: of pictures and words.

    Returns:
        `input_ids` and `attention_mask` [batch, L], `pixel_values`, and what else the class wants
        (`image_sizes`; `image_grid_thw` and `mm_token_type_ids`), on the model's device.
    """
    config = model.config
    generator = torch.Generator().manual_seed(seed)
    most = config.text_config.vocab_size
    words = torch.randint(_FIRST_WORD, most, (batch, text_tokens), generator=generator)
    words[:, 0] = _BOS
    places = torch.full((picture.tokens,), config.image_token_id)
    if any_size(config):
        places = nn.functional.pad(places, (1, 0), value=_START)
        places = nn.functional.pad(places, (0, 1), value=_END)
    visual = places.repeat(batch, images)
    before = text_tokens // 2
    ids = torch.cat((words[:, :before], visual, words[:, before:]), dim=1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    count = batch * images
    if any_size(config):
        tower = config.vision_config
        rows, columns = (n * tower.spatial_merge_size for n in (picture.rows, picture.columns))
        values = tower.in_channels * tower.temporal_patch_size * tower.patch_size**2
        pixels = torch.randn(count * rows * columns, values, generator=generator)
        inputs["image_grid_thw"] = torch.tensor([[1, rows, columns]] * count)
        inputs["mm_token_type_ids"] = (ids == config.image_token_id).long()
    else:
        side = config.vision_config.image_size
        crops = (1 + picture.rows * picture.columns,) if picture.rows else ()
        pixels = torch.randn(count, *crops, 3, side, side, generator=generator)
        if picture.rows:
            size = [picture.rows * side, picture.columns * side]
            inputs["image_sizes"] = torch.tensor([size] * count)
    inputs["pixel_values"] = pixels.to(model.dtype)
    return {name: values.to(model.device) for name, values in inputs.items()}


def depths(config: Any) -> tuple[int, int]:
    """Layers of the language model and of the vision tower."""
    return sizes.decoder_depth(config), sizes.depth(config)
