"""Families to whose images nothing attends before the language model: what acts there."""

from __future__ import annotations

from typing import Any

import pytest

from answers import DIFFERENT, TOLERANCE, distance, generate
from vlmprune import (
    FastV,
    RandomTokens,
    VisPruner,
    VlmpruneError,
    methods,
)
from vlmprune.report import Report
from zoo import UNATTENDED
from zoo_oracle import dropped_columns, masked, others

pytestmark = pytest.mark.oracle

WHY = {
    "gemma4_unified": "has no vision encoder",
    "gemma3n": "has a convolutional vision tower, in which nothing attends",
}
LOOKING = [
    VisPruner(keep=4),
    methods.FasterVLM(keep=4),
    methods.VisionZip(keep=4),
    methods.PruMerge(keep=4),
    methods.VtcCls(keep=4),
    methods.FoPru(keep=4),
    VisPruner(keep=4) | FastV(keep=0.4, layer=1),
]
ACTING = [methods.ToMe(keep=4), methods.EViT(keep=4), methods.Downsample(keep=4)]
FREE = [
    RandomTokens(keep=4),
    methods.UniformGrid(keep=4),
    methods.DivPrune(keep=4),
    methods.AveragePooling(keep=4),
]


@pytest.mark.parametrize("name", UNATTENDED)
@pytest.mark.parametrize("pruner", LOOKING, ids=repr)
def test_what_looks_at_attention_is_refused(name: str, pruner: Any) -> None:
    with pytest.raises(VlmpruneError, match=f"{WHY[name]}, and .* chooses by what"):
        pruner.attach(UNATTENDED[name].build())


@pytest.mark.parametrize("name", UNATTENDED)
@pytest.mark.parametrize("pruner", ACTING, ids=repr)
def test_what_acts_in_an_encoder_is_refused(name: str, pruner: Any) -> None:
    with pytest.raises(VlmpruneError, match=WHY[name]):
        pruner.attach(UNATTENDED[name].build())


@pytest.mark.parametrize("name", UNATTENDED)
@pytest.mark.parametrize("pruner", FREE, ids=repr)
def test_what_looks_at_tokens_alone_equals_masking(name: str, pruner: Any) -> None:
    entry = UNATTENDED[name]
    built = entry.build()
    req = entry.request(built, [["image", "image"], ["image"], []])
    with pruner(built) as handle:
        pruned = generate(built, req.inputs)
    report = handle.report
    assert isinstance(report, Report) and report.visual_tokens_after == 12
    if report.members:
        # Its tokens are averages, which masking does not make.
        return
    expected = masked(built, req, dropped_columns(req, report), "compact")
    assert distance(pruned, expected) < TOLERANCE
    control = masked(built, req, dropped_columns(req, report, others(report)), "compact")
    assert distance(pruned, control) > DIFFERENT
