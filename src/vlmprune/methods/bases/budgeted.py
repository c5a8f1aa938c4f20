"""The bases of methods that keep a number of visual tokens before the language model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from vlmprune.pruner import Pruner
from vlmprune.select.budget import Budget, Newlines, check_budget, exceeds, kept_of, plain_keep
from vlmprune.select.settings import check_choice
from vlmprune.views import EncoderView
from vlmprune.views.settings import Positions


@dataclass(frozen=True)
class WithBudget(Pruner):
    """What a budget means, and its checks; subclasses implement `select`.

    Positional settings come in the order in which a method declares them, which is its own, `keep`
    first. A subclass may have `positions` and `budget`. `Budgeted` has both, in the usual order.

    Attributes:
        keep: visual tokens to keep.
        newlines: what becomes of the newline tokens that any-resolution models put between rows of
            patches (LLaVA-NeXT, LLaVA-OneVision; there behind a video, too): "keep" keeps all of
            them beside the budget, as the host has them; "drop" drops all, as the releases do, so
            that an image leaves exactly crops · keep tokens wherever each crop has `keep` left of
            what the host cuts away as padding. Nothing changes where there are none. By name only.
            Of chained methods one that drops them is enough.
    """

    keep: int | float | None
    newlines: Newlines = field(default="keep", kw_only=True)
    # Whether keep=None leaves the number to the method's own rule.
    finds_number: ClassVar[bool] = False
    added: ClassVar[Mapping[str, Any]] = {"newlines": "keep"}

    def __post_init__(self) -> None:
        if self.keep is not None or not self.finds_number:
            object.__setattr__(self, "keep", plain_keep(self.keep))  # type: ignore[arg-type]
        check_choice("positions", self.positions, Positions)
        check_choice("newlines", self.newlines, Newlines)
        check_budget(self.unit)

    def exceeds(self, available: int) -> bool:
        """Whether `keep` counts more tokens than there are."""
        return exceeds(self.keep, available)

    def kept_of(self, available: int) -> int:
        """How many of so many tokens are kept; a smaller crop keeps all it has."""
        assert self.keep is not None
        return kept_of(self.keep, available)

    def each(self, view: EncoderView, rule: Callable[[Tensor, int], Tensor]) -> Tensor:
        """Apply a rule to each unit of the budget.

        Args:
            view: the request.
            rule: (cells [B, n] of units of one size, how many to keep) → [B, keep] places in them.

        Returns:
            [crops, N] bool, the chosen cells.
        """
        kept = torch.zeros_like(view.candidates).flatten()
        for cells in view.groups(self.unit):
            chosen = rule(cells, self.kept_of(cells.shape[1]))
            kept[cells.gather(1, chosen)] = True
        return kept.view(view.candidates.shape)


@dataclass(frozen=True)
class Budgeted(WithBudget):
    """A budget as most methods have it; subclasses implement `select`.

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
