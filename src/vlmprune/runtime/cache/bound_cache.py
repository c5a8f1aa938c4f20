"""Whole caches in which some layers are, or may be, cut: made so, and attended to in a forward."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

from torch import nn

from vlmprune.hosts import caches
from vlmprune.hosts.caches import GrowingLayer
from vlmprune.method import Method
from vlmprune.runtime.attention.interception import intercepting
from vlmprune.runtime.cache.binding import Binding, Cutter
from vlmprune.runtime.cache.ragged_layer import RaggedLayer
from vlmprune.runtime.cache.recall_layer import RecallLayer
from vlmprune.runtime.cache.tail_layer import TailLayer


def kind_of(method: Method) -> type[TailLayer]:
    """The layers in which a method that acts on caches keeps a prompt."""
    return RecallLayer if method.recalls else RaggedLayer


def refusal(cache: Any, layers: Sequence[int], method: Method) -> str | None:
    """Why a method cannot act on a cache at those decoder layers; None if it can."""
    does = "read in part" if method.recalls else "cut"
    return caches.refusal(cache, layers, (GrowingLayer, kind_of(method)), does)


def adopt(cache: Any, layers: Sequence[int], count: int, kind: type[TailLayer]) -> None:
    """Make the given decoder layers of a cache ones of ours, which hold what they held.

    Args:
        cache: a dynamic cache.
        layers: the decoder layers whose cache may be cut.
        count: number of all decoder layers.
        kind: of layers.
    """
    caches.fill(cache, count)
    binding, held = binding_of(cache) or Binding(), caches.layers_of(cache)
    for index in layers:
        if index < len(held) and type(held[index]) is GrowingLayer:
            new = kind(binding, index)
            for name, one in caches.held_of(held[index]).items():
                setattr(new, name, one)
            caches.replace_layer(cache, index, new)


def binding_of(cache: Any) -> Binding | None:
    """The binding of a cache that has layers of ours with a tail; None for any other."""
    for layer in caches.layers_of(cache):
        if isinstance(layer, TailLayer):
            return layer.binding
    return None


@contextmanager
def attending(
    cache: Any,
    attentions: Mapping[int, nn.Module],
    cutter: Cutter | None,
    borrowing: Mapping[nn.Module, int] = MappingProxyType({}),
) -> Iterator[None]:
    """Let a forward inside the block attend to the cache's layers of ours, and cut them.

    Args:
        cache: any cache, or None.
        attentions: the attention modules of the decoder layers with full attention, by layer.
        cutter: decides the cut of the prompt that the forward brings; None for none.
        borrowing: by attention module that attends to an earlier layer's keys, that layer.

    Raises:
        ContractError: a layer did not attend through Transformers' registry.
    """
    binding = binding_of(cache)
    if binding is None:
        yield
        return
    modules = [*attentions.values(), *borrowing]
    binding.begin(cutter, modules[0], borrowing)
    try:
        with intercepting(binding, *modules):
            yield
        binding.check_attended()
    finally:
        binding.end()
