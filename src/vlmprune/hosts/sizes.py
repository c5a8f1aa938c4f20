"""Sizes of language models and vision towers, as their configs have them.

Towers name the same thing differently, and some lack what others have; which type says what stands
here. As in `config`, a field that a tower's type is known to have is required. Every function takes
a model's config, of which it reads one part, or that part's own, and names in its error what is
missing.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlmprune.hosts.config import (
    each_layer,
    field_of,
    model_type,
    of_text,
    of_tower,
    required,
    text_field,
)

# Fields that not every tower has, of the types that have them in all tested releases.
_WINDOWED = ("fullatt_block_indexes", "window_size")
_TOWERS: Mapping[str, Collection[str]] = {
    "qwen2_5_vl": _WINDOWED,
    "qwen2_5_vl_vision": _WINDOWED,
    "qwen2_vl": ("embed_dim", "mlp_ratio"),
    "qwen2_vl_vision": ("embed_dim", "mlp_ratio"),
    "glm4v_vision": ("out_hidden_size",),
    "glm4v_moe_vision": ("out_hidden_size",),
    "dinov2": ("mlp_ratio", "use_swiglu_ffn"),
    "dinov2_with_registers": ("mlp_ratio", "use_swiglu_ffn", "num_register_tokens"),
}

# Towers that put no CLS token in front of their patches.
_WITHOUT_CLS = (
    "siglip",
    "pixtral",
    "idefics3",
    "smolvlm",
    "qwen",
    "cohere_compass",
    "glm4v",
    "glm_ocr",
    "gemma4",
)
# Towers whose feed-forward has a gate, and so three matrices.
_GATED = ("pixtral", "qwen2_5_vl", "glm4v", "glm_ocr", "gemma4")
# Of those, towers in which it is as wide as the language model, whatever the config says of it.
_WIDE = ("glm4v",)


@dataclass(frozen=True)
class Decoder:
    """Sizes of a language model.

    Attributes:
        layers: number of them.
        width: the hidden size.
        heads: query heads.
        kv_heads: heads of keys and values.
        head_dim: values of a head.
        vocabulary: ids that it knows.
    """

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int


def decoder(config: Any) -> Decoder:
    """The sizes of a language model.

    Raises:
        VlmpruneError: one is not said.
    """
    return Decoder(
        layers=decoder_depth(config),
        width=decoder_width(config),
        heads=query_heads(config),
        kv_heads=kv_heads(config),
        head_dim=head_dim(config),
        vocabulary=int(required(of_text(config), "vocab_size")),
    )


def decoder_depth(config: Any) -> int:
    """Layers of a language model."""
    return int(required(of_text(config), "num_hidden_layers"))


def decoder_width(config: Any) -> int:
    """Width of a language model's states."""
    return int(required(of_text(config), "hidden_size"))


def decoder_inner(config: Any) -> int:
    """Width inside the feed-forward of a language model's layers."""
    return int(required(of_text(config), "intermediate_size"))


def query_heads(config: Any) -> int:
    """Query heads of a language model."""
    return int(required(of_text(config), "num_attention_heads"))


def kv_heads(config: Any) -> int:
    """Heads of keys and values of a language model, the most of any layer where they differ."""
    return max(_kv_heads(one) for one in _layers(config))


def head_dim(config: Any) -> int:
    """Values of a head of a language model, the most of any layer where they differ."""
    return max(_head_dim(one) for one in _layers(config))


def kv_sizes(config: Any, layers: Collection[int]) -> set[tuple[int, int]]:
    """(KV heads, values of a head) of some decoder layers, each pair once."""
    each = _layers(config)
    some = {id(one): one for one in (each[n if len(each) > 1 else 0] for n in layers)}
    return {(_kv_heads(one), _head_dim(one)) for one in some.values()}


def _layers(config: Any) -> Sequence[Any]:
    """The config of each decoder layer where they differ; else that of all."""
    return each_layer(config) or [of_text(config)]


