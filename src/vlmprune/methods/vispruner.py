"""VisPruner: visual tokens that the encoder attends to, plus a remainder without duplicates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlmprune import select
from vlmprune.methods.bases.budgeted import WithBudget
from vlmprune.select.budget import Budget
from vlmprune.select.settings import check_choice, check_share
from vlmprune.views import EncoderView, Selection
from vlmprune.views.settings import Positions, Score


@dataclass(frozen=True)
class VisPruner(WithBudget):
    """Keep visual tokens before the language model, without training and without the question.

    Of the tokens to keep, a share is taken by the attention of the CLS token, the rest from
    what remains after near duplicates have been dropped, closest first, eight a round.

    Paper: "Beyond Text-Visual Attention: Exploiting Visual Cues for Effective Token Pruning in
    VLMs", arXiv 2412.01818 (ICCV 2025), section 3; chooses the same tokens as the authors' code
    does in float32. In half precision that code chooses others than itself in float32, for its
    rounds follow rounding; here a choice is made in float32 whatever the type of the model.

    Attributes:
        keep: visual tokens to keep: an int counts them, a float in (0, 1] is a fraction.
        important_ratio: share taken by attention, rounded down; 0.5 is the authors' default,
            0.75 is also used, 1 is FasterVLM.
        positions: "compact" renumbers the tokens (as the release does), "original" keeps gaps,
            "auto" takes what the model's config recommends, else the family's release.
        budget: "crop" gives each crop of an any-resolution image the same number of tokens (as
            the release does); "image" shares one number among all crops of an image. Of a video
            the frames are the crops: "frame" and "clip" mean the same, and need a video.

        score: "auto" takes the CLS token's attention, or what patches receive where there is no
            CLS token (as the release does); "pooling" that of a SigLIP tower's pooling head, in
            models that have it (not the release's).
        newlines: "keep" or "drop" (as the release does), by name only: whether newline tokens are
            kept, see `WithBudget`.

    Where it deviates from the release: budgets that make its lists odd or short work instead of
    failing; ties go to the lower index; similarities are float32 in any model; any-resolution
    images by default keep their newline tokens, which are not counted; padding that the host cuts
    away, which the release does not do, is never chosen, so a crop with fewer tokens than `keep`
    keeps all it has, and with newlines="drop" exactly crops · keep tokens are left wherever each
    crop has as many. A tower without a CLS token (SigLIP) is scored by the attention that its last
    layer's queries give, averaged.

    Shapes: attention [crops, N], features [crops, N, C] → kept [crops, N]. Memory: unit vectors of
    a crop's tokens that are not important and, on the CPU, at most 16 MiB of their similarities at
    a time; on a GPU all of them, which is quadratic: 1 GiB at 16,384 tokens.

    Raises:
        VlmpruneError: a value is out of range; one sentence names it.
    """

    keep: int | float
    important_ratio: float = 0.5
    positions: Positions = "auto"
    budget: Budget = "crop"
    score: Score = "auto"

    needs: ClassVar[str] = "CLS attention (else attention received), encoder features"
    stage: ClassVar[str] = "before the language model"
    paper: ClassVar[str] = "arXiv 2412.01818"
    text_agnostic: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("important_ratio", self.important_ratio, "0.5, the authors' default")
        check_choice("score", self.score, Score)

    def select(self, view: EncoderView) -> Selection:
        """Choose cells of all crops of a request."""
        attention, features = view.attention.flatten(), view.features.flatten(0, 1)
        important = torch.zeros_like(view.candidates).flatten()

        def chosen(cells: Tensor, keep: int) -> Tensor:
            count = select.count_important(keep, self.important_ratio)
            important[cells.gather(1, select.top_k(attention[cells], count))] = True
            return select.vispruner(attention[cells], features[cells], keep, self.important_ratio)

        kept = self.each(view, chosen)
        most = important.view(kept.shape)
        return Selection(kept, {"important": most, "diverse": kept & ~most})
