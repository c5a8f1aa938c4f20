"""A model that pruners are attached to: its methods shadowed on the instance, and given back.

One set of shadows serves any number of attachments to the same model. Among them the last
attached one acts; detaching in any order is right, and the last to go takes the shadows along.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from vlmprune.hosts.requests import FORWARD, GENERATE, base_of
from vlmprune.runtime.attachment import Attachment

_hosts: WeakKeyDictionary[nn.Module, Shadows] = WeakKeyDictionary()
_lock = threading.RLock()
_ABSENT = object()


@dataclass(frozen=True)
class Functions:
    """What stands in for a host's methods; each is given the acting attachment and the original.

    Attributes:
        generate: for `generate`: (attachment, original, *args, **kwargs).
        forward: for `forward`, likewise.
        features: for those that encode: (attachment, name, original, *args, **kwargs).
    """

    generate: Callable[..., Any]
    forward: Callable[..., Any]
    features: Callable[..., Any]


class Shadows:
    """Those on one model, and the attachments that they serve."""

    def __init__(self, attachment: Attachment, functions: Functions) -> None:
        model, self.functions = attachment.model, functions
        self.attachments: list[Attachment] = []
        self._places: dict[str, nn.Module] = {
            GENERATE: model,
            FORWARD: model,
        }
        for medium in attachment.family.media:
            self._places[medium.method] = base_of(model)
        self._originals: dict[str, Callable[..., Any]] = {}
        self._before: dict[str, Any] = {}

    def add(self, attachment: Attachment) -> None:
        """Make an attachment the acting one."""
        if not self.attachments:
            self._shadow()
        attachment.originals = self._originals
        self.attachments.append(attachment)

    def remove(self, attachment: Attachment) -> bool:
        """Take an attachment away; True if it was the last."""
        self.attachments.remove(attachment)
        if self.attachments:
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
            return self.functions.generate(
                self.attachments[-1], originals[GENERATE], *args, **kwargs
            )

        @functools.wraps(originals[FORWARD])
        def forward(*args: Any, **kwargs: Any) -> Any:
            return self.functions.forward(self.attachments[-1], originals[FORWARD], *args, **kwargs)

        for name, function in ((GENERATE, generate), (FORWARD, forward)):
            vars(self._places[name])[name] = function
        for name in self._places.keys() - {GENERATE, FORWARD}:
            vars(self._places[name])[name] = self._features(name)

    def _features(self, name: str) -> Callable[..., Any]:
        original = self._originals[name]

        @functools.wraps(original)
        def features(*args: Any, **kwargs: Any) -> Any:
            return self.functions.features(self.attachments[-1], name, original, *args, **kwargs)

        return features


def join(attachment: Attachment, functions: Functions) -> None:
    """Let an attachment act in its model's calls."""
    with _lock:
        host = _hosts.get(attachment.model)
        if host is None:
            host = _hosts[attachment.model] = Shadows(attachment, functions)
        host.add(attachment)


def leave(attachment: Attachment) -> None:
    """Take an attachment off its model."""
    with _lock:
        host = _hosts.get(attachment.model)
        if host is not None and attachment in host.attachments and host.remove(attachment):
            del _hosts[attachment.model]
