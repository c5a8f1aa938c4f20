"""How far positions are ahead of columns, as a model with three of them a column remembers it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from vlmprune.errors import VlmpruneError
from vlmprune.hosts import release

# Where it remembers that from one call to the next.
_DELTAS = "rope_deltas"


def deltas_of(model: Any) -> Tensor | None:
    """[B, 1] how far positions are ahead of columns, as the host remembers it of its last call.

    Raises:
        VlmpruneError: it remembers nothing of the kind.
    """
    if not remembers(model):
        raise VlmpruneError(
            f"{type(model.base_model).__name__} of transformers {release.version()} has no "
            f"{_DELTAS}, by which positions go on after a prompt; install "
            f"transformers{release.TESTED}."
        )
    return getattr(model.base_model, _DELTAS)


def remembers(model: Any) -> bool:
    """Whether the host is one that remembers it."""
    return hasattr(model.base_model, _DELTAS)


def set_deltas(model: Any, ahead: Tensor) -> None:
    """Let the host remember how far positions are ahead of columns."""
    setattr(model.base_model, _DELTAS, ahead)


@contextmanager
def deltas_kept(model: Any, counts: bool) -> Iterator[None]:
    """Let the host remember after the block what it did before of how far positions are ahead.

    Args:
        model: the host.
        counts: whether it is of those that have three positions a column, and remember it.
    """
    before = deltas_of(model) if counts else None
    try:
        yield
    finally:
        if counts:
            setattr(model.base_model, _DELTAS, before)
