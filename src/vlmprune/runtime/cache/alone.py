"""Whether a model without a pruner can go on with a cache."""

from __future__ import annotations

from typing import Any

from vlmprune.hosts import caches
from vlmprune.runtime.cache.gapped_layer import GappedLayer
from vlmprune.runtime.cache.tail_layer import TailLayer


def check_alone(cache: Any) -> None:
    """Refuse a cache of which a layer holds less than it has seen.

    Raises:
        VlmpruneError: one does, and no call of ours is under way that knows what is missing.
    """
    for layer in caches.layers_of(cache):
        if isinstance(layer, GappedLayer | TailLayer):
            layer.check_alone()
