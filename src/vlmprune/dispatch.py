"""A scoped override of the attention functions that Transformers has registered.

While somebody needs it, and only then, the function registered for a model's attention
implementation is replaced by a dispatcher. It lets watchers of a module see the call, and hands
calls whose keys bring a guest of their own (a cache that knows how to attend to itself) to that
guest. All other calls, of other models and threads too, go to the plain function.
"""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from torch import Tensor, nn

# The attribute under which keys carry their guest.
GUEST = "vlmprune_guest"


class Watcher(Protocol):
    """Sees the attention calls of a module."""

    def see(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        attention_mask: Any,
        kwargs: dict[str, Any],
    ) -> None:
        """Take note of one call."""


class Guest(Protocol):
    """Computes the attention calls whose keys carry it."""

    def attend(
        self,
        function: Callable[..., Any],
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """The call's result, by the plain `function` or otherwise."""


# A call's queries and mask → the mask that it gets instead.
Masks = Callable[[Tensor, Any], Any]


class _Dispatcher:
    """Stands in for one registered attention function while at least one user needs it."""

    def __init__(self, interface: Any, name: str) -> None:
        self.interface, self.name = interface, name
        self.users = 0
        self.watchers: dict[nn.Module, list[Watcher]] = {}
        self.masks: dict[nn.Module, list[Masks]] = {}
        self.local = name in interface._local_mapping
        self.original = interface.get(name)

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any = None,
        **kwargs: Any,
    ) -> Any:
        # A copy, as other threads may add or remove theirs meanwhile.
        for masked in tuple(self.masks.get(module, ())):
            attention_mask = masked(query, attention_mask)
        for watcher in tuple(self.watchers.get(module, ())):
            watcher.see(module, query, key, attention_mask, kwargs)
        function = self.original or _eager(module)
        guest: Guest | None = getattr(key, GUEST, None)
        if guest is not None:
            return guest.attend(function, module, query, key, value, attention_mask, **kwargs)
        return function(module, query, key, value, attention_mask, **kwargs)

    def install(self) -> None:
        self.interface[self.name] = self

    def remove(self) -> None:
        if self.local:
            self.interface[self.name] = self.original
        else:
            del self.interface[self.name]


_lock = threading.RLock()
_dispatchers: dict[tuple[int, str], _Dispatcher] = {}


@contextmanager
def dispatching(module: Any) -> Iterator[None]:
    """Dispatch the attention calls that `module`'s implementation makes, inside the block."""
    dispatcher = _acquire(module)
    try:
        yield
    finally:
        _release(dispatcher)


@contextmanager
def watching(module: Any, watcher: Watcher) -> Iterator[None]:
    """Let `watcher` see the attention calls of `module` inside the block."""
    dispatcher = _acquire(module)
    try:
        with _among(dispatcher.watchers, module, watcher):
            yield
    finally:
        _release(dispatcher)


@contextmanager
def masking(module: Any, masked: Masks) -> Iterator[None]:
    """Let `masked` give the attention calls of `module` their mask inside the block."""
    dispatcher = _acquire(module)
    try:
        with _among(dispatcher.masks, module, masked):
            yield
    finally:
        _release(dispatcher)


@contextmanager
def _among(users: dict[nn.Module, list[Any]], module: nn.Module, user: Any) -> Iterator[None]:
    with _lock:
        users.setdefault(module, []).append(user)
    try:
        yield
    finally:
        with _lock:
            users[module].remove(user)
            if not users[module]:
                del users[module]


def attention_of(layer: nn.Module) -> Any:
    """The one module of a layer whose code calls Transformers' attention registry.

    Raises:
        LookupError: there is none.
    """
    for module in layer.modules():
        source = sys.modules.get(type(module).__module__)
        has_registry = hasattr(source, "ALL_ATTENTION_FUNCTIONS")
        if has_registry and hasattr(module, "config"):
            if hasattr(module, "is_causal"):
                return module
            # Llama 4's vision attention has no such attribute, but its code names the registry.
            if "ALL_ATTENTION_FUNCTIONS" in _names(type(module)):
                return module
    raise LookupError(f"{type(layer).__name__} has no attention that can be tapped")


def _acquire(module: Any) -> _Dispatcher:
    interface = sys.modules[type(module).__module__].ALL_ATTENTION_FUNCTIONS
    name = module.config._attn_implementation
    with _lock:
        dispatcher = _dispatchers.get((id(interface), name))
        if dispatcher is None:
            dispatcher = _dispatchers[id(interface), name] = _Dispatcher(interface, name)
            dispatcher.install()
        dispatcher.users += 1
        return dispatcher


def _release(dispatcher: _Dispatcher) -> None:
    with _lock:
        dispatcher.users -= 1
        if not dispatcher.users:
            dispatcher.remove()
            del _dispatchers[id(dispatcher.interface), dispatcher.name]


def _eager(module: nn.Module) -> Callable[..., Any]:
    """Eager attention is not registered: each modeling file has its own function, or several."""
    for cls in type(module).__mro__:
        own = [name for name in _names(cls) if name.endswith("eager_attention_forward")]
        for name in (*own, "eager_attention_forward"):
            function = getattr(sys.modules[cls.__module__], name, None)
            if function is not None:
                return function
    raise LookupError(f"{type(module).__name__} has no eager attention function")


def _names(cls: type) -> tuple[str, ...]:
    """Names that the code of a class's own forward uses."""
    forward = vars(cls).get("forward")
    code = getattr(inspect.unwrap(forward), "__code__", None) if callable(forward) else None
    return getattr(code, "co_names", ())
