"""The one interception of attention calls: `around(call, proceed)`, for a module and a while.

While an interceptor is registered for a module, and only then, the function that Transformers has
registered for the module's attention implementation is replaced by a dispatcher. It takes each call
of the module apart and hands it to the interceptors, one inside the other: **the first registered
is the outermost**, and inside the last the host's plain function computes the call. So whoever
changes a call registers before those that are to see it changed, and whoever attends by itself
after those that watch. An interceptor acts in the thread that registered it; calls of other
modules, models and threads go to the plain function as they come.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol, runtime_checkable

from torch import nn

from vlmprune.hosts import contract
from vlmprune.hosts.attention import AttentionCall, called
from vlmprune.hosts.attention_registry import Registered
from vlmprune.runtime.scope import OwnCall

# Makes a call, by the interceptors inside and the host's function.
Proceed = Callable[[AttentionCall], Any]


class Interceptor(Protocol):
    """Stands around the attention calls of a module."""

    def around(self, call: AttentionCall, proceed: Proceed) -> Any:
        """The result of one call, ([B, Q, H, Dv], weights or None).

        It may look at the call, proceed with another (a copy with other queries, keys, values or
        mask), or not proceed at all and attend to whatever it holds itself: what it was made with,
        such as the number of a decoder layer and the layer of a cache, is its own affair. What it
        reads of the call is proved where it proceeds by `contract.run`.
        """


@runtime_checkable
class Quick(Protocol):
    """An interceptor that knows what to do with some calls before they are taken apart.

    At each layer of each step to take them apart costs more than what it does there. Only one that
    stands alone around a module is asked.
    """

    def at_once(self, args: tuple[Any, ...], proceed: Callable[[], Any]) -> Any | None:
        """The result of a call; None where it is to be taken apart.

        Args:
            args: what comes by place behind the module.
            proceed: the host's function on the call as it comes.
        """


class Changing:
    """Proceeds with other calls.

    Args:
        change: from a call to what is made of it before those inside see it.
    """

    def __init__(self, change: Callable[[AttentionCall], AttentionCall]) -> None:
        self.change = change

    def around(self, call: AttentionCall, proceed: Proceed) -> Any:
        """The result of the other call."""
        return proceed(self.change(call))


# Whose call it is around, and what stands around it, with its `at_once` where it has one.
_Entry = tuple[OwnCall, Interceptor, Callable[..., Any] | None]


class _Dispatcher:
    """Stands in for one registered attention function while at least one module needs it."""

    def __init__(self, registered: Registered) -> None:
        self.registered = registered
        # Never changed in place, as other threads may read them meanwhile.
        self.around: dict[nn.Module, tuple[_Entry, ...]] = {}

    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        function = self.registered.function(module)
        entries = [entry for entry in self.around.get(module, ()) if entry[0].runs]
        if not entries:
            return function(module, *args, **kwargs)
        quick = entries[0][2] if len(entries) == 1 else None
        if quick is not None:
            found = quick(args, partial(function, module, *args, **kwargs))
            if found is not None:
                return found
        own = [one for _, one, _ in entries]
        try:
            call = called(function, module, *args, **kwargs)
        except TypeError as error:
            raise contract.broken(
                module, f"it calls its attention function otherwise ({error})"
            ) from error
        proceed: Proceed = AttentionCall.run
        for one in reversed(own[1:]):
            proceed = partial(one.around, proceed=proceed)
        return own[0].around(call, proceed)


_lock = threading.RLock()
_dispatchers: dict[tuple[int, str], _Dispatcher] = {}


@contextmanager
def intercepting(interceptor: Interceptor, *modules: Any) -> Iterator[None]:
    """Put an interceptor around the attention calls that modules make in this thread in the block.

    Inside those that were registered before, see above.

    Raises:
        VlmpruneError: a module's attention function is not found.
    """
    entry = OwnCall(), interceptor, interceptor.at_once if isinstance(interceptor, Quick) else None
    taken = list[tuple[_Dispatcher, Any]]()
    try:
        with _lock:
            # At each step for each layer, and layers mostly share an entry of the registry.
            found: dict[Any, _Dispatcher] = {}
            for module in modules:
                kind = type(module), id(module.config)
                dispatcher = found.get(kind)
                if dispatcher is None:
                    dispatcher = found[kind] = _dispatcher(module)
                dispatcher.around[module] = (*dispatcher.around.get(module, ()), entry)
                taken.append((dispatcher, module))
        yield
    finally:
        with _lock:
            for dispatcher, module in taken:
                _remove(dispatcher, module, entry)


def _dispatcher(module: Any) -> _Dispatcher:
    """What stands in for a module's attention function, put there if it does not yet."""
    registered = Registered(module)
    found = _dispatchers.get(registered.key)
    if found is None:
        found = _dispatchers[registered.key] = _Dispatcher(registered)
        registered.install(found)
    return found


def _remove(dispatcher: _Dispatcher, module: Any, entry: _Entry) -> None:
    left = tuple(one for one in dispatcher.around[module] if one is not entry)
    if left:
        dispatcher.around[module] = left
        return
    del dispatcher.around[module]
    if not dispatcher.around:
        dispatcher.registered.remove()
        del _dispatchers[dispatcher.registered.key]
