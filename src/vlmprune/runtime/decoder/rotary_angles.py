"""The rotary angles of one forward, to be made again for other positions; and keys by identity."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vlmprune.errors import VlmpruneError
from vlmprune.hosts.decoder import RotaryCall


class Angles:
    """The calls of a decoder's rotary modules in one forward, so that they can be made again."""

    def __init__(self) -> None:
        self.calls: list[RotaryCall] = []

    def note(self, call: RotaryCall) -> None:
        """Remember a call."""
        self.calls.append(call)

    def _call(self, angles: Any) -> RotaryCall:
        for call in self.calls:
            if call.output is angles:
                return call
        raise VlmpruneError(
            "the model does not make its rotary angles by a module of its decoder, so tokens "
            "cannot be renumbered inside it; use positions='original'."
        )

    def positions(self, angles: Any) -> Tensor:
        """The [B or 1, L] positions that angles were made for."""
        return self._call(angles).positions

    def made(self, angles: Any, positions: Tensor) -> Any:
        """Angles of the same kind for other positions [B, R]."""
        return self._call(angles).again(positions)


class Same:
    """A key that is the very object, which it keeps alive."""

    def __init__(self, one: Any) -> None:
        self.one = one

    def __hash__(self) -> int:
        return id(self.one)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and other.one is self.one
