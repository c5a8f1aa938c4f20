"""One prompt at whose end each layer's cache changes: where its text and its images stand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from vlmprune.hosts.attention import AttentionCall
from vlmprune.hosts.contract import Reached
from vlmprune.method import Method
from vlmprune.report import Report
from vlmprune.runtime.cache.binding import Shown
from vlmprune.runtime.decoder.rows import visual_places
from vlmprune.runtime.geometry import VisualColumns
from vlmprune.runtime.timer import Seconds


class PromptEnd:
    """One prompt under a method that acts on caches.

    Attributes:
        spent: time on it.
        done: whether the prompt is complete.
    """

    def __init__(self, method: Method, mask: Tensor, visual: VisualColumns) -> None:
        """Prepare the end of a prompt.

        Args:
            method: decides what becomes of each layer.
            mask: [B, S] columns of the prompt, those that a cache holds included; 0 is padding.
            visual: the visual tokens that came with this prompt.
        """
        self.method, self.mask, self.columns = method, mask != 0, mask.shape[1]
        self.spent = Seconds()
        self.done = False
        # Columns of the visual tokens first, in order; where a row has fewer, anything.
        self.places, _ = visual_places(visual.visual, visual.longest)
        self.images = visual.images.gather(1, self.places)
        self.counts, self.visual = visual.counts, visual.visual
        # Layers whose end was reached.
        self.reached = Reached()

    def check_cut(self, model: Any, due: Sequence[int]) -> None:
        """Refuse a prompt of which a layer's cache was not cut.

        Args:
            model: the host.
            due: the decoder layers that were to be cut.

        Raises:
            ContractError: one was not.
        """
        self.reached.check(
            model, due, "kept the whole prompt, for it is not in the cache that was to be cut"
        )

    def due(self, length: int) -> bool:
        """Whether a layer of that many columns has seen the whole prompt."""
        return length == self.columns

    def attended(self, shown: Shown, call: AttentionCall) -> Tensor | None:
        """[B, T] bool: the columns shown among which the layer attends; None for all."""
        return None

    def cut(self, shown: Shown, call: AttentionCall) -> None:
        """Change the layer, which is due."""
        raise NotImplementedError

    def reported(self, report: Report, numbers: list[Tensor]) -> Report:
        """The report of a call whose prompt is done.

        Args:
            report: so far.
            numbers: as in `LayerReport`.
        """
        raise NotImplementedError


def repeated(tensor: Tensor, times: int) -> Tensor:
    """Each sample so often."""
    return tensor if times == 1 else tensor.repeat_interleave(times, dim=0)
