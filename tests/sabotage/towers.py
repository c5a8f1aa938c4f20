"""Rows about vision towers: how their layers run, where parts stand, and how tokens lie."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from pytest import MonkeyPatch
from torch import nn
from transformers import vision_utils

from sabotage.attention import tower
from sabotage.hosts import Row
from sabotage.tools import Arguments, called, elsewhere, recast, unhooked

Change = Callable[[Any, MonkeyPatch], None]


def _layers(model: Any) -> Any:
    found = tower(model)
    return found.blocks if hasattr(found, "blocks") else found.encoder.layers


def _without_hooks(model: Any, patch: MonkeyPatch) -> None:
    for layer in _layers(model):
        unhooked(layer)


def _listed(decoy: Callable[[nn.ModuleList], nn.ModuleList | None]) -> Change:
    def change(model: Any, patch: MonkeyPatch) -> None:
        found = tower(model)
        owner, name = (found, "blocks") if hasattr(found, "blocks") else (found.encoder, "layers")
        elsewhere(owner, name, decoy(getattr(owner, name)), "forward")

    return change


def _part(name: str, decoy: bool) -> Change:
    """A part of the base model under another attribute, or with a copy in its place."""

    def change(model: Any, patch: MonkeyPatch) -> None:
        base = model.model
        copied = copy.deepcopy(getattr(base, name)) if decoy else None
        elsewhere(base, name, copied, "get_image_features")

    return change


def _another_feature_layer(model: Any, patch: MonkeyPatch) -> None:
    """The config says another feature layer than the one that the code takes."""
    base = model.model
    plain = type(base).get_image_features

    @wraps(plain)
    def features(self: Any, *args: Any, **kwargs: Any) -> Any:
        return plain(self, *args, **kwargs | {"vision_feature_layer": -2})

    recast(base, get_image_features=features)
    model.config.vision_feature_layer = -1


def _inside(forth: Callable[[Any], Any], back: Callable[[Any], Any]) -> Change:
    """Tokens in another order inside the layers than outside."""

    def change(model: Any, patch: MonkeyPatch) -> None:
        encoder = tower(model).encoder

        def translate(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
            return (forth(args[0]), *args[1:]), kwargs

        for layer in encoder.layers:
            cls = type(layer)
            plain = cls.forward

            def forward(self: Any, *args: Any, plain: Any = plain, **kwargs: Any) -> Any:
                args, kwargs = translate(args, kwargs)
                return back(plain(self, *args, **kwargs))

            recast(layer, forward=wraps(plain)(forward))

    return change


def _attention_inside(forth: Callable[[Any], Any], back: Callable[[Any], Any]) -> Change:
    """Tokens in another order where a layer attends than where its output is read."""

    def change(model: Any, patch: MonkeyPatch) -> None:
        for layer in tower(model).encoder.layers:
            one = layer.self_attn
            plain = type(one).forward

            def forward(self: Any, *args: Any, plain: Any = plain, **kwargs: Any) -> Any:
                if args:
                    args = (forth(args[0]), *args[1:])
                else:
                    kwargs = kwargs | {"hidden_states": forth(kwargs["hidden_states"])}
                out = plain(self, *args, **kwargs)
                return (back(out[0]), *out[1:])

            recast(one, forward=wraps(plain)(forward))

    return change


def _flipped(states: torch.Tensor) -> torch.Tensor:
    return states.flip(1)


def _rolled(states: torch.Tensor) -> torch.Tensor:
    """The CLS token last."""
    return states.roll(-1, 1)


def _unrolled(states: torch.Tensor) -> torch.Tensor:
    return states.roll(1, 1)


def _crops_backwards(model: Any, patch: MonkeyPatch) -> None:
    """Images go through the tower in another order than they come in."""
    found = tower(model)
    plain = type(found).forward

    @wraps(plain)
    def forward(self: Any, pixel_values: Any, **kwargs: Any) -> Any:
        out = plain(self, pixel_values.flip(0), **kwargs)
        for name, value in out.items():
            if isinstance(value, tuple):
                out[name] = tuple(None if v is None else v.flip(0) for v in value)
            else:
                out[name] = value.flip(0)
        return out

    recast(found, forward=forward)


def _one_image_a_call(model: Any, patch: MonkeyPatch) -> None:
    """Images go through tower and projector one by one."""
    base = model.model
    plain = type(base).get_image_features

    @wraps(plain)
    def features(self: Any, pixel_values: Any, *args: Any, **kwargs: Any) -> Any:
        outs = [plain(self, one, *args, **kwargs) for one in pixel_values.split(1)]
        outs[0].pooler_output = [part for out in outs for part in out.pooler_output]
        return outs[0]

    recast(base, get_image_features=features)


def _run_twice(model: Any, patch: MonkeyPatch) -> None:
    """A tower that is run twice, as for a look at the picture before."""
    base = model.model
    plain = type(base).get_image_features

    @wraps(plain)
    def features(self: Any, pixel_values: Any, *args: Any, **kwargs: Any) -> Any:
        plain(self, pixel_values.flip(-1), *args, **kwargs)
        return plain(self, pixel_values, *args, **kwargs)

    recast(base, get_image_features=features)


def _projector_args(model: Any, patch: MonkeyPatch) -> None:
    """A projector whose first argument is something else than features."""
    base = model.model

    def forth(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        states = args[0] if args else next(iter(kwargs.values()))
        return (torch.zeros_like(states), states), {}

    called(base.multi_modal_projector, forth, lambda args, kwargs: (args[1:], kwargs))


def _features_flipped(model: Any, patch: MonkeyPatch) -> None:
    """A projector that gets tokens in another order than the features that come of it."""
    projector = model.model.multi_modal_projector
    cls = type(projector)

    def call(self: Any, features: Any) -> Any:
        return cls.__call__(self, features.flip(1)).flip(1)

    recast(projector, __call__=call)


def _packed_otherwise(model: Any, patch: MonkeyPatch) -> None:
    """The packing method that is found is not the one that the encoder uses."""
    base = model.model
    cls = type(base)
    pack, encode = cls.pack_image_features, cls.get_image_features

    @wraps(pack)
    def other(self: Any, *args: Any, **kwargs: Any) -> Any:
        packed, *rest = pack(self, *args, **kwargs)
        if vars(self).get("_packing"):
            return packed, *rest
        return [one.flip(0) for one in packed], *rest

    @wraps(encode)
    def features(self: Any, *args: Any, **kwargs: Any) -> Any:
        vars(self)["_packing"] = True
        try:
            return encode(self, *args, **kwargs)
        finally:
            vars(self)["_packing"] = False

    vars(base)["_packing"] = False
    recast(base, pack_image_features=other, get_image_features=features)


def _windows(change: Callable[[Callable[..., Any]], Callable[..., Any] | None]) -> Change:
    """The function that tells the order of windows, for all but the tower itself.

    Args:
        change: makes another of it; None for one that has moved.
    """

    def change_model(model: Any, patch: MonkeyPatch) -> None:
        found, name = tower(model), "get_vision_window_index"
        places = (vision_utils, sys.modules[type(found).__module__])
        plain = getattr(vision_utils, name)
        other = change(plain)
        for place in places:
            if other is None:
                patch.delattr(place, name)
            else:
                patch.setattr(place, name, other)
        forward = type(found).forward

        @wraps(forward)
        def with_its_own(self: Any, *args: Any, **kwargs: Any) -> Any:
            with MonkeyPatch.context() as inner:
                for place in places:
                    inner.setattr(place, name, plain, raising=False)
                return forward(self, *args, **kwargs)

        recast(found, forward=with_its_own)

    return change_model


def _inverse(plain: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(plain)
    def inverse(*args: Any, **kwargs: Any) -> Any:
        order, *rest = plain(*args, **kwargs)
        return order.argsort(), *rest

    return inverse


ROWS: list[Row] = [
    Row("the tower's layers run without hooks", _without_hooks),
    Row("the tower's layers stand under another attribute", _listed(lambda layers: None)),
    Row("the tower's layers that are listed first do not run", _listed(copy.deepcopy)),
    Row(
        "the tower's layers are listed in another order than they run",
        _listed(lambda layers: nn.ModuleList([layers[-1], *layers[:-1]])),
    ),
    Row("the tower stands under another attribute", _part("vision_tower", False)),
    Row("the tower that is found is not the one that runs", _part("vision_tower", True)),
    Row("the projector stands under another attribute", _part("multi_modal_projector", False)),
    Row(
        "the projector that is found is not the one that runs",
        _part("multi_modal_projector", True),
    ),
    Row("the config says another feature layer than is taken", _another_feature_layer),
    Row("tokens are flipped inside layers", _inside(_flipped, _flipped), types=("float32",)),
    Row(
        "tokens are flipped inside layers, SigLIP",
        _inside(_flipped, _flipped),
        host="gemma3",
        types=("float32",),
    ),
    Row(
        "tokens are flipped where layers attend",
        _attention_inside(_flipped, _flipped),
        types=("float32",),
    ),
    Row(
        "the CLS token is last where layers attend",
        _attention_inside(_rolled, _unrolled),
        types=("float32",),
    ),
    Row("images go through the tower backwards", _crops_backwards),
    # Sums of other shapes round otherwise, which turns choices in half precision.
    Row("images go through the tower backwards, SigLIP", _crops_backwards, host="gemma3"),
    Row("images go through the tower backwards, tiles", _crops_backwards, host="llava_next"),
    Row(
        "tokens are flipped inside layers, tiles",
        _inside(_flipped, _flipped),
        host="llava_next",
        types=("float32",),
    ),
    Row(
        "the CLS token is last where layers attend, tiles",
        _attention_inside(_rolled, _unrolled),
        host="llava_next",
        types=("float32",),
    ),
    Row("images go through the tower one by one", _one_image_a_call, types=("float32",)),
    Row("the tower runs twice", _run_twice),
    Row("features are the projector's second argument", _projector_args),
    Row("the projector gets tokens in another order", _features_flipped, types=("float32",)),
    Row("tokens are packed by another method", _packed_otherwise, host="llava_next"),
    Row("windows are told by their inverse order", _windows(_inverse), host="qwen2_5_vl"),
    Row("the function that tells windows is gone", _windows(lambda _: None), host="qwen2_5_vl"),
    Row("blocks run without hooks", _without_hooks, host="qwen2_5_vl"),
    Row("blocks that are listed do not run", _listed(copy.deepcopy), host="qwen2_5_vl"),
]