def _kv_heads(layer: Any) -> int:
    """As many as heads where a layer's config does not say."""
    own = text_field(layer, "num_key_value_heads")
    return int(own or required(layer, "num_attention_heads"))


def _head_dim(layer: Any) -> int:
    """A head's share of the hidden size where a layer's config does not say."""
    share = required(layer, "hidden_size") // required(layer, "num_attention_heads")
    return int(text_field(layer, "head_dim") or share)


def _field(tower: Any, name: str) -> Any:
    return field_of(tower, name, _TOWERS)


def width(config: Any) -> int:
    """Width of the layers; Qwen2-VL's tower calls the language model's width its hidden size."""
    tower = of_tower(config)
    return int(_field(tower, "embed_dim") or required(tower, "hidden_size"))


def depth(config: Any) -> int:
    """Number of layers, which towers of Qwen's line call their depth."""
    tower = of_tower(config)
    return int(_field(tower, "depth") or required(tower, "num_hidden_layers"))


def image_size(config: Any) -> Any:
    """Side of a crop in pixels, or (height, width)."""
    return required(of_tower(config), "image_size")


def patch_size(config: Any) -> Any:
    """Side of a patch in pixels, or (height, width)."""
    return required(of_tower(config), "patch_size")


def grid(config: Any) -> tuple[int, int]:
    """(rows, columns) of patches of a crop at the size that the config names."""
    sides, patch = image_size(config), patch_size(config)
    height, across = (sides, sides) if isinstance(sides, int) else sides
    return height // patch, across // patch


def fixed_sides(config: Any) -> tuple[Any, Any]:
    """The crop's and the patch's side of a tower that no record knows; None where not said."""
    tower = of_tower(config)
    return getattr(tower, "image_size", None), getattr(tower, "patch_size", None)


def layer_count(config: Any) -> int:
    """Layers of a tower that no record knows; 0 where its config does not say."""
    return int(getattr(of_tower(config), "num_hidden_layers", None) or 0)


def channels(config: Any) -> int:
    """Channels of the pixels; three, of colour, where a tower does not say."""
    return int(getattr(of_tower(config), "num_channels", None) or 3)


def extra_tokens(config: Any) -> int:
    """Tokens of a crop beside its patches: registers and a CLS token."""
    tower = of_tower(config)
    registers = int(_field(tower, "num_register_tokens") or 0)
    return registers + (not model_type(tower).startswith(_WITHOUT_CLS))


def whole_layers(config: Any) -> Sequence[int] | None:
    """Numbers of the layers whose patches see a whole image; None where those of all layers do."""
    whole: Sequence[int] | None = _field(of_tower(config), "fullatt_block_indexes")
    return whole


def window_patches(config: Any) -> int:
    """Patches of a window, in towers of which some layers see windows alone."""
    tower = of_tower(config)
    return int((required(tower, "window_size") // required(tower, "patch_size")) ** 2)


def feed_forward(config: Any) -> int:
    """Widths of all feed-forward matrices of a layer, added up."""
    tower = of_tower(config)
    inner = getattr(tower, "intermediate_size", None)
    if model_type(tower).startswith(_WIDE):
        inner = _field(tower, "out_hidden_size")
    if inner is None:
        ratio = _field(tower, "mlp_ratio")
        inner = width(tower) * ratio if ratio else required(tower, "intermediate_size")
    inner = int(inner)
    if model_type(tower).startswith(_GATED):
        return 3 * inner
    if _field(tower, "use_swiglu_ffn"):
        # DINOv2's own rounding of the gated width, of which there are three matrices.
        return 3 * ((int(inner * 2 / 3) + 7) // 8 * 8)
    return 2 * inner


def words(config: Any) -> str:
    """A model's tower in words, as weights are marked with it; "?" for what it does not say."""
    tower = of_tower(config)
    layers = getattr(tower, "num_hidden_layers", None) or getattr(tower, "depth", "?")
    return (
        f"vision tower {getattr(tower, 'model_type', '?')} with {layers} layers, hidden size "
        f"{getattr(tower, 'hidden_size', '?')}"
    )
