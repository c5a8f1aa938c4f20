"""P-Sigmoid: a retention rate that falls with depth along a sigmoid."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from vlmprune.errors import VlmpruneError
from vlmprune.methods.bases.layered import Layered, check_layers
from vlmprune.methods.gsearch import falling
from vlmprune.select import row_rules, schedule
from vlmprune.select.settings import is_number
from vlmprune.views import Ask, Rows, RowView


@dataclass(frozen=True)
class PSigmoid(Layered):
    """Drop visual tokens layer by layer, under one budget for all layers together.

    Layer i keeps the fraction r(i) = 1 / (1 + exp(k (i - α))) of each image. α is solved so that
    the mean of r is the budget; k says how steeply it falls. Tokens are ranked by the attention
    that they get in the layer before, and what is dropped is gone, so that the kept sets nest.

    Paper: "Accelerating Multimodal Large Language Models by Searching Optimal Vision Token
    Reduction", arXiv 2412.00556; there is no released code that we know of.

    Attributes:
        keep: mean over the decoder layers, but for layer 0, of the visual tokens of each image: an
            int counts them, a float in (0, 1] is a fraction.
        positions: "compact" renumbers the tokens that go on, "original" keeps gaps, "auto" takes
            what the model's config recommends, else "original" (our reading).
        k: steepness, above 0. The paper optimises it; 0.5 is our reading, and `vlmprune search`
            finds a model's own.

    That layer 0 ranks nothing is the paper's: it is whole, does not count towards `keep`, and
    layer 1 is ranked by what it would itself attend to (our reading). So is the last prompt token
    as the one that is asked. A layer keeps one token of each image at least, rounding is to the
    nearest.

    Where it deviates from the paper: every image has its own budget; as layer 0 is not counted any
    budget can be met, and the mean over all layers is higher by up to one layer's share.

    Shapes: attention [B, V] → kept [B, V].

    Raises:
        VlmpruneError: a value is out of range; one sentence names it.
    """

    k: float = 0.5

    needs: ClassVar[str] = "attention of the last prompt token in every decoder layer"
    paper: ClassVar[str] = "arXiv 2412.00556"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_number(self.k) or not 0 < self.k < 1e6:
            raise VlmpruneError(f"k={self.k!r} is not a number above 0, up to a million.")

    def rates(self, depth: int, mean: float) -> tuple[float, ...]:
        """The schedule for a model of a depth, and a mean over its layers but for layer 0."""
        return schedule.sigmoid_rates(depth, float(mean), float(self.k))

    def asks(self, depth: int) -> Mapping[int, Ask]:
        """Every layer that is to keep less than the one before."""
        check_layers(depth, 2, "P-Sigmoid")
        # Of a number of tokens the rates are not known before the images are; they fall everywhere.
        return falling(self.rates(depth, 0.5 if isinstance(self.keep, int) else self.keep))

    def drop(self, layer: int, view: RowView) -> Rows:
        """Keep the layer's share of each image."""
        assert view.attention is not None
        if isinstance(self.keep, int):
            # The one look at the host: α is solved there, and remembered.
            means = [[min(1.0, self.keep / max(1, n)) for n in row] for row in view.before.tolist()]
            found = [[self.rates(view.depth, mean)[layer] for mean in row] for row in means]
            keep = row_rules.share(view.before.new_tensor(found, dtype=torch.float32), view.before)
        else:
            keep = row_rules.share(self.rates(view.depth, self.keep)[layer], view.before)
        keep = keep.minimum(view.counts)
        return Rows(row_rules.most_attended(view.attention, view.images, keep))
