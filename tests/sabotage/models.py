"""Rows about whole models: arguments, methods and parts, and who takes pruned features."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from pytest import MonkeyPatch
from transformers import GenerationMixin

from sabotage.hosts import Row
from sabotage.tools import (
    Arguments,
    called,
    elsewhere,
    first_forward_alone,
    recast,
    rename,
    signature,
    standing_in,
)
from stock import CACHE

Change = Callable[[Any, MonkeyPatch], None]


def _argument(old: str, new: str) -> Change:
    """An argument of the model's forward, in whose place only the new name counts."""

    def change(model: Any, patch: MonkeyPatch) -> None:
        rename(model, **{old: new})

    return change


def _pixels(model: Any, patch: MonkeyPatch) -> None:
    rename(model, pixel_values="pixels")
    base = model.model
    plain = type(base).get_image_features

    def features(self: Any, pixels: Any = None, **kwargs: Any) -> Any:
        # The forward below says it as ever.
        return plain(self, kwargs.pop("pixel_values", pixels), **kwargs)

    vars(features)["__signature__"] = signature(plain, {"pixel_values": "pixels"})
    recast(base, get_image_features=features)

    first_forward_alone(model, "pixels")
    _encodes_in_forward(model)


def _encodes_in_forward(model: Any) -> None:
    """Have `generate` leave the encoder to the forward, as early releases do."""
    if hasattr(type(model), "_supports_mm_encoder_outputs"):
        recast(model, _supports_mm_encoder_outputs=lambda self: False)


