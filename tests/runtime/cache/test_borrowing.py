"""Layers that attend to an earlier layer's keys and values see what a cut left of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from answers import DIFFERENT, TOLERANCE, distance, generate
from masked import kept_columns, masking
from stock import CACHE, cache_of
from vlmprune import PLPHP, Recall
from vlmprune.runtime.cache.ragged_layer import RaggedLayer
from zoo import UNATTENDED, ZOO
from zoo.base import IMAGE

pytestmark = pytest.mark.oracle

EVERY = {**ZOO, **UNATTENDED}
NAMES = [name for name in ("gemma4_small", "gemma3n") if name in EVERY]
# Of six layers, every second with full attention, the last two share: the fourth's and the third's.
OWN, LENDER, BORROWER = 1, 3, 5
CUT = PLPHP(alpha=0.8, beta=0.6, per_head="adaptive")
STEPS: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
TOLD = {"return_dict_in_generate": True, "output_logits": True}


def cut(name: str, attention: str) -> tuple[Any, Any, Any, dict[int, Tensor]]:
    """A model, its request and answer under PLPHP, and what heads keep by layer."""
    built = EVERY[name].build(attention)
    req = EVERY[name].request(built, [["image", "image"]])
    with CUT(built) as handle:
        pruned = generate(built, req.inputs)
    assert [layer.index for layer in handle.report.layers] == [OWN, LENDER]
    return built, req, pruned, kept_columns(handle.report, req.inputs["input_ids"], IMAGE)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", NAMES)
def test_what_a_lender_drops_is_gone_for_those_that_borrow(name: str, attention: str) -> None:
    built, req, pruned, keep = cut(name, attention)
    layer = cache_of(pruned).layers[LENDER]
    assert isinstance(layer, RaggedLayer) and layer.prefix is not None
    with masking(built, {**keep, BORROWER: keep[LENDER]}):
        assert distance(pruned, generate(built, req.inputs)) < TOLERANCE
    # The controls: a borrower that sees all, and one that sees as much of something else.
    with masking(built, keep):
        assert distance(pruned, generate(built, req.inputs)) > DIFFERENT
    with masking(built, {**keep, BORROWER: keep[OWN]}):
        assert distance(pruned, generate(built, req.inputs)) > DIFFERENT


@pytest.mark.parametrize("name", NAMES)
def test_a_later_turn_goes_on_with_it(name: str) -> None:
    built, req, _, keep = cut(name, "sdpa")

    def answered() -> Any:
        first = built.generate(**req.inputs, **STEPS, **TOLD)
        ids = torch.cat((first.sequences, torch.tensor([[63, 61, 66]])), dim=1)
        turn = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return built.generate(**turn, **{CACHE: cache_of(first)}, **STEPS, **TOLD)

    with CUT(built):
        pruned = answered()
    with masking(built, {**keep, BORROWER: keep[LENDER]}):
        assert distance(pruned, answered()) < TOLERANCE
    with masking(built, keep):
        assert distance(pruned, answered()) > DIFFERENT


@pytest.mark.parametrize("name", NAMES)
def test_what_reads_by_its_own_queries_leaves_a_lender_whole(name: str) -> None:
    built = EVERY[name].build()
    req = EVERY[name].request(built, [["image", "image"]])
    with Recall(read=0.2, floor=0, always=True)(built) as handle:
        read = generate(built, req.inputs)
    assert handle.report.reading.layers == (OWN,) or list(handle.report.reading.layers) == [OWN]
    assert not hasattr(cache_of(read).layers[LENDER], "prefix")
