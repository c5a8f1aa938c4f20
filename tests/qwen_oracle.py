"""The Qwen line's full models, told to overlook what pruning drops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import answers
from zoo import ZOO
from zoo.base import WORDS

ALL = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "cosmos3_omni", "cohere_compass"]
# A fault of the installed release may keep one from being pruned.
NAMES = [name for name in ALL if name in ZOO]
MODELS = {name: ZOO[name].build() for name in NAMES}
FAMILIES = pytest.mark.parametrize("name", NAMES)


def generate(built: Any, inputs: dict[str, Tensor], **more: Any) -> Any:
    """Greedy, and without placeholders in the answer, which no real model gives."""
    return answers.generate(built, inputs, suppress_tokens=[*range(WORDS)], **more)


def masked(built: Any, inputs: dict[str, Tensor], dropped: Tensor, **more: Any) -> Any:
    """The full model, told to overlook the dropped columns."""
    mask = inputs["attention_mask"] * ~dropped
    changed = {"attention_mask": mask, "position_ids": positions_of(built, inputs)}
    return generate(built, inputs | changed, **more)


def positions_of(built: Any, inputs: dict[str, Tensor]) -> Tensor:
    """[4, B, L] of a full request."""
    three, _ = built.model.get_rope_index(
        **{k: v for k, v in inputs.items() if not k.startswith("pixel")}
    )
    text = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return torch.cat((text[None], three))


def forget_positions() -> None:
    """What the models keep from one call to the next."""
    for built in MODELS.values():
        built.model.rope_deltas = None
