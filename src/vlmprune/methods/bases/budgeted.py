"""The base of methods that keep a number of visual tokens before the language model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmprune.errors import VlmpruneError
from vlmprune.pruner import Pruner
from vlmprune.select.budget import Budget, check_budget, check_keep, resolve_keep
from vlmprune.views import EncoderView
from vlmprune.views.settings import Positions


@dataclass(frozen=True)
class Budgeted(Pruner):
    """A budget with its checks; subclasses implement `select`.

    Attributes:
        keep: visual tokens to keep: an int counts them, a float in (0, 1] is a fraction.
        positions: "compact" renumbers the tokens, "original" keeps gaps, "auto" takes what the
            model's config recommends, else what VisPruner's release does for the family.
        budget: what `keep` counts for: "crop", or "image" for all crops of an image together; of
            a video "frame" or "clip".

    Raises:
        VlmpruneError: a value is out of range; one sentence names it.
    """

    keep: int | float
    positions: Positions = "auto"
    budget: Budget = "crop"

    def __post_init__(self) -> None:
        check_keep(self.keep)
        if self.positions not in ("auto", "compact", "original"):
            raise VlmpruneError(
                f"positions={self.positions!r} is not known; use 'auto', 'compact' or 'original'."
            )
        check_budget(self.budget)

    def check(self, counts: list[int]) -> None:
        """Refuse a `keep` above the tokens of even the largest crop (or image)."""
        resolve_keep(self.keep, max(counts), self.budget)

    def kept_of(self, available: int) -> int:
        """How many of so many tokens are kept; a smaller crop keeps all it has."""
        if isinstance(self.keep, int) and self.keep > available:
            return available
        return resolve_keep(self.keep, available)

    def each(self, view: EncoderView, rule: Callable[[Tensor, int], Tensor]) -> Tensor:
        """Apply a rule to each unit of the budget.

        Args:
            view: the request.
            rule: (cells [B, n] of units of one size, how many to keep) → [B, keep] places in them.

        Returns:
            [crops, N] bool, the chosen cells.
        """
        kept = torch.zeros_like(view.candidates).flatten()
        for cells in view.groups(self.budget):
            chosen = rule(cells, self.kept_of(cells.shape[1]))
            kept[cells.gather(1, chosen)] = True
        return kept.view(view.candidates.shape)
