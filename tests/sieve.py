"""A method by which tokens skip layers, with routers that are fixed directions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlmprune.pruner import Pruner
from vlmprune.views import FrameView, Routed


def direction(layer: int, width: int) -> Tensor:
    """What a layer's router multiplies states by."""
    generator = torch.Generator().manual_seed(100 + layer)
    return torch.randn(width, generator=generator) / width**0.5


@dataclass(frozen=True)
class Sieve(Pruner):
    """Routes by fixed directions; a token's weight is its score."""

    keep: float = 0.2
    layers: tuple[int, ...] = (1, 3)
    weighted: bool = True

    def skips(self, depth: int) -> tuple[int, ...]:
        return self.layers

    def route(self, layer: int, view: FrameView) -> Routed:
        scores = view.hidden.float() @ direction(layer, view.hidden.shape[-1]) + 0.5
        kept = torch.zeros(scores.shape, dtype=torch.bool)
        for row, frames in enumerate(view.frames.tolist()):
            for frame in set(frames) - {-1}:
                places = [i for i, f in enumerate(frames) if f == frame]
                assert int(view.counts[row, frame]) == len(places)
                kept[row, best(scores[row], places, self.keep)] = True
        return Routed(kept, scores if self.weighted else None)


def best(scores: Tensor, places: list[int], keep: float) -> list[int]:
    """The places of the highest scores, a share of them, at least one."""
    count = max(1, int(keep * len(places) + 0.5))
    values = scores.tolist()
    return sorted(places, key=lambda i: (-values[i], i))[:count]
