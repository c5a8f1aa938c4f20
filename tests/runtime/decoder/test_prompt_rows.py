"""The rows of a prompt while a forward runs over it: one that comes in parts is told."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sabotage.tools import recast
from tiny import model, request
from vlmprune import FastV, VlmpruneError


def test_a_host_that_reads_its_prompt_in_parts_is_told() -> None:
    built = model()
    inputs = request(built, [1]).inputs
    plain = type(built.model.language_model).forward
    columns = inputs["input_ids"].shape[1]

    def forward(self: Any, *, inputs_embeds: Tensor, attention_mask: Any, **rest: Any) -> Any:
        half = columns // 2
        rest["position_ids"] = torch.arange(half)[None]
        plain(self, inputs_embeds=inputs_embeds[:, :half], attention_mask=None, **rest)
        rest["position_ids"] = torch.arange(half, columns)[None]
        return plain(self, inputs_embeds=inputs_embeds[:, half:], attention_mask=None, **rest)

    recast(built.model.language_model, forward=forward)
    with torch.no_grad():
        built(**inputs)
        said = f"^a prompt of {columns} new columns came in parts, of which FastV.* cannot make a"
        with FastV(keep=4)(built), pytest.raises(VlmpruneError, match=said):
            built(**inputs)
