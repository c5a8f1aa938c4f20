"""Libraries that only some commands need."""

from __future__ import annotations

from importlib.util import find_spec

from vlmprune.errors import VlmpruneError


def module(name: str, extra: str) -> None:
    """Refuse to go on without a library.

    Args:
        name: of the module.
        extra: of this package, that brings it.

    Raises:
        VlmpruneError: it is not installed.
    """
    if find_spec(name) is None:
        raise VlmpruneError(
            f'this needs {name}, which is not installed; run `pip install "vlmprune[{extra}]"`.'
        )
