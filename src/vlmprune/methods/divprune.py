"""DivPrune: visual tokens as far from each other as can be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from vlmprune import select
from vlmprune.methods.bases.budgeted import Budgeted
from vlmprune.select.budget import Budget
from vlmprune.views import EncoderView, Reads, Selection


@dataclass(frozen=True)
class DivPrune(Budgeted):
    """Keep visual tokens that are far from each other, whatever is attended to.

    Each next token is the one whose nearest chosen token is farthest, by 1 - cosine of the
    projected features; the first is the one farthest from its own nearest neighbour.

    Paper: "DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models",
    arXiv 2503.02175 (CVPR 2025), section 3; chooses the same tokens as the authors' code
    does in float32.

    Attributes:
        keep: visual tokens to keep: a float in (0, 1] is a fraction (rounded, as in the release,
            whose default is 0.098); an int, which is ours, counts the tokens of an image, all its
            crops together: 64 of an image of five crops leaves 64 of it, not 64 of each.
        positions: "compact" renumbers the tokens (as the release does), "original" keeps gaps,
            "auto" takes what the model's config recommends, else the family's release.
        budget: "image" shares one number among all crops of an image, as the release does; "crop",
            the default of vlmprune 0.1, gives each crop as many, and then compares tokens within
            the crop alone; of a video "clip" and "frame".
        newlines: "keep" or "drop", by name only: whether newline tokens are kept, see `WithBudget`.

    Where it deviates from the release: newline tokens are kept and not counted, or dropped, where
    the release chooses among them too; distances are float32 in any model; ties go to the lower
    index; every image of a batch is pruned, not the first alone; a token is never chosen twice.

    Shapes: projected [crops, N, D] → kept [crops, N].

    Raises:
        VlmpruneError: a value is out of range; one sentence names it.
    """

    budget: Budget = "image"

    needs: ClassVar[str] = "projected features"
    stage: ClassVar[str] = "before the language model"
    paper: ClassVar[str] = "arXiv 2503.02175"
    text_agnostic: ClassVar[bool] = True
    former: ClassVar[Mapping[str, Any]] = {"budget": "crop"}
    attends: ClassVar[bool] = False

    def reads(self, depth: int, feature: int) -> Reads:
        """The projected features."""
        return Reads(projected=True)

    def select(self, view: EncoderView) -> Selection:
        """Choose cells of all crops of a request."""
        assert view.projected is not None
        features = view.projected.flatten(0, 1)
        kept = self.each(view, lambda cells, keep: select.farthest_point(features[cells], keep))
        return Selection(kept, {"diverse": kept})
