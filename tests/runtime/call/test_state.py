"""Hosts whose `generate` does not read the prompt that it is given, or not all of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlavaForConditionalGeneration

from answers import generate
from stock import CACHE
from tiny import model, request
from vlmprune import PLPHP, FastV, VisPruner
from vlmprune.hosts.contract import ContractError


class Guessing(LlavaForConditionalGeneration):
    """Answers without a look at the prompt, with so many tokens."""

    tokens = 3

    def generate(self, inputs: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
        assert inputs is not None
        return torch.cat((inputs, inputs[:, : self.tokens]), dim=1)


class Short(LlavaForConditionalGeneration):
    """Reads the prompt into a cache but for its last column."""

    def generate(
        self, inputs: Tensor | None = None, generation_config: Any = None, **given: Any
    ) -> Tensor:
        assert inputs is not None
        names = ("pixel_values", "mm_encoder_outputs", "attention_mask", "position_ids")
        call = {name: given[name] for name in names if name in given}
        for name in names[2:]:
            if name in call:
                call[name] = call[name][..., :-1]
        call[CACHE] = DynamicCache(config=self.config.get_text_config())
        self(input_ids=inputs[:, :-1], use_cache=True, **call)
        return torch.cat((inputs, inputs[:, :3]), dim=1)


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("pruner", [VisPruner(keep=4), PLPHP(), FastV(keep=4)], ids=repr)
def test_a_prompt_that_is_not_read_is_told(
    pruner: Any, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = model()
    monkeypatch.setattr(Guessing, "tokens", tokens)
    inputs = request(built, [1]).inputs
    built.__class__ = Guessing
    said = "^Guessing cannot be .*: its generate never read the prompt that it was given; the model"
    with pruner(built), pytest.raises(ContractError, match=said):
        built.generate(**inputs, max_new_tokens=tokens)
    built.__class__ = LlavaForConditionalGeneration
    with pruner(built):
        generate(built, inputs)


def test_a_prompt_that_is_not_read_to_its_end_is_told() -> None:
    built = model()
    inputs = request(built, [1], text=[6]).inputs
    built.__class__ = Short
    said = "^Short cannot be .*: its forward never read the whole prompt into its cache; the model"
    with PLPHP()(built), pytest.raises(ContractError, match=said):
        built.generate(**inputs, max_new_tokens=3)
