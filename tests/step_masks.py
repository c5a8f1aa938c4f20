"""The reference for caches that are read in part: the full cache, masked anew at each step.

What each step read is taken from the report; that nothing else was read is what `masking` shows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from masked import masking
from vlmprune.report import Reading, StepRead

Masks = dict[int, Tensor]


def mask_of(step: StepRead, visual: Tensor, columns: Tensor) -> Masks:
    """What a step saw of the prompt, by layer [B, H, L] bool.

    Args:
        step: what it read.
        visual: [B, L] bool; the prompt's visual tokens, as the step's rows have them.
        columns: [B, V] their columns, in the cache's order.
    """
    found = {}
    for layer, index in step.index.items():
        rows, heads, _ = index.shape
        mask = (~visual)[:, None].repeat(1, heads, 1)
        for row in range(rows):
            for head in range(heads):
                own = index[row, head]
                read = columns[row, own[own >= 0].long()]
                assert bool(visual[row, read].all())
                mask[row, head, read] = True
        found[layer] = mask
    return found


def masks_of(reading: Reading, visual: Tensor, cache: Any) -> list[Masks]:
    """What each step saw, one after the other.

    Args:
        reading: of the call.
        visual: [B, L] bool; the visual tokens of the request's rows.
        cache: that was read.
    """
    columns = cache.layers[reading.layers[0]].prefix.columns
    out = []
    for step in reading.steps:
        rows = len(next(iter(step.index.values())))
        wide = visual.repeat_interleave(rows // len(visual), dim=0)
        # A beam search hands out fewer rows than it had.
        own = columns[:: len(columns) // len(visual)].repeat_interleave(rows // len(visual), dim=0)
        out.append(mask_of(step, wide, own))
    return out


def exchanged(masks: list[Masks], visual: Tensor) -> list[Masks]:
    """The same numbers of visual tokens, but others."""
    out = []
    for step in masks:
        changed = {}
        for layer, mask in step.items():
            own = visual.repeat_interleave(len(mask) // len(visual), dim=0)[:, None]
            moved = (mask & own).flip(2).roll(1, 2)
            changed[layer] = torch.where(own, moved, mask)
        out.append(changed)
    return out


class Current(dict[int, Tensor]):
    """The masks of one step after the other."""

    def __init__(self, masks: list[Masks]) -> None:
        super().__init__({0: torch.empty(0)})
        self.masks, self.step = masks, 0

    def get(self, layer: int, default: Any = None) -> Any:
        """A layer's mask in the step that is under way; None while a prompt is read."""
        if not 0 <= self.step < len(self.masks):
            return default
        return self.masks[self.step].get(layer, default)


@contextmanager
def masking_steps(built: Any, masks: list[Masks], before: int = 1) -> Iterator[None]:
    """Hide from each forward after the first `before` what the step read not."""
    current = Current(masks)
    current.step = -before

    def count(*_: Any) -> None:
        current.step += 1

    hook = built.register_forward_hook(count)
    try:
        with masking(built, current):
            yield
    finally:
        hook.remove()
