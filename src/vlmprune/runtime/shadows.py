"""A model that pruners are attached to: its methods shadowed on the instance, and given back.

One set of shadows serves any number of attachments to the same model. Among them the last
attached one acts; detaching in any order is right, and the last to go takes the shadows along.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from torch import nn

from vlmprune.hosts import families
from vlmprune.hosts.requests import FORWARD, GENERATE, base_of
from vlmprune.runtime.call import run as calls

if TYPE_CHECKING:
    from vlmprune.pruner.handle import Handle

_hosts: WeakKeyDictionary[nn.Module, Host] = WeakKeyDictionary()
_lock = threading.RLock()
_ABSENT = object()


class Host:
    """The shadows on one model, and the attachments that they serve."""

    def __init__(self, model: nn.Module) -> None:
        self.handles: list[Handle] = []
        self._places: dict[str, nn.Module] = {
            GENERATE: model,
            FORWARD: model,
        }
        for medium in families.family_of(model).media:
            self._places[medium.method] = base_of(model)
        self._originals: dict[str, Callable[..., Any]] = {}
        self._before: dict[str, Any] = {}

    def original(self, name: str) -> Callable[..., Any]:
        """The model's own method, as it was before the first attachment."""
        return self._originals[name]

    def add(self, handle: Handle) -> None:
        """Make an attachment the acting one."""
        if not self.handles:
            self._shadow()
        self.handles.append(handle)

    def remove(self, handle: Handle) -> bool:
        """Take an attachment away; True if it was the last."""
        self.handles.remove(handle)
        if self.handles:
            return False
        for name, place in self._places.items():
            if self._before[name] is _ABSENT:
                vars(place).pop(name, None)
            else:
                vars(place)[name] = self._before[name]
        return True

    def _shadow(self) -> None:
        for name, place in self._places.items():
            self._before[name] = vars(place).get(name, _ABSENT)
            self._originals[name] = getattr(place, name)

        originals = self._originals

        # `wraps` keeps the signatures, which Transformers inspects.
        @functools.wraps(originals[GENERATE])
        def generate(*args: Any, **kwargs: Any) -> Any:
            return calls.generate(self.handles[-1], originals[GENERATE], *args, **kwargs)

        @functools.wraps(originals[FORWARD])
        def forward(*args: Any, **kwargs: Any) -> Any:
            return calls.forward(self.handles[-1], originals[FORWARD], *args, **kwargs)

        for name, function in ((GENERATE, generate), (FORWARD, forward)):
            vars(self._places[name])[name] = function
        for name in self._places.keys() - {GENERATE, FORWARD}:
            vars(self._places[name])[name] = self._features(name)

    def _features(self, name: str) -> Callable[..., Any]:
        original = self._originals[name]

        @functools.wraps(original)
        def features(*args: Any, **kwargs: Any) -> Any:
            return calls.features(self.handles[-1], name, original, *args, **kwargs)

        return features


def join(model: nn.Module, handle: Handle) -> Host:
    """Attach a handle to a model."""
    with _lock:
        host = _hosts.get(model)
        if host is None:
            host = _hosts[model] = Host(model)
        host.add(handle)
        return host


def leave(model: nn.Module, handle: Handle) -> None:
    """Detach a handle from its model."""
    with _lock:
        host = _hosts.get(model)
        if host is not None and handle in host.handles and host.remove(handle):
            del _hosts[model]
