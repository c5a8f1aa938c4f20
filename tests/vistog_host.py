"""VisToG with weights that show errors, its hosts, and a slow re-statement of its module."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from tiny import model
from vlmprune import VisToG
from vlmprune.views import EncoderView, Selection

Vector = list[float]


def loud(module: nn.Module, seed: int = 0) -> Any:
    """With weights so large that errors show."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in module.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if name == "semantic":
                weight.copy_(noise)
            elif weight.ndim > 1:
                weight.copy_(noise * 1.5 / weight[0].numel() ** 0.5)
            else:
                weight.copy_(noise * 0.3 + (name.endswith("weight") or name.endswith("gain")))
    return module.eval()


def vistog(built: Any, seed: int = 0, positions: Any = "auto", **hyper: Any) -> VisToG:
    pruner = VisToG.fresh(built, positions, **{"tokens": 5, **hyper})
    loud(pruner.module, seed)
    return pruner


@cache
def host(family: str = "llava", kind: str = "clip") -> Any:
    return model(family, kind=kind)


def shown(built: Any, pruner: VisToG, inputs: dict[str, Tensor]) -> tuple[EncoderView, Selection]:
    """What the method sees of a request, and chooses."""
    seen: list[Any] = []

    class Watched(VisToG):
        def select(self, view: EncoderView) -> Selection:
            seen.append((view, super().select(view)))
            return seen[-1][1]

    watched = object.__new__(Watched)
    vars(watched).update(vars(pruner))
    with torch.no_grad(), watched(built):
        built(**inputs)
    return seen[0]


# The slow re-statement: one number at a time, in Python's float64.


def dot(one: Vector, other: Vector) -> float:
    return sum(x * y for x, y in zip(one, other, strict=True))


def linear(weights: dict[str, Any], name: str, value: Vector) -> Vector:
    rows = weights[f"{name}.weight"]
    bias = weights.get(f"{name}.bias", [0.0] * len(rows))
    return [dot(row, value) + b for row, b in zip(rows, bias, strict=True)]


def normed(weights: dict[str, Any], name: str, value: Vector) -> Vector:
    mean = sum(value) / len(value)
    spread = math.sqrt(sum((x - mean) ** 2 for x in value) / len(value) + 1e-6)
    scale, shift = weights[f"{name}.weight"], weights.get(f"{name}.bias", [0.0] * len(value))
    return [(x - mean) / spread * w + b for x, w, b in zip(value, scale, shift, strict=True)]


def restated(
    module: nn.Module, features: Tensor, tokens: Tensor, seen: list[bool], there: list[bool]
) -> tuple[list[Vector], list[int]]:
    """The token of each group of one crop, and the group of each patch (-1: of none)."""
    weights = {name: w.double().tolist() for name, w in module.state_dict().items()}
    semantic = tokens.double().tolist()
    asking = [
        linear(weights, "grouping.queries.1", normed(weights, "grouping.queries.0", one))
        for one in semantic
    ]
    group, given_by = [], []
    for patch, counts in zip(features.double().tolist(), seen, strict=True):
        key = linear(weights, "grouping.keys.1", normed(weights, "grouping.keys.0", patch))
        given_by.append(linear(weights, "grouping.values", patch))
        scores = {m: dot(query, key) for m, query in enumerate(asking) if there[m]}
        group.append(max(scores, key=lambda m: (scores[m], -m)) if counts else -1)
    out = []
    for m, token in enumerate(semantic):
        mine = [value for value, g in zip(given_by, group, strict=True) if g == m]
        made = []
        for c, (x, gain) in enumerate(zip(token, weights["grouping.gain"], strict=True)):
            mean = sum(value[c] for value in mine) / len(mine) if mine else 0.0
            made.append(gain * x + mean)
        inner = [
            0.5 * x * (1 + math.erf(x / math.sqrt(2)))
            for x in linear(weights, "projector.linear_1", made)
        ]
        out.append(linear(weights, "projector.linear_2", inner))
    return out, group
