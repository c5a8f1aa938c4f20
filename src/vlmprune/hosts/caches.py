"""KV caches of Transformers: the layers that our own ones replace, and how they lie in a cache.

What the argument is called that hands a cache to a model or a layer stands in `hosts.release`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Sequence
from functools import cache as once
from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from vlmprune.errors import VlmpruneError
from vlmprune.hosts import release

# The layers that hold all that came, and those that hold the last columns alone.
GrowingLayer = DynamicLayer
WindowLayer = DynamicSlidingWindowLayer

_UPDATE = "update"
# By which a single step gets at states that it then changes in place, with no other call; earlier
# releases take them from the layer when they have asked whether there are any.
_IN_PLACE = ("get_conv_state", "get_recurrent_state", "has_previous_state")
# The methods by which a cache loses columns, or takes, leaves out or repeats samples.
CROP, RESET, REPEAT = "crop", "reset", "batch_repeat_interleave"
SELECT = ("reorder_cache", "batch_select_indices")
_COMPILEABLE = "is_compileable"
_LENGTH, _LAYERS, _REPLICATED = "get_seq_length", "layers", "layer_class_to_replicate"

# Everything that the layers do which ours take the place of. What a later release adds could read
# keys and values behind our back, and what it drops or renames would never be called.
_METHODS = {
    "lazy_initialization": ("key_states", "value_states"),
    "update": ("key_states", "value_states"),
    "get_mask_sizes": ("query_length",),
    "get_seq_length": (),
    "get_max_length": (),
    "offload": (),
    "prefetch": (),
    "reset": (),
    "reorder_cache": ("beam_idx",),
    "crop": ("tokens_to_remove",),
    "batch_repeat_interleave": ("repeats",),
    "batch_select_indices": ("indices",),
}
# Earlier releases called some of them otherwise, took a length for what is to be cropped, or had
# methods of which nothing is left.
_FORMER = {"get_max_cache_shape", "get_max_length"}
_FORMER_ARGUMENTS = {"crop": ("max_length",)}
_KEPT = ("keys", "values", "is_initialized", "dtype", "device")


def new_cache(model: Any) -> Any:
    """The empty cache that the host would make for a forward of its own."""
    return DynamicCache(config=model.config)


def is_cache(given: Any) -> bool:
    """Whether something is a KV cache, with a length."""
    return hasattr(given, _LENGTH)


def length_of(cache: Any, index: int | None = None) -> int:
    """Columns that a cache, or one layer of it, has seen; 0 without one."""
    if cache is None:
        return 0
    return int(cache.get_seq_length() if index is None else cache.get_seq_length(index))


def compileable(cache: Any) -> bool:
    """Whether `generate` compiles steps over a cache, as over a static one."""
    return bool(layers_of(cache)) and bool(getattr(cache, _COMPILEABLE, False))


def counts_on_device(cache: Any) -> bool:
    """Whether a cache's length is a tensor, so that reading it waits for a device."""
    return cache is not None and isinstance(cache.get_seq_length(), Tensor)


def layers_of(cache: Any) -> Sequence[Any]:
    """The layers of a cache; none of what has none."""
    return getattr(cache, _LAYERS, None) or ()


def has_layers(cache: Any) -> bool:
    """Whether a cache is made of layers at all."""
    return getattr(cache, _LAYERS, None) is not None


def replace_layer(cache: Any, index: int, layer: Any) -> None:
    """Put a layer in the place of another."""
    cache.layers[index] = layer


def fill(cache: Any, count: int) -> None:
    """Make the layers that a cache would make as they are needed, up to `count`."""
    kind = getattr(cache, _REPLICATED, None)
    if kind is not None:
        while len(cache.layers) < count:
            cache.layers.append(kind())


def kinds(cache: Any, indices: Sequence[int]) -> list[type]:
    """Classes of the layers at some places, those that are not there yet left out."""
    held = layers_of(cache)
    return [type(held[i]) for i in indices if i < len(held)]


