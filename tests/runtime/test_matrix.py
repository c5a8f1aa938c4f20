"""What holds of every kind of method, in a few unlike families: one matrix for each such thing.

Keeping everything changes no bit; beams, a later turn and half precision equal the full model that
overlooks what was left out. All families, with videos, are in `hosts/families/test_every_family.py`
for what goes in one call, and special cases beside the subject that they are of.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from answers import DIFFERENT, TOLERANCE, distance, generate
from deep import deep
from method_kinds import KINDS, overlooked
from sieve import Sieve
from stock import CACHE, cache_of
from tiny import model, request
from vlmprune import (
    DART,
    PLPHP,
    Downsample,
    EViT,
    FastV,
    GSearch,
    PSigmoid,
    PyramidDrop,
    SparseVLM,
    ToMe,
    VisPruner,
)
from vlmprune.runtime.cache.gapped_layer import GappedLayer
from zoo import ZOO, Request
from zoo.base import IMAGE, VIDEO, VOCABULARY, WORDS
from zoo_oracle import overlooking

pytestmark = pytest.mark.oracle

# CLS attention and one crop; crops with newlines; three positions a token and windows in the tower;
# windows in the decoder and images that attend both ways.
FAMILIES = {"llava": "eager", "llava_next": "sdpa", "qwen2_5_vl": "sdpa", "gemma3": "eager"}
every = pytest.mark.parametrize(("kind", "name"), list(product(KINDS, FAMILIES)))


@cache
def padded(name: str) -> tuple[Any, Request, Any, Tensor]:
    """A model, a batch whose rows have two images, one and none, and what it says by itself.

    One model serves all tests of this file, for none may leave anything on it.
    """
    built = ZOO[name].build(FAMILIES[name])
    req = ZOO[name].request(built, [["image", "image"], ["image"], []])
    with torch.no_grad():
        return built, req, generate(built, req.inputs), built(**req.inputs).logits


def equal(left: Any, right: Any) -> bool:
    """Whether two answers are the same to the bit."""
    pairs = zip(left.logits, right.logits, strict=True)
    return torch.equal(left.sequences, right.sequences) and all(torch.equal(a, b) for a, b in pairs)


@every
@torch.no_grad()
def test_keeping_everything_changes_no_bit(kind: str, name: str) -> None:
    built, req, plain, logits = padded(name)
    with KINDS[kind].all(built) as handle:
        assert equal(generate(built, req.inputs), plain)
        report = handle.report
        assert torch.equal(built(**req.inputs).logits, logits)
    assert report is not None
    assert report.visual_tokens_after == report.visual_tokens_before == sum(req.lengths)
    assert report.kv_bytes_after == report.kv_bytes_before
    assert report.decoder_flops_after == report.decoder_flops_before
    with KINDS[kind].some(built):
        assert distance(plain, generate(built, req.inputs)) > DIFFERENT
    # Nor does a method that was there leave anything behind.
    assert torch.equal(built(**req.inputs).logits, logits)


# Other methods of a kind, which choose by something else, and other ways to say all.
FURTHER: dict[str, tuple[Any, Any]] = {
    "compact": (VisPruner(keep=1.0, positions="compact"), VisPruner(keep=15, positions="compact")),
    "original": (VisPruner(keep=16, positions="original"), VisPruner(keep=15)),
    "by image": (VisPruner(keep=1.0, budget="image"), VisPruner(keep=0.9, budget="image")),
    "cut a little": (PLPHP(r=1, dr=0), PLPHP(r=0.9, dr=0)),
    "FastV": (FastV(keep=16), FastV(keep=15)),
    "PyramidDrop": (PyramidDrop(ratio=1.0), PyramidDrop(ratio=0.9)),
    "DART": (DART(keep=1.0), DART(keep=0.9)),
    "GSearch": (GSearch(rates=(1.0,) * 5), GSearch(rates=(1.0, 0.9, 0.9, 0.9, 0.9))),
    "PSigmoid": (PSigmoid(keep=1.0), PSigmoid(keep=0.9)),
    "SparseVLM": (SparseVLM(keep=1.0), SparseVLM(keep=0.9)),
    "routed": (Sieve(keep=1.0, weighted=False), Sieve(keep=1.0)),
    "ToMe": (ToMe(keep=1.0), ToMe(keep=15)),
    "EViT": (EViT(keep=1.0), EViT(keep=15)),
    "Downsample": (Downsample(keep=1.0), Downsample(keep=15)),
}


@cache
def deeper(attention: str, kind: str) -> tuple[Any, dict[str, Tensor], Any]:
    """A LLaVA of five layers, by its tower, with the same batch and what it says by itself."""
    built = deep(attention) if kind == "clip" else model("llava", attention, kind)
    inputs = request(built, [2, 1, 0]).inputs
    return built, inputs, generate(built, inputs)


# Towers with a CLS token, with one behind another norm, and without, where methods act inside them.
TOWERS = dict.fromkeys(("ToMe", "EViT", "Downsample"), ("clip", "dinov2", "siglip"))
# What drops rows by the attention of a layer, in both ways in which that is read.
BOTH = {"FastV", "PyramidDrop"}


@pytest.mark.parametrize(
    ("what", "attention", "kind"),
    [
        *((what, "sdpa", kind) for what in FURTHER for kind in TOWERS.get(what, ("clip",))),
        *((what, "eager", "clip") for what in sorted(BOTH)),
    ],
)
def test_other_ways_to_keep_everything_change_no_bit(what: str, attention: str, kind: str) -> None:
    built, inputs, plain = deeper(attention, kind)
    whole, less = FURTHER[what]
    with whole(built) as handle:
        found = generate(built, inputs)
    assert equal(found, plain)
    report = handle.report
    assert report is not None and report.kv_bytes_after == report.kv_bytes_before
    # Where nothing was dropped the cache is made of the host's own layers.
    gapped = [isinstance(one, GappedLayer) for one in cache_of(found).layers]
    assert what not in BOTH or not any(gapped)
    with less(built):
        assert distance(plain, generate(built, inputs)) > 0


@every
def test_beams_equal_masked_beams(kind: str, name: str) -> None:
    built = padded(name)[0]
    # One image a row: with more, releases before 5.20 mix up the images of repeated rows.
    req = ZOO[name].request(built, [["image"], ["image"]], text=[5, 9])
    more: dict[str, Any] = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 4}
    # A placeholder that was chosen would ask for features of its own.
    more |= {"suppress_tokens": [IMAGE, VIDEO]}
    with KINDS[kind].some(built) as handle:
        pruned = generate(built, req.inputs, **more)
        report = handle.report
    assert len(pruned.sequences) == 4
    for other in (False, True):
        with overlooked(KINDS[kind], built, req, report, pruned, other) as inputs:
            expected = generate(built, inputs, **more)
        if other:
            assert distance(pruned, expected) > DIFFERENT
        else:
            assert torch.equal(pruned.sequences, expected.sequences)
            assert distance(pruned, expected) < TOLERANCE


def later(name: str, req: Request, first: Any) -> dict[str, Tensor]:
    """The conversation so far, and four words more."""
    count = len(first.sequences)
    words = torch.randint(WORDS, VOCABULARY, (count, 4), generator=torch.Generator().manual_seed(3))
    ids = torch.cat((first.sequences, words), dim=1)
    given = req.inputs["attention_mask"]
    new = torch.ones(count, ids.shape[1] - given.shape[1], dtype=torch.long)
    return {"input_ids": ids, "attention_mask": torch.cat((given, new), 1)} | ZOO[name].aligned(ids)


@every
def test_a_later_turn_equals_masking(kind: str, name: str) -> None:
    built, req, plain, _ = padded(name)
    one = KINDS[kind]

    def goes_on(first: Any) -> Any:
        turn = later(name, req, first) | {CACHE: cache_of(first)}
        return generate(built, turn, max_new_tokens=4)

    with one.some(built) as handle:
        first = generate(built, req.inputs)
        report = handle.report
        found = goes_on(first)
    bare = goes_on(copy.deepcopy(plain))
    with overlooked(one, built, req, report, found) as inputs:
        if one.where == "before":
            # One long prompt that holds both turns.
            whole = Request(
                req.inputs | later(name, req, first),
                req.lengths,
                req.modalities,
                req.rows,
                req.pixels,
            )
            gone = torch.zeros_like(whole.inputs["input_ids"], dtype=torch.bool)
            gone[:, : inputs["input_ids"].shape[1]] = dropped(inputs, req)
            expected = generate(
                built, overlooking(built, whole, gone, report.positions), max_new_tokens=4
            )
        else:
            expected = generate(built, inputs)
            if one.where != "steps":
                expected = goes_on(expected)
    if one.where == "steps":
        with overlooked(one, built, req, report, found, since=len(first.logits) - 1):
            expected = goes_on(expected)
    assert torch.equal(found.sequences[:, -4:], expected.sequences[:, -4:])
    assert distance(found, expected) < TOLERANCE
    assert distance(found, bare) > DIFFERENT


def dropped(inputs: dict[str, Tensor], req: Request) -> Tensor:
    """[B, L] columns that the masked request overlooks."""
    return req.inputs["attention_mask"].bool() & ~inputs["attention_mask"].bool()


FORCED = (70, 81, 66, 90, 77)


def forced(built: Any, inputs: dict[str, Any]) -> Any:
    """An answer of given words, so that no near tie between two makes another prompt of it."""
    length = inputs["input_ids"].shape[1]

    def allowed(_: int, ids: Tensor) -> list[int]:
        return [FORCED[len(ids) - length]]

    return generate(built, inputs, max_new_tokens=len(FORCED), prefix_allowed_tokens_fn=allowed)


@cache
def halved(name: str) -> tuple[Any, Any, Request]:
    """A model in bfloat16, the same weights computing in float32, and a batch."""
    half = copy.deepcopy(padded(name)[0]).to(torch.bfloat16)
    req = padded(name)[1]
    return half, copy.deepcopy(half).float(), replace(req, inputs=cast(req.inputs, torch.bfloat16))


def cast(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {n: v.to(dtype) if v.is_floating_point() else v for n, v in inputs.items()}


@every
def test_in_bfloat16_it_is_as_near_to_masking_as_bfloat16_is_to_float32(
    kind: str, name: str
) -> None:
    """Two sums of bfloat16 lie apart by no more than each of them lies from float32's.

    The tolerance is twice the distance of the masked model in bfloat16 from itself in float32, with
    the same weights: both answers are rounded. It is 0.03 to 0.3 of logits of about one; the
    distance is 0 to 1.3 of one such distance, and other tokens lie 4 to 84 of them away.
    """
    half, whole, req = halved(name)
    one = KINDS[kind]
    with one.some(half) as handle:
        pruned = forced(half, req.inputs)
        report = handle.report
    with overlooked(one, half, req, report, pruned) as inputs:
        near = forced(half, inputs)
    with overlooked(one, whole, req, report, pruned) as inputs:
        exact = forced(whole, cast(inputs, torch.float32))
    with overlooked(one, half, req, report, pruned, other=True) as inputs:
        far = forced(half, inputs)
    tolerance = 2 * distance(near, exact)
    assert distance(pruned, near) < tolerance and distance(pruned, exact) < tolerance
    assert tolerance < distance(pruned, far)
