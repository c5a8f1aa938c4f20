"""Random visual tokens: a control that any method has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vlmprune import select
from vlmprune.methods.bases.budgeted import Budgeted
from vlmprune.select import scoring
from vlmprune.select.settings import check_whole
from vlmprune.views import EncoderView, Selection


@dataclass(frozen=True)
class RandomTokens(Budgeted):
    """Keep visual tokens at random: a control, what a method loses to is no better than chance.

    Every set of tokens is as likely as any other. Each crop draws its own, from `seed` and its
    content: another picture keeps other places, the same picture the same ones, whatever is in
    the batch and whatever was drawn before.

    Attributes:
        keep: visual tokens to keep: an int counts them, a float in (0, 1] is a fraction.
        positions: "compact" renumbers the tokens, "original" keeps gaps, "auto" takes what the
            model's config recommends, else what VisPruner's release does for the family.
        budget: "crop" gives each crop the same number of tokens, "image" shares one number among
            all crops of an image; of a video "frame" and "clip".
        seed: of the draw.
        newlines: "keep" or "drop", by name only: whether newline tokens are kept, see `WithBudget`.

    Shapes: kept [crops, N].

    Raises:
        VlmpruneError: a value is out of range; one sentence names it.
    """

    seed: int = 0

    needs: ClassVar[str] = "nothing"
    stage: ClassVar[str] = "before the language model"
    paper: ClassVar[str] = "control"
    text_agnostic: ClassVar[bool] = True
    attends: ClassVar[bool] = False
    blind: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("seed", self.seed, 0)

    def select(self, view: EncoderView) -> Selection:
        """Choose cells of all crops of a request."""
        scores = scoring.random_scores(view.features, self.seed)
        scores = scores.to(view.candidates.device).flatten()
        kept = self.each(view, lambda own, keep: select.top_k(scores[own], keep))
        return Selection(kept, {})