def refusal(cache: Any, indices: Sequence[int], known: Collection[type], does: str) -> str | None:
    """Why a cache does not serve at some layers; None if it does.

    Args:
        cache: what was given.
        indices: of the layers.
        known: the classes that serve.
        does: what cannot be done, as "cut".
    """
    found = kinds(cache, indices)
    odd = next((kind.__name__ for kind in found if kind not in known), None)
    if has_layers(cache) and odd is None:
        return None
    name = type(cache).__name__ + (f" of {odd}s" if odd else "")
    return f"cannot {does} a {name}; leave the cache out, or pass a {DynamicCache.__name__}."


def alike(cache: Any, other: Any) -> bool:
    """Whether two caches are made of the same kinds of layers."""
    ours, theirs = ([type(layer) for layer in layers_of(one)] for one in (cache, other))
    return ours == theirs


def held_of(layer: Any) -> dict[str, Any]:
    """What a dynamic layer holds, for a layer of ours that takes its place."""
    return {name: value for name, value in vars(layer).items() if name in _KEPT}


def window_of(layer: Any) -> int | None:
    """How many columns a layer with a sliding window looks back; None without one."""
    return layer.sliding_window if isinstance(layer, WindowLayer) else None


def stored_keys(cache: Any, index: int) -> Any:
    """Keys [B, H, T, D] that a layer holds; None where it holds none."""
    held = layers_of(cache)
    if index >= len(held) or not held[index].get_seq_length():
        return None
    return held[index].keys


def growing(cls: type) -> list[str]:
    """Names of the methods by which layers add to a cache of a class: keys, or other states."""
    named = [name for name in dir(cls) if name.startswith(_UPDATE) or name in _IN_PLACE]
    return [name for name in named if callable(getattr(cls, name))]


def check_layers(replaced: type, ours: type) -> None:
    """Refuse a release whose cache layers do other things than ours take the place of.

    Args:
        replaced: the class of Transformers.
        ours: the class that takes its place.

    Raises:
        VlmpruneError: one sentence says what is there, or is not.
    """
    fact = _difference(replaced, ours)
    if fact is not None:
        raise VlmpruneError(
            f"{replaced.__name__} of transformers {release.version()} {fact}, which "
            f"{ours.__name__} of vlmprune does not know; install transformers{release.TESTED}."
        )


def check_made(model: Any) -> None:
    """Refuse a release whose dynamic cache is not made of dynamic layers.

    Raises:
        VlmpruneError: one sentence says what it is made of.
    """
    # The model's config is left out, by which layers with a window would make tensors.
    kind = getattr(DynamicCache(), _REPLICATED, None)
    if kind is not DynamicLayer:
        made = kind.__name__ if isinstance(kind, type) else kind
        raise VlmpruneError(
            f"the KV cache of {type(model).__name__} in transformers {release.version()} is made "
            f"of {made}, not of DynamicLayer, and cannot be cut; prune before the language model."
        )


@once
def _difference(replaced: type, ours: type) -> str | None:
    if not issubclass(ours, replaced):
        return "is another class than it was"
    there = {
        name: one
        for name, one in inspect.getmembers(replaced, callable)
        if not name.startswith("_") and not isinstance(one, type)
    }
    missing = sorted(_METHODS.keys() - there.keys() - _FORMER)
    if missing:
        return f"has no {missing[0]}"
    new = sorted(there.keys() - _METHODS.keys() - _FORMER)
    if new:
        return f"has a method {new[0]}"
    for name, wanted in _METHODS.items():
        if name not in there:
            continue
        takes = _arguments(there[name])
        if takes not in (wanted, _FORMER_ARGUMENTS.get(name, wanted)):
            return f"takes {', '.join(takes) or 'nothing'} in {name}"
    layer: Any = replaced()
    gone = [name for name in ("keys", "values", "is_initialized") if name not in vars(layer)]
    return f"has no {gone[0]}" if gone else None


def _arguments(method: Callable[..., Any]) -> tuple[str, ...]:
    """Names that must be given, without the layer itself."""
    takes = list(inspect.signature(method).parameters.values())[1:]
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return tuple(one.name for one in takes if one.kind not in kinds)
