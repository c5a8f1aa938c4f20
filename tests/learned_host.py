"""A host of learned methods: fresh weights for it, its logits, and hooks on its layers."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from tiny import model
from vlmprune import QueCC


def hooks(built: Any) -> int:
    """Of linear layers; Transformers has some of its own on others."""
    linear = [m for m in built.modules() if isinstance(m, nn.Linear)]
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in linear)


@cache
def host() -> Any:
    return model()


def fresh(built: Any, **hyper: Any) -> QueCC:
    torch.manual_seed(0)
    return QueCC.fresh(built, window=3, heads=4, **hyper)


@torch.no_grad()
def logits(built: Any, pruner: Any, inputs: dict[str, Any]) -> Tensor:
    with pruner(built):
        found: Tensor = built(**inputs).logits
    return found
