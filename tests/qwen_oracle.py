"""Full models with three positions a column, told to overlook what pruning drops.

The Qwen line, and GLM-V, whose patches and positions are those of the Qwen line.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import answers
from shortened import is_recurrent, shortened
from vlmprune.hosts.families.qwen import MEDIA
from zoo import ZOO
from zoo.base import WORDS
from zoo_oracle import three_positions

ALL = [
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "qwen3_vl_moe",
    "cosmos3_omni",
    "cohere_compass",
    "qwen3_5",
    "glm4v",
    "glm_ocr",
]
# A fault of the installed release may keep one from being pruned.
NAMES = [name for name in ALL if name in ZOO]
MODELS = {name: ZOO[name].build() for name in NAMES}
FAMILIES = pytest.mark.parametrize("name", NAMES)
# Those whose images and videos have placeholders of their own.
APART = [name for name in NAMES if not ZOO[name].one_placeholder]
# What pixels and sizes are called.
MEDIA_NAMES = {name for medium in MEDIA for name in medium.inputs}


def generate(built: Any, inputs: dict[str, Tensor], **more: Any) -> Any:
    """Greedy, and without placeholders in the answer, which no real model gives."""
    return answers.generate(built, inputs, suppress_tokens=[*range(WORDS)], **more)


def masked(built: Any, inputs: dict[str, Tensor], dropped: Tensor, **more: Any) -> Any:
    """The full model, told to overlook the dropped columns; recurrent ones are not given them."""
    if is_recurrent(built):
        three, more = positions_of(built, inputs)[1:], {"suppress_tokens": [*range(WORDS)], **more}
        return shortened(built, inputs, dropped, three, **more)
    mask = inputs["attention_mask"] * ~dropped
    changed = {"attention_mask": mask, "position_ids": positions_of(built, inputs)}
    return generate(built, inputs | changed, **more)


def positions_of(built: Any, inputs: dict[str, Tensor]) -> Tensor:
    """[4, B, L] of a full request."""
    three = three_positions(built, inputs)
    text = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return torch.cat((text[None], three))


def forget_positions() -> None:
    """What the models keep from one call to the next."""
    for built in MODELS.values():
        built.model.rope_deltas = None
