"""What measurements look at in a host: the module that a prefill runs, and what a cache holds."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vlmprune.hosts import caches

_KEPT = ("keys", "values")


def prefill_module(model: Any) -> nn.Module | None:
    """The language model below its head, whose call is the prefill; None where there is none."""
    get = getattr(model, "get_decoder", None)
    decoder = None if get is None else get()
    return decoder if isinstance(decoder, nn.Module) else None


def stored_bytes(cache: Any) -> int:
    """Bytes of all keys and values that a cache holds, of visual tokens and of all others.

    A layer that has a method `nbytes`, as ours do, is asked; of any other the tensors are added up.
    """
    return sum(_layer_bytes(layer) for layer in caches.layers_of(cache))


def _layer_bytes(layer: Any) -> int:
    own = getattr(layer, "nbytes", None)
    if callable(own):
        return int(own())
    held = (getattr(layer, name, None) for name in _KEPT)
    return sum(tensor.nbytes for tensor in held if isinstance(tensor, Tensor))
