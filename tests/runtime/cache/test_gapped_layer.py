"""Layers that lack columns: what a forward said of the columns that it brings."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from stock import CACHE, cache_of
from tiny import model, request
from vlmprune import FastV, VlmpruneError


def test_a_forward_that_fails_leaves_no_word_with_a_layer() -> None:
    """What a step said of its columns does not serve whoever comes next."""
    built = model()
    inputs = request(built, [1]).inputs

    def fail(*_: Any) -> None:
        raise RuntimeError("here")

    with FastV(keep=4, layer=2)(built), torch.no_grad():
        cache = cache_of(built(**inputs, use_cache=True))
        attention = built.model.language_model.layers[2].self_attn
        hook = attention.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="here"):
            built(torch.tensor([[9]]), **{CACHE: cache})
        hook.remove()
    with pytest.raises(VlmpruneError, match="lacks columns"):
        cache.layers[2].check_alone()
