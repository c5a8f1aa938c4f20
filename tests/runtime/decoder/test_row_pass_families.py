"""Rows dropped between decoder layers equal masking in every family, on the real classes.

Sliding windows and chunks count the prompt's own columns, dropped or not, as masking has them.
"""

from __future__ import annotations

from typing import Any

import pytest

from answers import DIFFERENT, TOLERANCE, distance, generate
from hidden import hiding
from vlmprune import VlmpruneError
from vlmprune.hosts.families import PROVED
from vlmprune.methods import FastV, PyramidDrop
from zoo import WINDOWED, ZOO
from zoo_oracle import dropped_columns

pytestmark = pytest.mark.oracle

EVERY = {**ZOO, **{f"{name}, short window": entry for name, entry in WINDOWED.items()}}
# From a number of columns on, that of a query scales it: dropping would change that.
REFUSED = {"llama4, short window": "scales queries by their number from token 24 on"}


FOLLOWED = [
    name
    for name, (model, *_) in zip(EVERY, (name.split(",") for name in EVERY), strict=True)
    if model not in PROVED or "rows" in PROVED[model].stages
]


@pytest.mark.parametrize("name", FOLLOWED)
def test_dropping_equals_masking(name: str) -> None:
    """A padded batch, with videos where there are any; by one layer's attention and by two's."""
    entry = EVERY[name]
    built = entry.build("sdpa")
    rows: list[list[Any]] = [["image", "image"], ["image"], ["image"] if entry.images_first else []]
    if "video" in entry.modalities:
        rows = [["video", "image"], ["image", "video", "image"], []]
    req = entry.request(built, rows)
    for pruner in (FastV(keep=0.4, layer=1), PyramidDrop(stages=2, positions="original")):
        with pruner(built) as handle:
            if name in REFUSED:
                with pytest.raises(VlmpruneError, match=REFUSED[name]):
                    generate(built, req.inputs)
                continue
            pruned = generate(built, req.inputs)
        report = handle.report
        assert report is not None
        dropped = {one.index: dropped_columns(req, report, one.kept) for one in report.layers}
        assert sorted(dropped) == [1, 2] and all(bool(one.any()) for one in dropped.values())
        with hiding(built, dropped):
            expected = generate(built, req.inputs)
        assert distance(pruned, expected) < TOLERANCE
        with hiding(built, {layer: one.flip(1) for layer, one in dropped.items()}):
            assert distance(pruned, generate(built, req.inputs)) > DIFFERENT


def test_a_placeholder_without_pixels_is_text() -> None:
    """A video's, in a question about an image: nothing is dropped there, and nothing counted."""
    entry = ZOO["llava_next_video"]
    built = entry.build("sdpa")
    req = entry.request(built, [["image"]])
    ids = req.inputs["input_ids"].clone()
    ids[0, -1] = built.config.video_token_index
    inputs = {**req.inputs, "input_ids": ids}
    with FastV(keep=4, layer=1)(built) as handle:
        pruned = generate(built, inputs)
    report = handle.report
    assert report is not None and report.visual_tokens_after == 4
    dropped = {one.index: dropped_columns(req, report, one.kept) for one in report.layers}
    with hiding(built, dropped):
        assert distance(pruned, generate(built, inputs)) < TOLERANCE
    assert distance(pruned, generate(built, inputs)) > DIFFERENT
