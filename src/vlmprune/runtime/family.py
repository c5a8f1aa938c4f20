"""The record of a model: its family's own, else one that a trial of the model makes."""

from __future__ import annotations

from typing import Any

from vlmprune.hosts import families
from vlmprune.hosts.families import Family
from vlmprune.runtime.encoder.trial import tried


def family_of(model: Any) -> Family:
    """The record of a model: its family's, else one that a self-check of the model makes.

    Raises:
        VlmpruneError: the model cannot be followed; one sentence says why.
    """
    return families.record_of(model) or tried(model)