def _positions_dropped(model: Any, patch: MonkeyPatch) -> None:
    """A `generate` that hands no positions on, as some classes have it."""
    plain = type(model).prepare_inputs_for_generation

    @wraps(plain)
    def prepare(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = plain(self, *args, **kwargs)
        found.pop("position_ids", None)
        return found

    recast(model, prepare_inputs_for_generation=prepare)


def _mask_dropped(model: Any, patch: MonkeyPatch) -> None:
    """A `generate` that hands no mask on."""
    plain = type(model).prepare_inputs_for_generation

    @wraps(plain)
    def prepare(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = plain(self, *args, **kwargs)
        found.pop("attention_mask", None)
        return found

    recast(model, prepare_inputs_for_generation=prepare)


def _features_past_us(checked: bool) -> Change:
    """A base model that encodes by code of its own, for which no method can be shadowed."""

    def change(model: Any, patch: MonkeyPatch) -> None:
        base = model.model
        cls = type(base)
        encode, plain = cls.get_image_features, cls.forward

        @wraps(plain)
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            # Whatever stands in the instance's place of the method is not asked.
            shadow = vars(self).pop("get_image_features", None)
            try:
                return plain(self, *args, **kwargs)
            finally:
                if shadow is not None:
                    vars(self)["get_image_features"] = shadow

        members: dict[str, Any] = {"forward": forward, "get_image_features": encode}
        if not checked:
            # As many features as there are placeholders are taken, the first ones.
            def mask(self: Any, input_ids: Any, inputs_embeds: Any, **others: Any) -> Any:
                return (input_ids == self.config.image_token_id)[..., None]

            members["get_placeholder_mask"] = mask
        recast(base, **members)
        _encodes_in_forward(model)

    return change


def _method_renamed(model: Any, patch: MonkeyPatch) -> None:
    """A base model without `get_image_features`, which it calls by another name."""
    base = model.model
    cls = type(base)
    encode, plain = cls.get_image_features, cls.forward

    def missing(self: Any) -> Any:
        if vars(self).get("_encoding"):
            return encode.__get__(self)
        raise AttributeError("get_image_features")

    @wraps(plain)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        vars(self)["_encoding"] = True
        try:
            return plain(self, *args, **kwargs)
        finally:
            vars(self)["_encoding"] = False

    vars(base)["_encoding"] = False
    recast(base, forward=forward, get_image_features=property(missing), encode_images=encode)
    _encodes_in_forward(model)


def _other_prefix(model: Any, patch: MonkeyPatch) -> None:
    """A model that does not say which part of it is its base."""
    recast(model, base_model_prefix="core")


def _decoder_elsewhere(model: Any, patch: MonkeyPatch) -> None:
    """`get_decoder` gives the model below the head, not the language model."""
    base = model.model
    recast(model, get_decoder=lambda self: base)


def _forward_encodes_ahead(model: Any, patch: MonkeyPatch) -> None:
    """Encoder outputs under another name, both where they are made and where they are taken."""
    rename(model, mm_encoder_outputs="encoded")
    recast(model, _supports_mm_encoder_outputs=lambda self: True)
    plain = type(model)._prepare_multimodal_encoder_kwargs_for_generation

    def prepare(self: Any, kwargs: dict[str, Any]) -> Any:
        found = plain(self, kwargs)
        return {"encoded" if k == "mm_encoder_outputs" else k: v for k, v in found.items()}

    recast(model, _prepare_multimodal_encoder_kwargs_for_generation=prepare)
    first_forward_alone(model, "encoded")


def _embeds(model: Any, patch: MonkeyPatch) -> None:
    """Callers hand over embedded ids under another name."""
    embed = model.get_input_embeddings()
    rename(model, inputs_embeds="embeds")

    def forth(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        others = {k: v for k, v in kwargs.items() if k != "input_ids"}
        return args, others | {"embeds": embed(kwargs["input_ids"])}

    called(model, forth, lambda args, kwargs: (args, kwargs))


def _no_return_dict(model: Any, patch: MonkeyPatch) -> None:
    """An encoder that takes pixels and nothing else."""
    base = model.model
    encode, plain = type(base).get_image_features, type(base).forward

    def features(self: Any, pixel_values: Any) -> Any:
        return encode(self, pixel_values, return_dict=True)

    @wraps(plain)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        asked = self.get_image_features
        with standing_in(self, "get_image_features", lambda pixel_values, **_: asked(pixel_values)):
            return plain(self, *args, **kwargs)

    recast(base, get_image_features=features, forward=forward)
    _encodes_in_forward(model)


def _language_model_elsewhere(model: Any, patch: MonkeyPatch) -> None:
    """The language model under another attribute, with a copy where it stood."""
    base = model.model
    elsewhere(base, "language_model", None, "forward", "get_input_embeddings")
    language = base.language_model_in_use
    recast(model, get_decoder=lambda self: language)


@torch.no_grad()
def _features_scaled(model: Any, patch: MonkeyPatch) -> None:
    """A host that does more to the features than its method: they are scaled where they are taken.

    The projector's last weights are half of what they were, and the forward doubles its result.
    """
    base = model.model
    last = base.multi_modal_projector.linear_2
    last.weight /= 2
    if last.bias is not None:
        last.bias /= 2
    plain = type(base).get_placeholder_mask

    @wraps(plain)
    def mask(self: Any, *args: Any, **kwargs: Any) -> Any:
        kwargs["image_features"].mul_(2)
        return plain(self, *args, **kwargs)

    recast(base, get_placeholder_mask=mask)


# Early releases encode in the forward alone.
AHEAD = hasattr(GenerationMixin, "_prepare_multimodal_encoder_kwargs_for_generation")
ROWS: list[Row] = [
    *([Row("mm_encoder_outputs is called encoded", _forward_encodes_ahead)] if AHEAD else []),
    Row(
        "input_ids is called ids",
        _argument("input_ids", "ids"),
        call="turns",
        names={"input_ids": "ids"},
    ),
    Row("pixel_values is called pixels", _pixels, names={"pixel_values": "pixels"}),
    Row(
        "pixel_values is called pixels, forward",
        _pixels,
        call="turns",
        names={"pixel_values": "pixels"},
    ),
    Row(
        "attention_mask is called mask",
        _argument("attention_mask", "mask"),
        call="turns",
        names={"attention_mask": "mask"},
    ),
    Row("position_ids is called places", _argument("position_ids", "places"), batch="one"),
    Row(
        "position_ids is called places, forward",
        _argument("position_ids", "places"),
        call="turns",
        batch="one",
    ),
    Row("the cache is called kv", _argument(CACHE, "kv")),
    Row(
        "use_cache is called caching, forward",
        _argument("use_cache", "caching"),
        call="turns",
        names={"use_cache": "caching"},
    ),
    Row("inputs_embeds come, under another name", _embeds),
    Row("the encoder takes no return_dict", _no_return_dict),
    Row("generate hands no positions on", _positions_dropped, batch="one"),
    Row(
        "generate hands no positions on, tiles", _positions_dropped, host="llava_next", batch="one"
    ),
    Row("generate hands no mask on", _mask_dropped, batch="one"),
    Row("pruned features are not taken", _features_past_us(True)),
    Row("pruned features are not taken, nor counted", _features_past_us(False)),
    Row("get_image_features is called encode_images", _method_renamed),
    Row("the base model has another prefix", _other_prefix),
    Row("get_decoder gives the base model", _decoder_elsewhere),
    Row("the language model stands under another attribute", _language_model_elsewhere),
    Row("the forward does more to features than the method", _features_scaled),
]
