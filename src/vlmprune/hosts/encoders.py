"""Calls of a host's methods that encode images or videos, and of the modules within them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

_AS_FIELDS = "return_dict"


@dataclass(frozen=True)
class EncoderCall:
    """One call of `get_image_features` or its like, which can be made again.

    Attributes:
        method: the host's own.
        pixels: its first argument.
        arguments: the others by name.
    """

    method: Callable[..., Any]
    pixels: Any
    arguments: Mapping[str, Any]

    def run(self) -> Any:
        """What the host makes of it, with fields by name."""
        return self.method(self.pixels, **self.arguments)

    def also(self, more: Mapping[str, Any]) -> EncoderCall:
        """The call with further arguments."""
        return EncoderCall(self.method, self.pixels, {**self.arguments, **more})


def encoder_call(
    method: Callable[..., Any],
    inputs: Mapping[str, Any],
    names: Sequence[str],
    host_only: Collection[str],
) -> EncoderCall:
    """The call by which a host's method encodes a request's images or videos.

    Args:
        method: the host's own.
        inputs: the request's inputs.
        names: of those that hold the images or videos, the pixels first, whose name differs
            between releases.
        host_only: those of them that the method does not take.
    """
    takes = inspect.signature(method).parameters
    pixels, *others = names
    # Some releases take the rest by keywords.
    rest = {name for name, one in takes.items() if one.kind is one.VAR_KEYWORD}
    known = {*takes, *others} - {*rest, pixels, next(iter(takes)), *host_only}
    arguments = {k: v for k, v in inputs.items() if k in known and v is not None}
    # What a release requires beside the pixels, its own forward fills in as None.
    for name, one in list(takes.items())[1:]:
        if one.default is one.empty and one.kind is one.POSITIONAL_OR_KEYWORD:
            arguments.setdefault(name, None)
    if rest or _AS_FIELDS in takes:
        arguments[_AS_FIELDS] = True
    return EncoderCall(method, inputs[pixels], arguments)


def first_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The first argument of a module's call, whatever it is called."""
    found: Tensor = args[0] if args else next(iter(kwargs.values()))
    return found
