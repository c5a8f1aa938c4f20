"""One short record a model family: the accessors and policies in which families differ.

A record says how to count an image's crops, how the family packs patches into visual tokens,
and what its authors' release does with positions. Everything else is shared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vlmprune import layout
from vlmprune.errors import VlmpruneError

Positions = Literal["auto", "compact", "original"]

# Vision towers that stand behind the families here, and whether they have a CLS token.
TOWERS: Mapping[str, bool] = {
    "clip_vision_model": True,
    "dinov2": True,
    "siglip_vision_model": False,
}


@dataclass(frozen=True)
class Family:
    """What the pruner must know of a model family.

    Attributes:
        name: as users call it.
        cls: the class of transformers.
        positions: what the authors' release of VisPruner does on this family.
        pixel_inputs: the inputs that hold images, all with the images along dimension 0.
        crops: (model, inputs) → number of crops of each image.
        pack: (model, inputs, label maps) → packed label maps, by the host's own code.
        note: what a user should know, in a few words.
    """

    name: str
    cls: str
    positions: Literal["compact", "original"]
    pixel_inputs: tuple[str, ...]
    crops: Callable[[Any, Mapping[str, Any]], list[int]]
    pack: Callable[[Any, Mapping[str, Any], list[Tensor]], list[Tensor]]
    note: str


def _one_crop(model: Any, inputs: Mapping[str, Any]) -> list[int]:
    pixels = inputs["pixel_values"]
    if pixels.ndim != 4:
        raise VlmpruneError(
            f"pixel_values of shape {tuple(pixels.shape)} are not [images, channels, height, "
            "width]; pass what the model's own processor returns."
        )
    return [1] * pixels.shape[0]


def _as_they_are(model: Any, inputs: Mapping[str, Any], maps: list[Tensor]) -> list[Tensor]:
    return [m.flatten(0, 1) for m in maps]


def _any_resolution_crops(model: Any, inputs: Mapping[str, Any]) -> list[int]:
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    if inputs.get("image_sizes") is None:
        raise VlmpruneError(
            "pixel_values came without image_sizes; pass all that the model's own processor "
            "returns."
        )
    config: Any = model.config
    return [
        image_size_to_num_patches(
            size, config.image_grid_pinpoints, config.vision_config.image_size
        )
        for size in inputs["image_sizes"]
    ]


def _any_resolution_pack(model: Any, inputs: Mapping[str, Any], maps: list[Tensor]) -> list[Tensor]:
    newline = torch.tensor([float(layout.NO_PATCH)], device=maps[0].device)
    strategy = inputs.get("vision_feature_select_strategy")
    strategy = strategy or model.config.vision_feature_select_strategy
    packed, _ = base(model).pack_image_features(
        maps, inputs["image_sizes"], strategy, image_newline=newline
    )
    return list(packed)


FAMILIES: Mapping[str, Family] = {
    "llava": Family(
        name="LLaVA-1.5",
        cls="LlavaForConditionalGeneration",
        positions="compact",
        pixel_inputs=("pixel_values",),
        crops=_one_crop,
        pack=_as_they_are,
        note="one crop an image; the embedded model is of this family",
    ),
    "llava_next": Family(
        name="LLaVA-NeXT",
        cls="LlavaNextForConditionalGeneration",
        positions="compact",
        pixel_inputs=("pixel_values", "image_sizes"),
        crops=_any_resolution_crops,
        pack=_any_resolution_pack,
        note="any resolution: unpadded, newlines always kept",
    ),
}


def family_of(model: Any) -> Family:
    """The record of a model.

    Raises:
        VlmpruneError: the class is not supported; the sentence lists those that are.
    """
    config: Any = getattr(model, "config", None)
    family = FAMILIES.get(getattr(config, "model_type", ""))
    if family is None or type(model).__name__ != family.cls:
        known = ", ".join(f.cls for f in FAMILIES.values())
        raise VlmpruneError(
            f"vlmprune does not support {type(model).__name__} yet; supported: {known}."
        )
    kind = config.vision_config.model_type
    if kind not in TOWERS:
        raise VlmpruneError(
            f"vlmprune does not support the vision tower {kind!r} yet; supported towers: "
            f"{', '.join(TOWERS)}."
        )
    return family


def base(model: Any) -> Any:
    """The model below the language-model head, which encodes images."""
    return model.model


def tower(model: Any) -> Any:
    """The vision encoder."""
    return base(model).vision_tower


def decoder_layers(model: Any) -> nn.ModuleList:
    """The layers of the language model."""
    return base(model).language_model.layers


def cuttable_layers(model: Any) -> list[int]:
    """The decoder layers with full attention, whose cache may be cut.

    A sliding window drops old columns by itself, and linear attention has none.
    """
    config = model.config.get_text_config(decoder=True)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        windows = [getattr(config, n, None) for n in ("sliding_window", "attention_chunk_size")]
        kinds = ["full_attention" if windows == [None, None] else "other"]
        kinds = kinds * config.num_hidden_layers
    return [i for i, kind in enumerate(kinds) if kind == "full_attention"]


def projector(model: Any) -> Any:
    """The module that takes the encoder's features to the language model's width."""
    return base(model).multi_modal_projector


def has_cls(model: Any) -> bool:
    """Whether the vision encoder puts a CLS token first."""
    return TOWERS[model.config.vision_config.model_type]


def keeps_cls(model: Any, inputs: Mapping[str, Any]) -> bool:
    """Whether the CLS token itself is passed on as a visual token ("full" selection)."""
    strategy = inputs.get("vision_feature_select_strategy")
    strategy = strategy or model.config.vision_feature_select_strategy
    if strategy == "default" and not has_cls(model):
        raise VlmpruneError(
            "vision_feature_select_strategy='default' drops the first patch of a tower without a "
            "CLS token; set it to 'full' in the model's config."
        )
    return strategy == "full" and has_cls(model)


def tower_layers(model: Any) -> nn.ModuleList:
    """The encoder layers of the vision tower."""
    depth = model.config.vision_config.num_hidden_layers
    for module in tower(model).modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return module
    raise VlmpruneError(f"no list of {depth} layers was found in {type(tower(model)).__name__}.")


def feature_layer(model: Any, override: int | list[int] | None = None) -> int:
    """0-based layer whose output the model takes as features (the last, where it takes several).

    `vision_feature_layer` counts hidden states, of which number 0 is the embedding: with 24
    layers, -2 is the output of layer 22.
    """
    depth = len(tower_layers(model))
    chosen = model.config.vision_feature_layer if override is None else override
    chosen = [chosen] if isinstance(chosen, int) else list(chosen)
    return max((index if index >= 0 else depth + 1 + index) - 1 for index in chosen)


def grid_of(model: Any, inputs: Mapping[str, Any]) -> tuple[int, int]:
    """(rows, columns) of patches in a crop, from the pixels that came."""
    patch = model.config.vision_config.patch_size
    height, width = inputs["pixel_values"].shape[-2:]
    return height // patch, width // patch


def architecture(model: Any) -> str:
    """What a calibration holds for: the type and size of the language model, in words."""
    config = model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return (
        f"{model.config.model_type} with {config.num_hidden_layers} layers, hidden size "
        f"{config.hidden_size}, {config.num_attention_heads} query and {heads} KV heads, "
        f"vocabulary {config.vocab_size}"
    )


def resolve_positions(model: Any, positions: Positions) -> Literal["compact", "original"]:
    """What `positions="auto"` means for a model: its config's advice, else the release's way.

    A config gives advice by an extra entry `"vlmprune": {"positions": "original"}`.
    """
    if positions != "auto":
        return positions
    advice = getattr(model.config, "vlmprune", None) or {}
    advised = advice.get("positions") if isinstance(advice, Mapping) else None
    if advised in ("compact", "original"):
        return advised
    return family_of(model).positions
