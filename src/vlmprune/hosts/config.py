"""What Transformers' configs say: each field that we read generically is named here alone.

A field that a release is known to have is required, and its absence is told in one sentence: a
default in its place would be a guess about the host. Which optional fields a language model has
differs by its type, so that is a table (`_TEXTS`). Every function takes a config, of a whole model
or of its language model unless it says otherwise, and gives plain data. Fields of single families
stand in their records.

Imports Transformers only to name the release in an error, so that formulas on configs stay light.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from vlmprune.errors import VlmpruneError

_MISSING = object()

# Of the fields that not every language model has, those that a type has in all tested releases
# that have it.
# A type that is not here is read as Transformers itself reads an unknown one: what is missing
# is off, KV heads are as many as heads, and a head is as wide as its share of the hidden size.
_HEADS = ("num_key_value_heads", "head_dim")
_KINDS = ("num_key_value_heads", "layer_types", "sliding_window")
_SHARING = (*_KINDS, "head_dim", "num_kv_shared_layers")
_TEXTS: Mapping[str, Collection[str]] = {
    "llama": _HEADS,
    "gemma": _HEADS,
    "qwen3_vl_text": _HEADS,
    "qwen3_vl_moe_text": (*_HEADS, "sliding_window"),
    "qwen3_5_text": (*_HEADS, "layer_types"),
    "qwen3_5_moe_text": (*_HEADS, "layer_types"),
    "glm4v_text": ("num_key_value_heads",),
    "glm4v_moe_text": ("num_key_value_heads",),
    "glm_ocr_text": ("num_key_value_heads",),
    "mistral_large4_text": (*_HEADS, "layer_types"),
    "mistral": (*_HEADS, "sliding_window"),
    "qwen2": _KINDS,
    "qwen2_vl_text": _KINDS,
    "qwen2_5_vl_text": _KINDS,
    "qwen3": (*_KINDS, "head_dim"),
    "cohere2": (*_KINDS, "head_dim"),
    "cohere_compass_text": (*_KINDS, "head_dim"),
    "gemma2": (*_KINDS, "head_dim", "attn_logit_softcapping"),
    "gemma3n_text": _SHARING,
    "gemma4_text": _SHARING,
    "gemma4_unified_text": _SHARING,
    "gemma3_text": (*_KINDS, "head_dim", "attn_logit_softcapping"),
    "llama4_text": (
        *_HEADS,
        "layer_types",
        "attention_chunk_size",
        "attn_temperature_tuning",
        "floor_scale",
    ),
}

# Kinds of decoder layers that carry a state and hold no keys and values, in Transformers' words.
RECURRENT = ("linear_attention", "conv", "mamba")


def required(config: Any, name: str) -> Any:
    """A field that the release is known to have, and to give a value.

    Args:
        config: of a model or of a part of it.
        name: of the field.

    Raises:
        VlmpruneError: it is not there, or None.
    """
    value = getattr(config, name, None)
    if value is None:
        raise _missing(config, name)
    return value


def stated(config: Any, name: str) -> Any:
    """A field that the release is known to have, whose value may be None.

    Raises:
        VlmpruneError: it is not there.
    """
    value = getattr(config, name, _MISSING)
    if value is _MISSING:
        raise _missing(config, name)
    return value


def check_fields(config: Any, names: Collection[str]) -> None:
    """Refuse a config that lacks one of some required fields.

    Args:
        config: of a whole model.
        names: of fields, parts of the config before a dot ("vision_config.patch_size").

    Raises:
        VlmpruneError: one of them is not there, or None.
    """
    for name in names:
        place = config
        for part in name.split("."):
            place = required(place, part)


def check_text(config: Any) -> None:
    """Refuse a language model's config that lacks a field which its type is known to have.

    Raises:
        VlmpruneError: it does.
    """
    text = of_text(config)
    for name in _TEXTS.get(model_type(text), ()):
        if not differs(text, name):
            field_of(text, name, _TEXTS)


def differs(config: Any, name: str) -> bool:
    """Whether layers have values of their own, so that the config itself refuses to tell one."""
    return each_layer(config) is not None and name in required(config, "per_layer_attributes")


def _missing(config: Any, name: str) -> VlmpruneError:
    from vlmprune.hosts import release

    return VlmpruneError(
        f"{type(config).__name__} has no field {name!r} under transformers {release.version()}, "
        "and vlmprune does not guess what it would say; use a config as "
        f"transformers{release.TESTED} makes it."
    )


def field_of(part: Any, name: str, table: Mapping[str, Collection[str]]) -> Any:
    """A field that parts of some types have; None where it is not said.

    Args:
        part: the config of a language model or of a tower.
        name: of the field.
        table: for each type the fields that Transformers' own config of it has. What stands in
            for a config says what it wants to.

    Raises:
        VlmpruneError: the type has it, but this config has not.
    """
    known = name in table.get(model_type(part), ()) and _is_stock(part)
    return stated(part, name) if known else getattr(part, name, None)


def _is_stock(config: Any) -> bool:
    return any(cls.__module__.startswith("transformers.") for cls in type(config).__mro__)


def text_field(text: Any, name: str) -> Any:
    """A field that language models of some types have; None where it is not said."""
    return field_of(text, name, _TEXTS)


# Parts of a config.


def of_model(model: Any) -> Any:
    """A model's config; None of what is no model of Transformers."""
    return getattr(model, "config", None)


