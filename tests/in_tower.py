"""Hosts of methods that act inside a vision tower: their answers, and the hooks they are left."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import modeling_utils

from answers import DIFFERENT, TOLERANCE, distance
from tiny import dropped_columns, model, positions_of, request
from vlmprune.runtime.attention import interception
from vlmprune.runtime.encoder import acting

STEPS = 4


def generate(built: Any, **inputs: Any) -> Any:
    return built.generate(
        **inputs,
        max_new_tokens=STEPS,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )


def leftovers(built: Any) -> list[str]:
    """Hooks that sit on a model."""
    kinds = ("_forward_hooks", "_forward_pre_hooks")
    return [
        f"{name}{kind}{getattr(hook, '__qualname__', hook)}"
        for name, module in built.named_modules()
        for kind in kinds
        for hook in getattr(module, kind).values()
    ]


def check_any_resolution(pruner: Any, kind: str, least: int) -> None:
    """Equal to the full model with the features of the shorter tower, of which some are overlooked.

    Args:
        pruner: leaves six tokens of a crop, fewer where the host cuts padding away.
        kind: of tower.
        least: tokens that are left of any crop.
    """
    built = model("llava_next", kind=kind)
    req = request(built, [1, 2, 0])
    with pruner(built) as handle:
        pruned = generate(built, **req.inputs)
        medium = handle.family.media[0]
    assert handle.report is not None
    kept, layouts = handle.report.kept, handle.report.layouts
    for one, indices in zip(layouts, kept, strict=True):
        crops = one.crop[indices]
        assert all(least <= int((crops == crop).sum()) <= 6 for crop in range(one.crops))
        assert int((crops == 0).sum()) == 6
        assert int((crops < 0).sum()) == one.newlines
    dropped, mask = dropped_columns(req, kept), req.inputs["attention_mask"]
    positions = positions_of(mask, dropped, pruner.positions)
    changed = req.inputs | {"attention_mask": mask * ~dropped, "position_ids": positions}
    (planned,) = acting.acts_of(built, [medium], [req.inputs], [layouts], pruner)
    with acting.acting(built, medium, req.inputs, planned):
        expected = generate(built, **changed)
    assert distance(pruned, expected) < TOLERANCE
    assert distance(pruned, generate(built, **changed)) > DIFFERENT


def check_nothing_stays(pruner: Any) -> None:
    """On a tower that fails halfway, in a layer where there are fewer tokens already, too."""
    built = model()
    req = request(built, [1])
    before = leftovers(built)
    functions = dict(modeling_utils.ALL_ATTENTION_FUNCTIONS._local_mapping)
    plain = generate(built, **req.inputs)
    with pruner(built):
        wanted = generate(built, **req.inputs)
        assert leftovers(built) == before
        broken = built.model.vision_tower.encoder.layers[1].mlp
        hook = broken.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            generate(built, **req.inputs)
        hook.remove()
        assert leftovers(built) == before
        assert not interception._dispatchers
        assert dict(modeling_utils.ALL_ATTENTION_FUNCTIONS._local_mapping) == functions
        assert distance(generate(built, **req.inputs), wanted) == 0
    assert leftovers(built) == before
    assert distance(generate(built, **req.inputs), plain) == 0 < distance(wanted, plain)
