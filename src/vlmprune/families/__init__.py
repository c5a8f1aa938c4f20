"""One short record a model family: the accessors and policies in which families differ."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Literal

from torch import nn

from vlmprune.errors import VlmpruneError
from vlmprune.families import generic, llava, pixtral, pooled, qwen, tiles, video
from vlmprune.families.record import Family
from vlmprune.families.towers import TOWERS
from vlmprune.hosts import release

Positions = Literal["auto", "compact", "original"]

__all__ = ["FAMILIES", "TOWERS", "Family", "Positions", "family_of"]


FAMILIES: Mapping[str, Family] = {
    **llava.FAMILIES,
    **video.FAMILIES,
    **pixtral.FAMILIES,
    **pooled.FAMILIES,
    **tiles.FAMILIES,
    **qwen.FAMILIES,
}


def family_of(model: Any) -> Family:
    """The record of a model: its family's, else one that a self-check of the model makes.

    Raises:
        VlmpruneError: the model cannot be followed; one sentence says why.
    """
    config: Any = getattr(model, "config", None)
    kind = getattr(config, "model_type", "")
    tower = getattr(getattr(config, "vision_config", None), "model_type", "")
    # A family may have a record of its own for one of its towers.
    family = FAMILIES.get(f"{kind}:{tower}") or FAMILIES.get(kind)
    if family is None or type(model).__name__ != family.cls:
        return generic.family(model)
    for medium in family.media:
        medium.check(model)
    return family


def unwrapped(model: Any) -> Any:
    """The model inside a wrapper of PEFT or `torch.compile`; any other as it is."""
    while True:
        if hasattr(type(model), "get_base_model") and hasattr(model, "peft_config"):
            model = model.get_base_model()
        elif type(model).__name__ == "OptimizedModule":
            model = model._orig_mod
        else:
            return model


def base(model: Any) -> Any:
    """The model below the language-model head, which encodes images."""
    return model.base_model


def decoder_layers(model: Any) -> nn.ModuleList:
    """The layers of the language model."""
    decoder = model.get_decoder()
    return getattr(decoder, "model", decoder).layers


def recomputes(model: Any) -> bool:
    """Whether the language model would recompute activations in a forward now, without a cache."""
    decoder = model.get_decoder()
    decoder = getattr(decoder, "model", decoder)
    return release.recomputes((decoder, *decoder.layers))


def layer_kinds(model: Any) -> list[str]:
    """How each decoder layer attends, in Transformers' words ("full_attention", …)."""
    config = model.config.get_text_config(decoder=True)
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return list(kinds)
    for name, kind in (
        ("sliding_window", "sliding_attention"),
        ("attention_chunk_size", "chunked_attention"),
    ):
        if getattr(config, name, None) is not None:
            return [kind] * config.num_hidden_layers
    return ["full_attention"] * config.num_hidden_layers


def deepstack_layers(model: Any) -> int:
    """Number of first decoder layers behind which the host adds features to visual tokens."""
    vision = getattr(model.config, "vision_config", None)
    return len(getattr(vision, "deepstack_visual_indexes", None) or ())


def rotary_modules(model: Any) -> list[nn.Module]:
    """The modules of the language model that make rotary angles for all layers."""
    decoder = model.get_decoder()
    decoder = getattr(decoder, "model", decoder)
    own = [child for name, child in decoder.named_children() if name != "layers"]
    return [child for child in own if "rotary" in type(child).__name__.lower()]


def takes_angles(layer: nn.Module) -> bool:
    """Whether a decoder layer takes rotary angles from outside."""
    return "position_embeddings" in inspect.signature(layer.forward).parameters


def cuttable_layers(model: Any) -> list[int]:
    """The decoder layers with full attention, whose cache may be cut.

    A sliding window drops old columns by itself, and linear attention has none.
    """
    return [i for i, kind in enumerate(layer_kinds(model)) if kind == "full_attention"]


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
    family = family_of(model)
    if family.rope is not None:
        if positions == "compact":
            raise VlmpruneError(
                f"{family.name} gives a visual token three positions, which renumbering would "
                "destroy; use positions='original' or 'auto'."
            )
        return "original"
    if positions != "auto":
        return positions
    return advised_positions(model) or family.positions


def advised_positions(model: Any) -> Literal["compact", "original"] | None:
    """What a model's config advises, if it does."""
    advice = getattr(model.config, "vlmprune", None) or {}
    advised = advice.get("positions") if isinstance(advice, Mapping) else None
    if advised == "compact" or advised == "original":
        return advised
    return None
