"""The rotary angles of one forward, to be made again for other positions; and keys by identity."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vlmprune.errors import VlmpruneError


class Angles:
    """The calls of a decoder's rotary modules in one forward, so that they can be made again."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, nn.Module, tuple[Any, ...], dict[str, Any]]] = []

    def note(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Remember a call."""
        self.calls.append((output, module, args, kwargs))

    def _call(self, angles: Any) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
        for output, module, args, kwargs in self.calls:
            if output is angles:
                return module, args, kwargs
        raise VlmpruneError(
            "the model does not make its rotary angles by a module of its decoder, so tokens "
            "cannot be renumbered inside it; use positions='original'."
        )

    def positions(self, angles: Any) -> Tensor:
        """The [B or 1, L] positions that angles were made for."""
        _, args, kwargs = self._call(angles)
        return kwargs["position_ids"] if "position_ids" in kwargs else args[1]

    def made(self, angles: Any, positions: Tensor) -> Any:
        """Angles of the same kind for other positions [B, R]."""
        module, args, kwargs = self._call(angles)
        if "position_ids" in kwargs:
            kwargs = kwargs | {"position_ids": positions}
        else:
            args = (args[0], positions, *args[2:])
        return module.forward(*args, **kwargs)


class Same:
    """A key that is the very object, which it keeps alive."""

    def __init__(self, one: Any) -> None:
        self.one = one

    def __hash__(self) -> int:
        return id(self.one)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and other.one is self.one
