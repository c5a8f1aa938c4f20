"""The base of methods that keep a number of visual tokens inside the language model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vlmprune.errors import VlmpruneError
from vlmprune.pruner import Pruner
from vlmprune.select import row_rules
from vlmprune.select.budget import Budget, exceeds, plain_keep
from vlmprune.select.settings import check_choice
from vlmprune.views.settings import Positions


@dataclass(frozen=True)
class Layered(Pruner):
    """A budget for each image inside the language model; subclasses implement `asks` and `drop`.

    Attributes:
        keep: visual tokens of each image to keep: an int counts them, a float in (0, 1] is a
            fraction of those that reached the first layer.
        positions: "compact" renumbers the tokens that go on, "original" keeps gaps, "auto" takes
            what the model's config recommends, else what the method's release does.

    Raises:
        VlmpruneError: a value is out of range; one sentence names it.
    """

    keep: int | float
    positions: Positions = "auto"

    budget: ClassVar[Budget] = "image"
    stage: ClassVar[str] = "inside the language model"
    text_agnostic: ClassVar[bool] = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep", plain_keep(self.keep))
        check_choice("positions", self.positions, Positions)

    def exceeds(self, available: int) -> bool:
        """Whether `keep` counts more tokens than there are."""
        return exceeds(self.keep, available)

    def kept_of(self, before: Tensor) -> Tensor:
        """[B, I] how many of each image `keep` stands for; a smaller image keeps all it has."""
        if isinstance(self.keep, int):
            return before.clamp(max=self.keep)
        return row_rules.share(self.keep, before)


def check_layers(depth: int, needed: int, who: str) -> None:
    """Refuse a language model that is too shallow.

    Raises:
        VlmpruneError: it has fewer decoder layers than needed.
    """
    if depth < needed:
        raise VlmpruneError(
            f"{who} needs {needed} decoder layers or more and this model has {depth}; prune before "
            "the language model."
        )