def model_type(config: Any) -> str:
    """The type of a model, or of a part, in Transformers' words; "" where none is said."""
    return str(getattr(config, "model_type", None) or "")


def of_text(config: Any) -> Any:
    """The language model's config: of a model's config its part, else the config itself."""
    part = getattr(config, "get_text_config", None)
    if part is not None:
        return part(decoder=True)
    part = getattr(config, "text_config", None)
    return config if part is None else part


def of_tower(config: Any) -> Any:
    """The vision tower's config: of a model's config its part, else the config itself."""
    part = getattr(config, "vision_config", None)
    return config if part is None else part


def described(file: Mapping[str, Any]) -> tuple[str | None, str | None, list[str]]:
    """Type of model, type of vision tower and classes that the contents of a `config.json` name."""
    tower = (file.get("vision_config") or {}).get("model_type")
    return file.get("model_type"), tower, [str(one) for one in file.get("architectures") or []]


def has_vision(config: Any) -> bool:
    """Whether a model's config has a part for a vision tower."""
    return getattr(config, "vision_config", None) is not None


def tower_type(config: Any) -> str:
    """The type of a model's vision tower; "" where it has none."""
    return model_type(getattr(config, "vision_config", None))


def json_of(config: Any) -> str | None:
    """A config as text, which tells it from others; None where it cannot be had."""
    try:
        return str(config.to_json_string())
    except (AttributeError, TypeError):
        return None


def advice(config: Any) -> Mapping[str, Any]:
    """The extra entry "vlmprune" of a model's config, which no release knows; may be empty."""
    entry = getattr(config, "vlmprune", None)
    return entry if isinstance(entry, Mapping) else {}


# Tokens.


def placeholder(config: Any, name: str) -> int:
    """The id of a modality's placeholders.

    Args:
        config: of a model.
        name: of the field, as the family's record has it.

    Raises:
        VlmpruneError: the config has no such field.
    """
    return int(required(config, name))


def has_placeholder(config: Any, name: str) -> bool:
    """Whether a config of a model that no record knows names the id of placeholders."""
    return isinstance(getattr(config, name, None), int)


def pad_id(config: Any) -> int:
    """The id that fills rows up; 0 where there is none, since nobody reads those columns."""
    pad = getattr(of_text(config), "pad_token_id", None)
    return pad if isinstance(pad, int) and pad >= 0 else 0


def bos_id(config: Any) -> int | None:
    """The id that begins a prompt, if the language model has one."""
    bos = getattr(of_text(config), "bos_token_id", None)
    return None if bos is None else int(bos)


# Settings that a call may leave to the config.


def returns_states(config: Any) -> bool:
    """Whether hidden states are returned where a call does not say so.

    The host's decoder looks at its own config; other parts may look at the whole.
    """
    return any(getattr(one, "output_hidden_states", False) for one in (config, of_text(config)))


def returns_attentions(config: Any) -> bool:
    """Whether the language model returns attention weights where a call does not say so."""
    return bool(getattr(of_text(config), "output_attentions", False))


def caches(config: Any) -> bool:
    """Whether a forward fills a KV cache where a call does not say so."""
    return bool(getattr(of_text(config), "use_cache", True))


