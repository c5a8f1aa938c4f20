"""Arguments of calls by the host's names: what a class does not take, and what does not fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.utils import ModelOutput

from sabotage.tools import recast
from tiny import model
from vlmprune import FastV, VisPruner, VlmpruneError
from zoo import ZOO


def test_a_class_that_takes_no_mask_is_refused_at_attach() -> None:
    built = model()

    def forward(
        self: Any,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        cache: Any = None,
        **rest: Any,
    ) -> ModelOutput:
        raise AssertionError("called")

    recast(built, forward=forward)
    said = (
        r"^LlavaForConditionalGeneration of transformers \S+ has no attention_mask, which vlmprune "
        "hands it; install "
    )
    for pruner in (VisPruner(keep=4), FastV(keep=4)):
        with pytest.raises(VlmpruneError, match=said):
            pruner.attach(built)


def test_inputs_beside_the_ids_have_their_columns() -> None:
    entry = ZOO["gemma3"]
    built = entry.build()
    inputs = dict(entry.request(built, [["image"]]).inputs)
    columns = inputs["input_ids"].shape[1]
    name = "token_type_ids"
    assert inputs[name].shape[1] == columns
    more = torch.nn.functional.pad(inputs[name], (0, 1))
    with VisPruner(keep=4)(built), torch.no_grad():
        built(**inputs)
        said = f"^{name} has {columns + 1} columns where {columns} are due"
        with pytest.raises(VlmpruneError, match=said):
            built(**inputs | {name: more})
