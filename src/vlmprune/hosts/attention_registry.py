"""The registry of attention functions: the entry that a module calls, and what replaces it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import nn

from vlmprune.errors import VlmpruneError
from vlmprune.hosts import parallel
from vlmprune.hosts.attention import REGISTRY, attention_of, implementation, names_in
from vlmprune.hosts.release import version

# A modeling file's own function, which is not registered.
_EAGER = "eager_attention_forward"


def check_tappable(layer: nn.Module, instead: str) -> None:
    """Refuse a layer whose attention calls cannot be followed, without any tensor work.

    Args:
        layer: an encoder or decoder layer.
        instead: what to do where they cannot.

    Raises:
        VlmpruneError: it has no attention module, or the registry is not what it was.
    """
    try:
        module = attention_of(layer)
    except LookupError as error:
        raise VlmpruneError(f"{error} in transformers {version()}; {instead}.") from error
    Registered(module)


class Registered:
    """The attention function that a module calls, and what is put in its place for a while.

    Raises:
        VlmpruneError: the registry or the function is not found.
    """

    def __init__(self, module: Any) -> None:
        self.interface: Any = getattr(sys.modules[parallel.class_of(module).__module__], REGISTRY)
        self.name = implementation(module)
        own = getattr(self.interface, "_local_mapping", None)
        if own is None:
            raise VlmpruneError(
                f"the attention registry of {type(module).__name__} in transformers {version()} "
                "has no entries of its own, so attention cannot be seen; install a tested release."
            )
        # What a modeling file registers for itself goes before what is registered for all.
        self.local = self.name in own
        self.original = self.interface.get(self.name)
        if self.original is None:
            _eager(module)

    @property
    def key(self) -> tuple[int, str]:
        """The same for all modules that share the entry."""
        return id(self.interface), self.name

    def function(self, module: nn.Module) -> Callable[..., Any]:
        """The plain function."""
        return self.original or _eager(module)

    def install(self, other: Callable[..., Any]) -> None:
        """Put another function in its place."""
        self.interface[self.name] = other

    def remove(self) -> None:
        """Give the entry back as it was."""
        if self.local:
            self.interface[self.name] = self.original
        else:
            del self.interface[self.name]


def _eager(module: nn.Module) -> Callable[..., Any]:
    """Eager attention is not registered: each modeling file has its own function, or several."""
    for cls in type(module).__mro__:
        own = [name for name in names_in(cls) if name.endswith(_EAGER)]
        for name in (*own, _EAGER):
            function = getattr(sys.modules[cls.__module__], name, None)
            if function is not None:
                return function
    raise VlmpruneError(
        f"the attention function of {type(module).__name__} in transformers {version()} is not "
        "registered and not found, so its attention cannot be seen; load the model with "
        "attn_implementation='sdpa'."
    )
