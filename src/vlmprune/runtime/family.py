"""The record of a model: its family's own, one that a trial makes, or that of its placeholders."""

from __future__ import annotations

from typing import Any

from vlmprune.errors import VlmpruneError
from vlmprune.hosts import entrance, families
from vlmprune.hosts.families import Family
from vlmprune.method import Method
from vlmprune.runtime.encoder.trial import tried


def family_of(model: Any, method: Method | None = None) -> Family:
    """The record of a model: its family's, else one that a self-check of the model makes.

    Args:
        model: the host.
        method: what is to act on it. One that acts inside the language model alone, or looks at
            nothing, needs no more than the placeholders, where neither is to be had.

    Raises:
        VlmpruneError: the model cannot be followed; one sentence says why.
    """
    try:
        return families.record_of(model) or tried(model)
    except VlmpruneError as error:
        if method is None or method.acts or (method.shortens and not method.blind):
            raise
        found = families.counted(model)
        if isinstance(found, str):
            raise VlmpruneError(
                f"vlmprune cannot follow {type(model).__name__}, not even inside its language "
                f"model: {found}; `vlmprune models` lists those that it supports."
            ) from error
        if method.shortens:
            entrance.check(model, repr(method))
        return found
