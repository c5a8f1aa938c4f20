"""Random visual tokens: a control that any method has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vlmprune import scoring, select
from vlmprune.budgeted import Budgeted
from vlmprune.errors import VlmpruneError
from vlmprune.views import EncoderView, Selection


@dataclass(frozen=True)
class RandomTokens(Budgeted):
    """Keep visual tokens at random: a control, what a method loses to is no better than chance.

    Every set of tokens is as likely as any other. They are drawn on the CPU from `seed` for each
    request anew: the same request keeps the same tokens, on any device, whatever was drawn before.
    Two crops of a request are drawn independently. Average over several seeds.

    Attributes:
        keep: visual tokens to keep: an int counts them, a float in (0, 1] is a fraction.
        positions: "compact" renumbers the tokens, "original" keeps gaps, "auto" takes what the
            model's config recommends, else what VisPruner's release does for the family.
        budget: "crop" gives each crop the same number of tokens, "image" shares one number among
            all crops of an image; of a video "frame" and "clip".
        seed: of the draw.

    Shapes: kept [crops, N].

    Raises:
        VlmpruneError: a value is out of range; one sentence names it.
    """

    seed: int = 0

    needs: ClassVar[str] = "nothing"
    stage: ClassVar[str] = "before the language model"
    paper: ClassVar[str] = "control"
    text_agnostic: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise VlmpruneError(f"seed={self.seed!r} is not a whole number of 0 or more.")

    def select(self, view: EncoderView) -> Selection:
        """Choose cells of all crops of a request."""
        crops, cells = view.candidates.shape
        order = scoring.random_order(crops, cells, self.seed)
        scores = order.to(view.candidates.device).flatten()
        kept = self.each(view, lambda own, keep: select.top_k(scores[own], keep))
        return Selection(kept, {})
