"""One prompt whose rows are missing from decoder layers: what its method wants, what came of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from vlmprune.hosts.decoder import decoder_layers
from vlmprune.method import Method
from vlmprune.report import Report
from vlmprune.runtime.geometry import VisualColumns
from vlmprune.runtime.timer import Seconds
from vlmprune.views import Ask


@dataclass
class MissingRows:
    """A prompt whose visual tokens leave for good between decoder layers, or skip some layers.

    Attributes:
        method: decides which layers work on which of them.
        asks: what it wants to see where they leave, by layer.
        skips: the layers that they may skip, ascending; a method has these or `asks`.
        positions: whether layers renumber the rows that reach them.
        real: [B, S] bool; columns of the prompt, those of a cache included, that are no padding.
        visual: the visual tokens that came with this prompt.
        kept: by layer at whose input rows went, [B, S] bool; visual tokens that it worked on.
        into: by the same layers, where something was merged, [B, S] int64; the column that each
            visual token which did not go on went into, -1 for none.
        spent: time that scores and choice took.
        done: whether the prompt is through.
    """

    method: Method
    asks: Mapping[int, Ask]
    skips: tuple[int, ...]
    positions: Literal["compact", "original"]
    real: Tensor
    visual: VisualColumns
    kept: dict[int, Tensor] = field(default_factory=dict)
    into: dict[int, Tensor] = field(default_factory=dict)
    spent: Seconds = field(default_factory=Seconds)
    done: bool = False

    @property
    def rates(self) -> bool:
        """Whether raters are to be chosen, from the embedded prompt."""
        return any(ask.queries == "raters" for ask in self.asks.values())

    def followed(self, depth: int) -> set[int]:
        """The layers of a decoder of that depth that are to be followed while the prompt runs."""
        before = {min(self.asks) - 1} if self.asks else set()
        return {*lacking(self.asks, self.skips, depth), *before, *range(self.rates)}

    def reported(self, report: Report, model: Any, before: str) -> Report:
        """The report of a call, once its prompt is through.

        Args:
            report: of what went on before the language model.
            model: the host.
            before: the position policy there; "" if it got everything.
        """
        stages = {layer: self.visual.of_images(kept, False) for layer, kept in self.kept.items()}
        if not stages and not self.skips:
            return report
        positions: str = self.positions
        if before and self.skips:
            positions = before
        elif before and before != positions:
            positions = f"{before}, inside the language model {positions}"
        return report.with_rows(
            model.config,
            len(decoder_layers(model)),
            stages,
            [len(row) for row in self.visual.lengths],
            model.dtype,
            positions,
            self.spent.total,
            self._members(),
            back=bool(self.skips),
        )

    def _members(self) -> list[Tensor]:
        """For each image where its visual tokens are in the end, as `Report.members` has it.

        Returns:
            [n] int64 over the visual tokens that the image would have without any pruning; no
            tensors where nothing was merged.
        """
        if not self.into:
            return []
        visual = self.visual.visual
        columns = torch.arange(visual.shape[1], device=visual.device)
        now = columns.expand(visual.shape)
        for layer in sorted(self.kept):
            into = self.into.get(layer)
            step = torch.where(self.kept[layer], columns, -1 if into is None else into)
            now = torch.where(now >= 0, step.gather(1, now.clamp(min=0)), -1)
        number = self.visual.placed(self.visual.numbers)
        found = torch.where(now >= 0, number.gather(1, now.clamp(min=0)), -1)
        return self.visual.of_images(found, -1)


def lacking(asks: Mapping[int, Ask], skips: tuple[int, ...], depth: int) -> tuple[int, ...]:
    """The layers of a decoder of that depth that may lack rows, ascending.

    Args:
        asks: by layer at whose input tokens may leave for good.
        skips: layers that tokens may skip.
        depth: number of layers.
    """
    return tuple(sorted({*range(min(asks, default=depth), depth), *skips}))
