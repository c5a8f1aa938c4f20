"""What the page on training with pruned tokens defines, and the masked model beside it."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from held_out_scenes import SCENES, picture
from repository import ROOT

PAGE = ROOT / "docs" / "training-with-pruning.md"


def page() -> dict[str, Any]:
    """The names of the page's code: the model with its pruner, the collators, the rows' forms."""
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text("utf-8"), re.DOTALL | re.MULTILINE)
    space: dict[str, Any] = {"__name__": "page"}
    exec(compile("\n".join(blocks), PAGE.name, "exec", dont_inherit=True), space)
    # The tower is left as it is, as such training does.
    space["model"].model.vision_tower.requires_grad_(False)
    return space


def rows(count: int) -> list[dict[str, Any]]:
    """Pictures with a question and its answer, of unequal lengths."""
    found = [
        {"image": picture(number), "question": one["question"], "answer": one["answer"]}
        for number, scene in enumerate(SCENES[:count])
        for one in scene["questions"][: 1 + number % 2]
    ]
    return found[:count]


def masked(model: Any, inputs: dict[str, Any], kept: list[Tensor], policy: str) -> Tensor:
    """Logits of the full model, which overlooks what a call with a picture a row dropped.

    Args:
        model: without a pruner.
        inputs: of the call.
        kept: visual tokens of each row.
        policy: the attachment's positions.
    """
    ids = inputs["input_ids"]
    dropped = ids == model.config.image_token_id
    for row, stays in enumerate(kept):
        dropped[row, dropped[row].nonzero()[:, 0][stays]] = False
    mask = inputs["attention_mask"] * ~dropped
    counted = inputs["attention_mask"] if policy == "original" else mask
    positions = (counted.cumsum(dim=1) - 1).clamp(min=0)
    own = {"input_ids": ids, "pixel_values": inputs["pixel_values"]}
    logits: Tensor = model(
        **own, attention_mask=mask, position_ids=positions, use_cache=False
    ).logits
    return logits


def per_token(logits: Tensor, labels: Tensor) -> Tensor:
    """[B, L - 1] log-probability of each label; 0 where there is none."""
    wanted = labels[:, 1:]
    found = logits[:, :-1].log_softmax(-1).gather(2, wanted.clamp(min=0)[..., None])[..., 0]
    return found.masked_fill(wanted == -100, 0)


def finite(model: Any) -> bool:
    """Whether there are gradients, and all are numbers."""
    found = [one.grad for one in model.parameters() if one.grad is not None]
    return len(found) > 10 and all(bool(torch.isfinite(one).all()) for one in found)
