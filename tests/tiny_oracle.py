"""The full LLaVA of `tiny`, told to overlook what pruning drops."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tiny import Request, dropped_columns, positions_of

STEPS = 7
FAMILIES = ["llava", "llava_next"]


def generate(built: Any, **inputs: Any) -> Any:
    return built.generate(
        **inputs,
        max_new_tokens=STEPS,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )


def masked(built: Any, req: Request, dropped: Tensor, policy: str) -> Any:
    """The full model, told to overlook the dropped columns."""
    mask = req.inputs["attention_mask"] * ~dropped
    positions = positions_of(req.inputs["attention_mask"], dropped, policy)
    return generate(built, **(req.inputs | {"attention_mask": mask, "position_ids": positions}))


def oracle(built: Any, req: Request, kept: list[Tensor], policy: str, **options: Any) -> Any:
    """`generate` of the full model under any settings, told to overlook what pruning drops."""
    mask = req.inputs["attention_mask"]
    dropped = dropped_columns(req, kept)
    changes = {
        "attention_mask": mask * ~dropped,
        "position_ids": positions_of(mask, dropped, policy),
    }
    return built.generate(**(req.inputs | changes), **options)
