"""FoPru: the visual tokens, or grid rows, of most patch-to-patch attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from vlmprune import select
from vlmprune.errors import VlmpruneError
from vlmprune.methods.bases.budgeted import Budgeted
from vlmprune.select import scoring
from vlmprune.select.budget import each_crop
from vlmprune.select.settings import check_choice
from vlmprune.views import EncoderView, Reads, Selection

# What is kept as a whole: a token, or a row of the grid.
Choose = Literal["rank", "row"]


@dataclass(frozen=True)
class FoPru(Budgeted):
    """Keep the visual tokens that matter most among patches, singly or by whole grid rows.

    Significance is the mean attention that a patch receives from the others, or that it gives
    them: of the two maps, for each crop the one that varies more.

    Paper: "FoPru: Focal Pruning for Efficient Large Vision-Language Models", arXiv 2411.14164,
    section 3. No released code was to hand; the rule was read in a port (HydraInfer), so the
    choice between the two maps and the rounding are at second hand.

    Attributes:
        keep: visual tokens to keep: an int counts them, a float in (0, 1] is a fraction, rounded
            down. By rows, as many whole rows as fit into that.
        positions: "compact" renumbers the tokens, "original" keeps gaps, "auto" takes what the
            model's config recommends, else what VisPruner's release does for the family.
        budget: "crop" gives each crop the same number of tokens, "image" shares one number among
            all crops of an image (not by rows); of a video "frame" and "clip".
        choose: "rank" keeps the most significant tokens, "row" the grid rows of the largest sum,
            each as a whole. "rank" by default is our choice, the paper has both.
        newlines: "keep" or "drop", by name only: whether newline tokens are kept, see `WithBudget`.

    Where it deviates from the paper: grids need not be square, and of crops that the host unpads
    rows, sums and variances are of the tokens that are left; of equal variances attention received
    counts; a crop smaller than the others keeps one row at least.

    Shapes: received and given [crops, N] → kept [crops, N].

    Raises:
        VlmpruneError: a value is out of range, or the budget less than one row; one sentence
            names it.
    """

    choose: Choose = "rank"

    needs: ClassVar[str] = "patch-to-patch attention of the feature layer; by rows, a grid"
    stage: ClassVar[str] = "before the language model"
    paper: ClassVar[str] = "arXiv 2411.14164"
    text_agnostic: ClassVar[bool] = True
    attends: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("choose", self.choose, Choose)
        if self.choose == "row" and not each_crop(self.budget):
            raise VlmpruneError(
                f"budget={self.budget!r} does not go with choose='row', as crops have their own "
                "rows; use budget='crop' or choose='rank'."
            )

    def reads(self, depth: int, feature: int) -> Reads:
        """Attention among patches in the feature layer."""
        return Reads(patches=feature)

    def kept_of(self, available: int) -> int:
        """How many of so many tokens are kept; fractions are rounded down."""
        if isinstance(self.keep, int):
            return min(self.keep, available)
        return max(1, int(self.keep * available + 1e-9))

    def select(self, view: EncoderView) -> Selection:
        """Choose cells of all crops of a request."""
        assert view.received is not None and view.given is not None
        scores = scoring.most_varied(view.received, view.given, view.candidates)
        if self.choose == "row":
            kept = self._rows(view, scores)
        else:
            flat = scores.flatten()
            kept = self.each(view, lambda cells, keep: select.top_k(flat[cells], keep))
        return Selection(kept, {"important": kept})

    def _rows(self, view: EncoderView, scores: torch.Tensor) -> torch.Tensor:
        if len(view.grids) != len(view.images):
            raise VlmpruneError("choose='row' needs the grids of crops; use choose='rank'.")
        device = scores.device
        columns = torch.tensor([columns for _, columns in view.grids], device=device)
        counts = scoring.row_counts(view.candidates, columns)
        rows, tokens = (counts > 0).sum(dim=1), counts.sum(dim=1)
        # In whole numbers where it can be: keep · rows / tokens, rounded down.
        if isinstance(self.keep, int):
            fits = tokens.clamp(max=self.keep) * rows // tokens.clamp(min=1)
        else:
            fits = (rows.double() * self.keep + 1e-9).floor().long()
        if not bool((fits > 0).any()):
            raise VlmpruneError(
                f"keep={self.keep} is less than one row of the grid ({int(counts.max())} of "
                f"{int(tokens.max())} tokens); keep more, or use choose='rank'."
            )
        return scoring.whole_rows(scores, view.candidates, columns, fits.clamp(min=1))
