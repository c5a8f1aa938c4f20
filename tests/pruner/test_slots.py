"""Where the stages of a chain act, and which chains there cannot be."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from sieve import Sieve
from tiny import model, request
from vlmprune import (
    PLPHP,
    CDPruner,
    DivPrune,
    Downsample,
    EViT,
    FastV,
    PruMerge,
    ToMe,
    VisionZip,
    VisPruner,
    VlmpruneError,
    ZipVL,
)
from vlmprune.pruner import Chain
from vlmprune.pruner.slots import NOTHING, resolve


def test_each_stage_has_its_slot() -> None:
    tome, vis, cut, drop = ToMe(8), VisPruner(4), PLPHP(window=3), FastV(2)
    slots = resolve((tome, vis, cut))
    assert slots.choosing == (tome, vis) and slots.encoder is tome
    assert slots.cache is slots.inner is cut and slots.decoder is NOTHING
    slots = resolve((vis, drop))
    assert slots.choosing == (vis,) and slots.decoder is slots.inner is drop
    assert slots.encoder is slots.cache is NOTHING


def test_what_takes_no_slot_does_nothing() -> None:
    assert not (NOTHING.acts or NOTHING.shortens or NOTHING.cuts or NOTHING.drops)
    assert not NOTHING.routes and NOTHING.probes is None


@pytest.mark.parametrize(
    ("stages", "sentence"),
    [
        (
            (VisPruner(8), ToMe(4)),
            f"{ToMe(4)!r} acts inside the vision encoder and must come first in a chain.",
        ),
        (
            (ToMe(8), EViT(4)),
            f"{EViT(4)!r} acts inside the vision encoder and must come first in a chain.",
        ),
        (
            (ToMe(8), Downsample(4)),
            f"{Downsample(4)!r} acts inside the vision encoder and must come first in a chain.",
        ),
        (
            (PLPHP(), VisPruner(8)),
            f"{PLPHP()!r} acts after prefill and must come last in a chain.",
        ),
        (
            (PLPHP(), VisPruner(8), ZipVL()),
            f"{PLPHP()!r} and {ZipVL()!r} would both cut the KV cache; chain only one.",
        ),
        (
            (FastV(4), VisPruner(8)),
            f"{FastV(4)!r} acts inside the language model and must come last in a chain.",
        ),
        (
            (FastV(4), FastV(4)),
            f"{FastV(4)!r} and {FastV(4)!r} would both drop tokens between decoder layers; chain "
            "only one.",
        ),
        (
            (FastV(4), Sieve()),
            f"{FastV(4)!r} and {Sieve()!r} would both skip decoder layers; chain only one.",
        ),
        (
            (FastV(4), PLPHP()),
            f"{FastV(4)!r} drops tokens between decoder layers, whose caches {PLPHP()!r} cannot "
            "cut; chain only one of them.",
        ),
        (
            (Sieve(), ZipVL()),
            f"{Sieve()!r} lets tokens skip decoder layers, whose caches {ZipVL()!r} cannot cut; "
            "chain only one of them.",
        ),
        (
            (VisionZip(8), DivPrune(6), PruMerge(4)),
            f"{VisionZip(8)!r} and {PruMerge(4)!r} would both merge visual tokens; chain only one "
            "that does.",
        ),
    ],
)
def test_chains_that_cannot_be(stages: tuple[Any, ...], sentence: str) -> None:
    with pytest.raises(VlmpruneError) as caught:
        Chain(stages)
    assert str(caught.value) == sentence


def test_the_same_pruner_twice_is_two_stages() -> None:
    tome = ToMe(8)
    with pytest.raises(VlmpruneError, match="must come first"):
        tome | tome
    vis = VisPruner(8)
    assert len((vis | vis).links) == 2


def test_a_chain_in_a_chain_stands_for_its_stages() -> None:
    inner = VisPruner(8, positions="original") | FastV(4)
    outer = Chain((ToMe(12), inner))
    flat = ToMe(12) | inner
    assert outer.links == flat.links and outer.dropper == FastV(4)
    assert outer.slots == flat.slots and outer.positions == "original" and outer.acts == "merging"
    with pytest.raises(VlmpruneError, match="must come last"):
        Chain((inner, VisPruner(2)))


def test_copies_know_their_slots() -> None:
    chain = VisPruner(8) | PLPHP(window=3)
    again = copy.deepcopy(chain)
    assert again == chain and again.window == 3 and again.slots.cache == PLPHP(window=3)


def test_stages_that_want_two_things_of_a_view_are_refused() -> None:
    """What a view has but once: here the relevance to two texts."""
    chain = CDPruner(keep=8, question="bare") | CDPruner(keep=4, question="prompt")
    said = r"each want the relevance to another text \(bare, prompt\); give all the same"
    built = model()
    with pytest.raises(VlmpruneError, match=said), chain(built):
        built.generate(**request(built, [1]).inputs, max_new_tokens=1)
    same = CDPruner(keep=8) | CDPruner(keep=4)
    with same(built) as handle:
        built.generate(**request(built, [1]).inputs, max_new_tokens=1)
    assert handle.report is not None and handle.report.visual_tokens_after == 4