def attention_implementation(config: Any) -> str:
    """The name of the attention that a module with this very config runs; "" where none is set.

    Raises:
        VlmpruneError: it is no config of a release that was tested.
    """
    return stated(config, "_attn_implementation") or ""


# The language model.


def layer_kinds(config: Any) -> list[str]:
    """How each decoder layer attends, in Transformers' words ("full_attention", …).

    Raises:
        VlmpruneError: a field is not there which the type of language model is known to have.
    """
    text = of_text(config)
    kinds = text_field(text, "layer_types")
    if kinds is not None:
        return list(kinds)
    for name, kind in (
        ("sliding_window", "sliding_attention"),
        ("attention_chunk_size", "chunked_attention"),
    ):
        if text_field(text, name) is not None:
            return [kind] * required(text, "num_hidden_layers")
    return ["full_attention"] * required(text, "num_hidden_layers")


def listed_kinds(config: Any) -> frozenset[str]:
    """The kinds of layers that a config lists; empty where it lists none."""
    return frozenset(text_field(of_text(config), "layer_types") or ())


def own_caches(config: Any) -> list[bool] | None:
    """For each decoder layer whether its keys and values are its own; None where all are.

    The last layers of some models use those of an earlier layer, and have no cache.
    """
    text = of_text(config)
    modes = getattr(text, "kv_sharing_modes", None)
    if modes is not None:
        return [mode != "reuse" for mode in modes]
    shared = text_field(text, "num_kv_shared_layers")
    if not shared:
        return None
    depth = required(text, "num_hidden_layers")
    return [number < depth - shared for number in range(depth)]


def each_layer(config: Any) -> Sequence[Any] | None:
    """The config of each decoder layer where they differ; None where they do not."""
    text = of_text(config)
    return list(text.per_layer_config) if getattr(text, "is_heterogeneous", False) else None


def recurrent_kinds(config: Any) -> list[str]:
    """The kinds of decoder layers that carry a state from column to column, as they come."""
    return sorted(kind for kind in listed_kinds(config) if kind in RECURRENT)


def sharing_layers(config: Any) -> tuple[frozenset[int], frozenset[int]]:
    """The decoder layers that attend to another layer's keys and values, and those others.

    Gemma 3n and Gemma 4 let their last layers share what the last one before them has of each kind.
    """
    text = of_text(config)
    count = text_field(text, "num_kv_shared_layers") or 0
    kinds = layer_kinds(config)
    first = len(kinds) - count
    lend = {kind: index for index, kind in enumerate(kinds[:first])}
    borrow = range(first, len(kinds))
    return frozenset(borrow), frozenset(lend[k] for k in kinds[first:] if k in lend)


def is_latent(config: Any) -> bool:
    """Whether the language model attends to keys and values that it makes of a latent (MLA)."""
    return bool(getattr(of_text(config), "kv_lora_rank", None))


def crosses(config: Any) -> bool:
    """Whether images reach the language model by cross-attention, beside the prompt."""
    return bool(getattr(of_text(config), "cross_attention_layers", None))


def deepstack_layers(config: Any) -> int:
    """Number of first decoder layers behind which the host adds features to visual tokens.

    Only some towers have the field; the record of a family that has it requires it.
    """
    return len(getattr(of_tower(config), "deepstack_visual_indexes", None) or ())


def is_capped(config: Any) -> bool:
    """Whether the language model caps its attention scores (`attn_logit_softcapping`)."""
    return text_field(of_text(config), "attn_logit_softcapping") is not None


def tempered_from(config: Any) -> int | None:
    """The token from which on queries are scaled by their number; None where they are not."""
    text = of_text(config)
    if not text_field(text, "attn_temperature_tuning"):
        return None
    return int(required(text, "floor_scale"))


def rope_type(config: Any) -> str:
    """How a language model's rotary angles are made, in Transformers' words."""
    return str(_rope(config).get("rope_type", "default"))


def _rope(config: Any) -> Mapping[str, Any]:
    return getattr(of_text(config), "rope_parameters", None) or {}


def longest_prompt(config: Any) -> int | None:
    """Positions that the language model was made for, if its config says how many."""
    most = getattr(of_text(config), "max_position_embeddings", None)
    return None if most is None else int(most)


def has_encoder(config: Any) -> bool:
    """Whether the language model has an encoder of its own."""
    return bool(getattr(config, "is_encoder_decoder", False))
