"""Sizes of real models by name: decoders, towers, and whole architectures, with no weights.

Sizes are those of the models' own config files, under the names of a Transformers config.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes of a language model."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int


@dataclass(frozen=True)
class ClipTower:
    """Sizes of a CLIP tower; those of LLaVA's where nothing else is said."""

    model_type: str = "clip_vision_model"
    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    image_size: int = 336
    patch_size: int = 14


@dataclass(frozen=True)
class QwenTower:
    """Sizes of Qwen2.5-VL's tower; of the layers in `fullatt_block_indexes` no windows part."""

    hidden_size: int
    intermediate_size: int
    depth: int
    num_heads: int
    fullatt_block_indexes: Sequence[int]
    patch_size: int = 14
    spatial_merge_size: int = 2
    window_size: int = 112
    model_type: ClassVar[str] = "qwen2_5_vl"


@dataclass(frozen=True)
class Architecture:
    """A language model behind a tower."""

    model_type: str
    text_config: DecoderConfig
    vision_config: ClipTower | QwenTower = ClipTower()


@dataclass(frozen=True)
class Crops:
    """How a type of model cuts an image up.

    Attributes:
        grid: crops on each side, of an any-resolution model at its largest; 0 for none.
        selects: whether the config says which of the tower's tokens are passed on.
    """

    grid: int = 0
    selects: bool = True

    @property
    def count(self) -> int:
        """Crops of one image: a base view and the grid."""
        return 1 + self.grid**2


CROPS = {"llava": Crops(), "vipllava": Crops(selects=False), "llava_next": Crops(grid=2)}
"""By model type; of these alone the visual tokens of an image follow from the config."""

DECODERS = {
    "qwen2.5-0.5b": DecoderConfig(896, 4864, 24, 14, 2),
    "qwen2.5-1.5b": DecoderConfig(1536, 8960, 28, 12, 2),
    "qwen2.5-3b": DecoderConfig(2048, 11008, 36, 16, 2),
    "qwen2.5-7b": DecoderConfig(3584, 18944, 28, 28, 4),
    "vicuna-7b": DecoderConfig(4096, 11008, 32, 32, 32),
    "vicuna-13b": DecoderConfig(5120, 13824, 40, 40, 40),
    "qwen2.5-14b": DecoderConfig(5120, 13824, 48, 40, 8),
    "qwen2.5-32b": DecoderConfig(5120, 27648, 64, 40, 8),
    "qwen2.5-72b": DecoderConfig(8192, 29568, 80, 64, 8),
}
"""Language models alone: one family's, and the two that the published tables are about."""

KNOWN = {
    "llava-1.5-7b": Architecture("llava", DECODERS["vicuna-7b"]),
    "llava-1.5-13b": Architecture("llava", DECODERS["vicuna-13b"]),
    "llava-next-7b": Architecture("llava_next", DECODERS["vicuna-7b"]),
    "llava-next-13b": Architecture("llava_next", DECODERS["vicuna-13b"]),
}
"""Those of the published tables."""

QWEN = Architecture(
    "qwen2_5_vl", DECODERS["qwen2.5-7b"], QwenTower(1280, 3420, 32, 16, (7, 15, 23, 31))
)

# A decoder and a tower that a CPU runs in seconds; 576 visual tokens an image, as LLaVA-1.5 has.
_NARROW = DecoderConfig(512, 1376, 8, 8, 4)
_NARROW_TOWER = ClipTower(hidden_size=128, intermediate_size=512, num_hidden_layers=4)
SMALL = {
    "small": Architecture("llava", _NARROW, _NARROW_TOWER),
    "small-next": Architecture("llava_next", _NARROW, _NARROW_TOWER),
    "small-qwen": Architecture(
        "qwen2_5_vl", DecoderConfig(512, 1376, 4, 8, 4), QwenTower(128, 256, 4, 2, (1, 3))
    ),
    # Real sizes of both parts, and few words: 0.45 thousand million weights, a first token in
    # seconds. The tower is CLIP's ViT-B/16 fed with 384 pixels a side, 576 visual tokens.
    "llava-0.5b": Architecture(
        "llava", DECODERS["qwen2.5-0.5b"], ClipTower("clip_vision_model", 768, 3072, 12, 384, 16)
    ),
}
"""Made up, to be run on a CPU."""

ANY_SIZE_TOKENS = 1024
"""Visual tokens of a picture of a model that takes any size, where nobody says how many."""

SHAPES = KNOWN | {"qwen2.5-vl-7b": QWEN} | SMALL
"""All whose costs are worked out by name, and whose classes can be made with random weights."""


def grid_of(visual_tokens: int) -> tuple[int, int]:
    """Rows and columns of the squarest picture that has at least so many visual tokens."""
    rows = max(1, math.isqrt(visual_tokens))
    return rows, -(-visual_tokens // rows)
