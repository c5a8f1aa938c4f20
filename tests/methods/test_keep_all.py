"""An int `keep` above what there is keeps all, alone as in a batch, and the report says so."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any

import pytest
import torch

from deep import deep
from tiny import request
from vlmprune import EVS, FastV, RandomTokens, VisPruner, spec
from vlmprune.methods import METHODS
from vlmprune.pruner import Pruner
from vlmprune.report import Report
from zoo import ZOO

CLASSES = {name: spec.class_of(name) for name in METHODS}
WITH_KEEP = [
    name
    for name, cls in CLASSES.items()
    if "keep" in {one.name for one in fields(cls)} and name != "evs"
]
MANY = 10**6


def logits(built: Any, inputs: Any, pruner: Pruner | None) -> tuple[torch.Tensor, Report | None]:
    with torch.no_grad():
        if pruner is None:
            return built(**inputs).logits, None
        with pruner(built) as handle:
            return built(**inputs).logits, handle.report


@pytest.mark.parametrize("name", WITH_KEEP)
def test_all_stay_and_the_report_says_so(name: str) -> None:
    built, pruner = deep(), CLASSES[name](keep=MANY)
    for images in ([1], [2, 1]):
        inputs = request(built, images).inputs
        bare, _ = logits(built, inputs, None)
        found, report = logits(built, inputs, pruner)
        # What stands at padding is nobody's.
        real = inputs["attention_mask"] != 0
        assert torch.equal(found[real], bare[real])
        assert report is not None
        assert report.visual_tokens_after == report.visual_tokens_before == 16 * sum(images)
        assert report.below_keep == {pruner.unit: sum(images)}
        said = f"{sum(images)} {pruner.unit}(s) with fewer than keep, which keep all"
        assert said in str(report)
        assert json.loads(report.json())["below_keep"] == report.below_keep
    # Control: as many as there are is no more than that, and fewer are fewer.
    _, whole = logits(built, inputs, CLASSES[name](keep=16))
    _, few = logits(built, inputs, CLASSES[name](keep=9))
    assert whole is not None and few is not None and not whole.below_keep and not few.below_keep
    assert "which keep all" not in str(whole)
    assert few.visual_tokens_after < few.visual_tokens_before


def test_a_smaller_picture_is_pruned_alone_as_in_a_batch() -> None:
    """LLaVA-NeXT cuts padding away, so that crops have unequal numbers of tokens."""
    built = ZOO["llava_next"].build()
    both = ZOO["llava_next"].request(built, [["image"], ["image"]], text=[5, 5])
    with torch.no_grad(), VisPruner(keep=1.0)(built) as handle:
        built(**both.inputs)
        sizes = [layout.candidates().sum(dim=1).tolist() for layout in handle.report.layouts]
    most, least = max(map(max, sizes)), min(map(min, sizes))
    assert least < most
    with torch.no_grad(), VisPruner(keep=least + 1)(built) as handle:
        built(**both.inputs)
        together = handle.report
    below = sum(n <= least for size in sizes for n in size)
    assert together.below_keep == {"crop": below}
    (_, alone), (_, more) = (
        logits(built, both.inputs, VisPruner(keep=keep, budget="image"))
        for keep in (max(map(sum, sizes)), MANY)
    )
    assert alone is not None and more is not None
    # The image that has as many keeps all, and is not among those that have fewer.
    assert alone.below_keep.get("image", 0) == sum(sum(s) < max(map(sum, sizes)) for s in sizes)
    assert more.below_keep == {"image": 2}


def test_clips_and_chains() -> None:
    built = ZOO["qwen2_5_vl"].build()
    inputs = ZOO["qwen2_5_vl"].request(built, [["video"]], text=[5]).inputs
    bare, _ = logits(built, inputs, None)
    for pruner in (EVS(keep=MANY), RandomTokens(keep=MANY, budget="clip")):
        found, report = logits(built, inputs, pruner)
        assert torch.equal(found, bare)
        assert report is not None and sum(report.below_keep.values()) == 1
    built = deep()
    inputs = request(built, [1]).inputs
    chain = RandomTokens(keep=MANY) | FastV(keep=MANY, layer=1)
    found, report = logits(built, inputs, chain)
    assert torch.equal(found, logits(built, inputs, None)[0])
    assert report is not None and report.below_keep == {"crop": 1}
