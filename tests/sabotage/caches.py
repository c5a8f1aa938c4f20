"""Rows about KV caches: their classes, where layers stand, and which cache goes on."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import wraps
from typing import Any

from pytest import MonkeyPatch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer

from sabotage.hosts import Row
from sabotage.tools import recast
from stock import CACHE

Change = Callable[[Any, MonkeyPatch], None]


class SubLayer(DynamicLayer):
    """A subclass that adds nothing."""


class Backwards(DynamicLayer):
    """A subclass that stores heads in another order than it returns them."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add columns."""
        keys, values = super().update(key_states.flip(1), value_states.flip(1), *args, **kwargs)
        return keys.flip(1), values.flip(1)


class ByHalves(DynamicLayer):
    """A subclass that stores values times two."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add columns."""
        keys, values = super().update(key_states, value_states * 2, *args, **kwargs)
        return keys, values / 2


class Another(CacheLayerMixin):
    """A layer of another class, which behaves like the usual one."""

    is_sliding = False

    def __init__(self, *args: Any) -> None:
        super().__init__()
        self.inner = DynamicLayer()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing of its own."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add columns."""
        self.is_initialized = True
        return self.inner.update(key_states, value_states)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns of the mask, and the first."""
        return self.inner.get_mask_sizes(query_length)

    def get_seq_length(self) -> int:
        """Columns seen."""
        return self.inner.get_seq_length()

    def get_max_length(self) -> int:
        """Without end."""
        return -1

    get_max_cache_shape = get_max_length


class Hidden(Cache):
    """A cache whose layers stand under another attribute."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        if name in ("inner", "layers", "layer_class_to_replicate"):
            raise AttributeError(name)
        return getattr(self.inner, name)

    def update(self, *args: Any, **kwargs: Any) -> Any:
        """Add columns."""
        return self.inner.update(*args, **kwargs)

    def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
        """Columns seen."""
        return int(self.inner.get_seq_length(*args, **kwargs))

    def get_mask_sizes(self, *args: Any, **kwargs: Any) -> Any:
        """Columns of the mask, and the first."""
        return self.inner.get_mask_sizes(*args, **kwargs)

    @property
    def is_compileable(self) -> bool:
        """Not."""
        return False

    @property
    def is_sliding(self) -> list[bool]:
        """By layer."""
        return list(self.inner.is_sliding)


class SubCache(DynamicCache):
    """A subclass of the usual cache."""


def _made(change: Callable[[Any], Any]) -> Change:
    """Another cache is what `generate` begins with."""

    def change_model(model: Any, patch: MonkeyPatch) -> None:
        plain = type(model)._prepare_cache_for_generation

        @wraps(plain)
        def prepare(self: Any, generation_config: Any, kwargs: dict[str, Any], *rest: Any) -> Any:
            out = plain(self, generation_config, kwargs, *rest)
            kwargs[CACHE] = change(kwargs[CACHE])
            return out

        recast(model, _prepare_cache_for_generation=prepare)

    return change_model


def _of(layer: type) -> Callable[[Any], Any]:
    def change(cache: Any) -> Any:
        if cache.layers:
            cache.layers = [layer() for _ in cache.layers]
        else:
            cache.layer_class_to_replicate = layer
        return cache

    return change


def _next(change: Callable[[Any], Any]) -> Change:
    """`generate` goes on with another cache after each forward."""

    def change_model(model: Any, patch: MonkeyPatch) -> None:
        plain = type(model)._update_model_kwargs_for_generation

        @wraps(plain)
        def update(self: Any, *args: Any, **kwargs: Any) -> Any:
            found = plain(self, *args, **kwargs)
            found[CACHE] = change(found[CACHE])
            return found

        recast(model, _update_model_kwargs_for_generation=update)

    return change_model


def _rebuilt(cache: Any) -> Any:
    new = DynamicCache()
    for number, layer in enumerate(cache.layers):
        new.update(layer.keys, layer.values, number)
    return new


def _held(cache: Any) -> Any:
    """Keys and values as plain tensors in layers of the usual class."""
    new = DynamicCache()
    for layer in cache.layers:
        fresh = DynamicLayer()
        fresh.lazy_initialization(layer.keys, layer.values)
        fresh.keys, fresh.values = layer.keys, layer.values
        new.layers.append(fresh)
    return new


def _ahead(model: Any, patch: MonkeyPatch) -> None:
    """A decoder that hands its layers a cache of its own, and the caller's only what it holds."""
    decoder = model.get_decoder()
    cls = type(decoder)

    @wraps(cls.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = kwargs.get(CACHE)
        if given is None:
            return cls.forward(self, *args, **kwargs)
        mine = vars(self).get("_mine")
        if given.get_seq_length() == 0 or mine is None:
            mine = vars(self)["_mine"] = DynamicCache()
        out = cls.forward(self, *args, **kwargs | {CACHE: mine})
        for number, layer in enumerate(mine.layers):
            new = layer.keys.shape[2] - given.get_seq_length(number)
            if new > 0:
                given.update(layer.keys[:, :, -new:], layer.values[:, :, -new:], number)
        out[CACHE] = given
        return out

    vars(decoder)["_mine"] = None
    recast(decoder, forward=forward)


ROWS: list[Row] = [
    Row("cache layers are of a subclass", _made(_of(SubLayer))),
    Row("cache layers are of a subclass, sliding windows", _made(_of(SubLayer)), host="gemma3"),
    Row("cache layers are of a subclass, positions in 3-D", _made(_of(SubLayer)), host="qwen3_vl"),
    Row("cache layers store heads backwards", _made(_of(Backwards))),
    Row("cache layers store values times two", _made(_of(ByHalves))),
    Row("cache layers are of another class", _made(_of(Another))),
    Row("the cache is of a subclass", _made(lambda cache: SubCache())),
    Row("the cache has its layers under another attribute", _made(Hidden)),
    Row("generate goes on with a copy of the cache", _next(copy.deepcopy)),
    Row("generate goes on with a cache made anew", _next(_rebuilt)),
    Row("generate goes on with a cache made anew, 3-D", _next(_rebuilt), host="qwen3_vl"),
    Row("generate goes on with other layers", _next(_held)),
    Row("the decoder has a cache of its own", _ahead),
]
