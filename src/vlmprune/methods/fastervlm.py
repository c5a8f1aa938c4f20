"""FasterVLM: the visual tokens that the encoder attends to most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vlmprune import select
from vlmprune.methods.bases.budgeted import Budgeted
from vlmprune.views import EncoderView, Selection


@dataclass(frozen=True)
class FasterVLM(Budgeted):
    """Keep the visual tokens that the CLS token attends to most, without training.

    What VisPruner chooses with important_ratio=1: no share is spent on diversity.

    Paper: "[CLS] Attention is All You Need for Training-Free Visual Token Pruning: Make VLM
    Inference Faster", the first version of arXiv 2412.01818, section 3.

    Attributes:
        keep: visual tokens to keep: an int counts them, a float in (0, 1] is a fraction.
        positions: "compact" renumbers the tokens, "original" keeps gaps, "auto" takes what the
            model's config recommends, else what VisPruner's release does for the family.
        budget: "crop" gives each crop the same number of tokens, "image" shares one number among
            all crops of an image; of a video "frame" and "clip".
        newlines: "keep" or "drop" (as the release does), by name only: whether newline tokens are
            kept, see `WithBudget`.

    Where it deviates from the release: as VisPruner does. Ties go to the lower index; padding that
    the host cuts away is never chosen, newline tokens are by default kept and not counted; a tower
    without a CLS token is scored by the attention that patches receive.

    Shapes: attention [crops, N] → kept [crops, N].

    Raises:
        VlmpruneError: a value is out of range; one sentence names it.
    """

    needs: ClassVar[str] = "CLS attention (else attention received)"
    stage: ClassVar[str] = "before the language model"
    paper: ClassVar[str] = "arXiv 2412.01818v1"
    text_agnostic: ClassVar[bool] = True

    def select(self, view: EncoderView) -> Selection:
        """Choose cells of all crops of a request."""
        scores = view.attention.flatten()
        kept = self.each(view, lambda cells, keep: select.top_k(scores[cells], keep))
        return Selection(kept, {"important": kept})
