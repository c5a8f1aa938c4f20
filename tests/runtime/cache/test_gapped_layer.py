"""Layers that lack columns: what a forward said of the columns that it brings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from stock import CACHE, cache_of
from tiny import model, request
from vlmprune import FastV, VlmpruneError
from vlmprune.runtime.cache.gapped_layer import GappedLayer


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


class Grown(DynamicLayer):
    """A layer of another class than the usual one."""


def of_another_class() -> DynamicCache:
    """A cache that makes layers of another class as they are needed."""
    cache = DynamicCache()
    cache.layer_class_to_replicate = Grown
    return cache


def of_a_shallower_model() -> DynamicCache:
    """A cache with two layers that makes no third one."""
    cache = DynamicCache()
    cache.layers = [DynamicLayer(), DynamicLayer()]
    cache.layer_class_to_replicate = None
    return cache


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (of_another_class, "it holds Growns, not DynamicLayers"),
        (of_a_shallower_model, "it has 2 layers where number 2 is due"),
    ],
)
def test_a_cache_whose_later_layers_turn_out_another_is_told(make: Any, said: str) -> None:
    built = model()
    inputs = request(built, [1]).inputs
    with FastV(keep=4, layer=2)(built), torch.no_grad():
        built(**inputs, **{CACHE: DynamicCache()})
        with pytest.raises(VlmpruneError, match=said):
            built(**inputs, **{CACHE: make()})


def test_a_layer_is_adopted_with_what_it_holds() -> None:
    old = DynamicLayer()
    states = torch.randn(2, 1, 3, 4)
    old.update(states, -states)
    layer = GappedLayer.adopt(old, 2, torch.device("cpu"))
    assert layer.columns(torch.device("cpu")).tolist() == [[0, 1, 2], [0, 1, 2]]
    assert torch.equal(layer.keys, states) and layer.start == 3 and layer.tail == 0
