"""A scoped override of the attention functions that Transformers has registered.

While somebody needs it, and only then, the function registered for a model's attention
implementation is replaced by a dispatcher. It lets watchers of a module see the call, and hands
calls whose keys bring a guest of their own (a cache that knows how to attend to itself) to that
guest. All other calls, of other models and threads too, go to the plain function.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from torch import Tensor, nn

from vlmprune.hosts import contract
from vlmprune.hosts.attention import AttentionCall, Registered, called

# The attribute under which keys carry their guest.
GUEST = "vlmprune_guest"


class Watcher(Protocol):
    """Sees the attention calls of a module.

    Attributes:
        causal: whether it reads a call as causal that brings no mask of four dimensions.
        whole: whether the call brings all keys that its mask is about.
    """

    causal: bool
    whole: bool

    def see(self, call: AttentionCall) -> None:
        """Take note of one call."""


class Guest(Protocol):
    """Computes the attention calls whose keys carry it."""

    def attend(self, function: Callable[..., Any], call: AttentionCall) -> Any:
        """The call's result, by the plain `function` or otherwise."""


# A call → what is made of it before anybody sees it.
Change = Callable[[AttentionCall], AttentionCall]


def guest_of(key: Tensor) -> Guest | None:
    """The guest that keys carry, if they do."""
    return vars(key).get(GUEST)


class _Dispatcher:
    """Stands in for one registered attention function while at least one user needs it."""

    def __init__(self, registered: Registered) -> None:
        self.registered = registered
        self.users = 0
        self.watchers: dict[nn.Module, list[Watcher]] = {}
        self.changes: dict[nn.Module, list[Change]] = {}

    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        function = self.registered.function(module)
        try:
            call = called(module, *args, **kwargs)
        except TypeError as error:
            if self._concerns(module, (*args, *kwargs.values())):
                raise contract.broken(
                    module, f"it calls its attention function otherwise ({error})"
                ) from error
            return function(module, *args, **kwargs)
        # Copies, as other threads may add or remove theirs meanwhile.
        for change in tuple(self.changes.get(module, ())):
            call = change(call)
        result, watchers = None, tuple(self.watchers.get(module, ()))
        if watchers:
            for causal in {one.causal for one in watchers if one.whole}:
                if contract.due(call, causal):
                    result = contract.run(function, call, causal)
            for watcher in watchers:
                watcher.see(call)
        guest = guest_of(call.key)
        if guest is not None:
            return guest.attend(function, call)
        return call.run(function) if result is None else result

    def _concerns(self, module: nn.Module, given: Iterable[Any]) -> bool:
        """Whether somebody is to see a module's call, or to compute it."""
        if module in self.watchers or module in self.changes:
            return True
        return any(isinstance(one, Tensor) and guest_of(one) is not None for one in given)


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
def changing(module: Any, change: Change) -> Iterator[None]:
    """Let `change` make other attention calls of those of `module` inside the block."""
    dispatcher = _acquire(module)
    try:
        with _among(dispatcher.changes, module, change):
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


def _acquire(module: Any) -> _Dispatcher:
    with _lock:
        registered = Registered(module)
        dispatcher = _dispatchers.get(registered.key)
        if dispatcher is None:
            dispatcher = _dispatchers[registered.key] = _Dispatcher(registered)
            registered.install(dispatcher)
        dispatcher.users += 1
        return dispatcher


def _release(dispatcher: _Dispatcher) -> None:
    with _lock:
        dispatcher.users -= 1
        if not dispatcher.users:
            dispatcher.registered.remove()
            del _dispatchers[dispatcher.registered.key]
