"""PLPHP's settings for tiny models, under which their layers and heads keep unequal numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from answers import generate
from tiny import IMAGE
from vlmprune import PLPHP

# Low enough that every layer of a random model loses tokens, and thresholds that tell layers apart.
SETTINGS = {"r": 0.4, "dr": 0.3, "alpha": 0.65, "beta": 0.6}


def telling(built: Any, inputs: dict[str, Tensor], window: int = 1) -> dict[str, float]:
    """Settings whose thresholds tell this request's layers apart, since random models' γ vary."""
    with PLPHP(window=window)(built) as handle:
        generate(built, inputs, max_new_tokens=1)
    assert handle.report is not None
    gammas = sorted(g for layer in handle.report.layers for g in layer.gamma if g is not None)
    return {"r": 0.4, "dr": 0.3, "alpha": gammas[-1] - 1e-4, "beta": gammas[1] - 1e-4}


def exchanged(keep: dict[int, Tensor], ids: Tensor) -> dict[int, Tensor]:
    """The same numbers of visual tokens, but others."""
    visual = (ids == IMAGE)[:, None]
    return {
        i: torch.where(visual, (mask & visual).flip(2).roll(1, 2), mask) for i, mask in keep.items()
    }
