"""EVS: the visual tokens of a video that changed since the frame before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from vlmprune import select
from vlmprune.methods.bases.budgeted import WithBudget
from vlmprune.select import scoring
from vlmprune.select.budget import Budget
from vlmprune.views import EncoderView, Reads, Selection
from vlmprune.views.settings import Positions


@dataclass(frozen=True)
class EVS(WithBudget):
    """Keep a video's first frame, and of the others what changed since the frame before.

    Change is 1 - cosine of the projected features to those of the same cell one frame earlier.
    Images pass whole: they have no frame before, and the rule says nothing of them.

    Paper: "Efficient Video Sampling: Pruning Temporally Redundant Tokens for Faster VLM
    Inference", arXiv 2510.14624; the rule is that of the authors' code in vLLM
    (vllm/multimodal/evs.py).

    Attributes:
        keep: what is kept of all tokens of a clip: a float in (0, 1] is a fraction, rounded down
            (1 - q for a pruning rate q), an int counts them. Never less than the first frame.
        positions: "compact" renumbers the tokens, "original" keeps gaps, "auto" takes what the
            model's config recommends, else what VisPruner's release does for the family. The
            release keeps M-RoPE positions and renumbers where there is no M-RoPE, which is what
            "auto" does for such models.
        newlines: "keep" or "drop", by name only: whether newline tokens are kept, see `WithBudget`.

    Where it deviates from the release: cosines are float32 in any model; newline tokens (by
    default) and CLS tokens of a frame are kept and not counted; after another method in a chain,
    what that has left of the first frame is kept.

    Shapes: projected [crops, N, D] → kept [crops, N].

    Raises:
        VlmpruneError: a value is out of range; one sentence names it.
    """

    keep: int | float
    positions: Positions = "auto"

    # A clip is the unit, an image one of its own; no field, as there is nothing to choose.
    budget: ClassVar[Budget] = "image"
    needs: ClassVar[str] = "a video, projected features; images pass whole"
    stage: ClassVar[str] = "before the language model"
    paper: ClassVar[str] = "arXiv 2510.14624"
    text_agnostic: ClassVar[bool] = True
    attends: ClassVar[bool] = False

    def reads(self, depth: int, feature: int) -> Reads:
        """The projected features."""
        return Reads(projected=True)

    def select(self, view: EncoderView) -> Selection:
        """Choose cells of all frames of a request."""
        assert view.projected is not None
        device = view.candidates.device
        images = torch.tensor(view.images, device=device)
        videos = torch.tensor([bool(view.videos) and view.videos[i] for i in view.images])
        moving = view.candidates & videos.to(device)[:, None]
        scores = scoring.change(view.projected, images)
        first = scores.isposinf() & moving
        kept = (view.candidates & ~moving).flatten()
        cells, scores = moving.flatten().nonzero()[:, 0], scores.flatten()
        sizes = view.narrow(moving).counts(self.budget)
        least = view.narrow(first).counts(self.budget)
        for clip, size, one in zip(cells.split(sizes), sizes, least, strict=True):
            keep = max(one, self.kept_of(size))
            kept[clip[select.top_k(scores[None, clip], keep)[0]]] = True
        kept = kept.view(view.candidates.shape)
        return Selection(
            kept, {"whole": kept & ~moving, "first": first, "changed": kept & moving & ~first}
        )

    def kept_of(self, available: int) -> int:
        """How many of so many tokens `keep` stands for; fractions are rounded down."""
        if isinstance(self.keep, int):
            return min(self.keep, available)
        # With room for the error of fractions such as 0.29.
        return int(self.keep * available + 1e-9)
