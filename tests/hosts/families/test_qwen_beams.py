"""Beams and samples of the Qwen line and GLM-V: repeated rows take their own items.

GLM-V's class mixes up the items of repeated rows by itself, so that there is nothing to compare
with but where all rows have the same one; `test_release_calls` has more of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from answers import DIFFERENT, distance
from qwen_oracle import (
    APART,
    FAMILIES,
    MEDIA_NAMES,
    MODELS,
    NAMES,
    forget_positions,
    generate,
    masked,
)
from shortened import tolerance
from stock import repeats_rows
from vlmprune import VisPruner
from vlmprune.pruner import Pruner
from vlmprune.views import EncoderView, Selection
from zoo import ZOO, Request
from zoo_oracle import dropped_columns, others

pytestmark = pytest.mark.oracle

_forget = pytest.fixture(autouse=True)(forget_positions)


BEAMS = {"num_beams": 3, "num_return_sequences": 2, "output_scores": True}


def skip_unrepeated(name: str, req: Request) -> None:
    """Leave out what an early release's own `generate` cannot repeat."""
    if name in APART and not repeats_rows(MODELS[name], req.inputs):
        pytest.skip("this release mixes up the items of repeated rows, without a pruner")


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        (name, rows)
        for name in NAMES
        for rows in (
            ([["image", "image"], ["image"]], [["video", "image"], ["image"]])
            if name in APART
            else ([["image"]],)
        )
    ],
)
def test_beams_equal_masking(name: str, rows: Any) -> None:
    built = MODELS[name]
    req = ZOO[name].request(built, rows)
    skip_unrepeated(name, req)
    with VisPruner(keep=0.4)(built) as handle:
        pruned = generate(built, req.inputs, **BEAMS)
    report = handle.report
    expected = masked(built, req.inputs, dropped_columns(req, report), **BEAMS)
    control = masked(built, req.inputs, dropped_columns(req, report, others(report)), **BEAMS)
    assert torch.equal(pruned.sequences, expected.sequences)
    assert (pruned.sequences_scores - expected.sequences_scores).abs().max() < tolerance(built)
    assert (pruned.sequences_scores - control.sequences_scores).abs().max() > DIFFERENT


@FAMILIES
def test_several_samples_take_their_own_rows_items(name: str) -> None:
    built = MODELS[name]
    req = ZOO[name].request(
        built, [["image", "video"], ["image"]] if name in APART else [["image"]]
    )
    options = {"do_sample": True, "num_return_sequences": 2, "temperature": 0.5}
    with VisPruner(keep=0.4)(built) as handle:
        torch.manual_seed(5)
        pruned = generate(built, req.inputs, **options)
    torch.manual_seed(5)
    expected = masked(built, req.inputs, dropped_columns(req, handle.report), **options)
    assert torch.equal(pruned.sequences, expected.sequences)
    assert distance(pruned, expected) < tolerance(built)


@dataclass(frozen=True)
class _FirstFrames(Pruner):
    """Keeps two cells of each item's first frame, and of an image."""

    def select(self, view: EncoderView) -> Selection:
        kept = torch.zeros_like(view.candidates)
        for item in set(view.images):
            kept[view.images.index(item), 1:3] = True
        return Selection(kept, {})


@pytest.mark.parametrize("name", APART)
def test_beams_go_well_where_nothing_of_a_frame_is_left(name: str) -> None:
    built = MODELS[name]
    req = ZOO[name].request(built, [["video", "image", "video"], ["video"]])
    skip_unrepeated(name, req)
    with _FirstFrames()(built) as handle:
        pruned = generate(built, req.inputs, **BEAMS)
    expected = masked(built, req.inputs, dropped_columns(req, handle.report), **BEAMS)
    assert torch.equal(pruned.sequences, expected.sequences)
    assert (pruned.sequences_scores - expected.sequences_scores).abs().max() < tolerance(built)


@FAMILIES
def test_beams_of_stored_images(name: str) -> None:
    built = MODELS[name]
    req = ZOO[name].request(built, [["video", "image", "video"], ["video"]])
    without = {k: v for k, v in req.inputs.items() if k not in MEDIA_NAMES}
    for pruner in (VisPruner(keep=0.4), VisPruner(keep=1, budget="clip")):
        with pruner(built) as handle:
            expected = generate(built, req.inputs, **BEAMS)
            stored = generate(built, without | {"vision": handle.encode(**req.inputs)}, **BEAMS)
        assert torch.equal(stored.sequences, expected.sequences)
        assert (stored.sequences_scores - expected.sequences_scores).abs().max() < tolerance(built)
