"""Hosts of methods that act inside a vision tower: their answers, and the hooks they are left."""

from __future__ import annotations

from typing import Any

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
