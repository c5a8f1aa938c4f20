"""SparseVLM: visual tokens that the words about the image look at, in three stages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlmprune.errors import VlmpruneError
from vlmprune.methods.bases.layered import Layered, check_layers
from vlmprune.select import row_rules
from vlmprune.select.settings import is_share
from vlmprune.views import Ask, Rows, RowView

# The authors' code, made for 576 visual tokens and 32 decoder layers: after which layers it
# prunes, and how many tokens it leaves there by the number asked for. The first and last line are
# ours, so that every budget lies between two.
DEPTH, TOKENS = 32, 576
AFTER = (2, 6, 15)
LEFT = {
    0: (0, 0, 0),
    64: (66, 30, 17),
    96: (238, 48, 26),
    128: (303, 110, 36),
    192: (300, 200, 110),
    TOKENS: (TOKENS, TOKENS, TOKENS),
}


@dataclass(frozen=True)
class SparseVLM(Layered):
    """Drop visual tokens after three decoder layers, by the attention of the words that matter.

    Raters are the text tokens behind the image that its embedded tokens are most like. A visual
    token's score is the attention that it gets from the raters in the layer just passed, averaged
    over raters and heads. Of the dropped, the best are clustered, and each cluster's mean goes on
    as one row behind the image's own.

    Paper: "SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference",
    arXiv 2410.04417, section 3; counts and layers by the authors' code (version 1), in float32.

    Attributes:
        keep: visual tokens of each image, averaged over the decoder layers: an int counts them, a
            float in (0, 1] is a fraction. The authors' settings are 192, 128, 96 and 64 of 576.
        positions: "compact" renumbers the tokens that go on, as the release does; "original" keeps
            gaps; "auto" takes what the model's config recommends, else "compact".
        recycle: share of the dropped that is clustered; 0.3 is the authors', 0 drops them all.

    The authors' numbers after layers 2, 6 and 15 of 32 are 300, 200 and 110 for 192; 303, 110 and
    36 for 128; 238, 48 and 26 for 96; 66, 30 and 17 for 64. Merged rows come on top, and the layers
    before the first stage are whole. What follows is our reading: other budgets lie on straight
    lines between these, and to all tokens above, so that the mean over 32 layers stays what was
    asked for, as the authors count it (the layer that is pruned after counts as pruned); below
    64 of 576 the numbers fall in proportion, and as the first layers stay whole the mean stays
    above `keep`. Images of another size take the same fractions; models of another depth the same
    fractions of their depth, rounded, on layers that differ, where the mean is near `keep` only;
    stages that find no layer are left out.

    Where it deviates from the release: every image of a prompt has its own budget; densities get
    no random noise, so that runs repeat, and equal ones go by index; where nothing is to be
    dropped nothing is (the release always drops one token); a prompt without words behind its
    image takes all words as raters. Clustering takes some matrices of (0.3 · N)² numbers.

    Shapes: attention [B, V], states [B, V, D] → kept [B, V], states [B, V, D].

    Raises:
        VlmpruneError: a value is out of range; one sentence names it.
    """

    recycle: float = 0.3

    needs: ClassVar[str] = "attention of text tokens in three decoder layers"
    paper: ClassVar[str] = "arXiv 2410.04417"
    released = "compact"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_share(self.recycle):
            raise VlmpruneError(f"recycle={self.recycle!r} is not a share from 0 to 1.")

    def asks(self, depth: int) -> Mapping[int, Ask]:
        """The layers behind the three, by the attention of the raters in the ones before."""
        check_layers(depth, 2, "SparseVLM")
        return {layer: Ask("previous", "raters") for layer in stages(depth)}

    def raters(self, view: RowView) -> Tensor:
        """The text tokens behind the image that it is most like."""
        behind = view.text & view.after
        allowed = torch.where(behind.any(dim=1, keepdim=True), behind, view.text)
        return row_rules.text_raters(view.hidden, view.images, view.text_hidden, allowed)

    def drop(self, layer: int, view: RowView) -> Rows:
        """Keep the best rated tokens and some merged rows."""
        assert view.attention is not None
        keep = left_of(self.keep, stages(view.depth).index(layer), view.before)
        kept = row_rules.most_attended(view.attention, view.images, keep.minimum(view.counts))
        if not self.recycle:
            return Rows(kept)
        states, merged, into = row_rules.recycle(
            view.hidden,
            view.images,
            view.attention,
            (view.images >= 0) & ~kept,
            self.recycle,
            view.counts.shape[1],
        )
        return Rows(kept | merged, states, merged, into)


def stages(depth: int) -> list[int]:
    """The decoder layers that see fewer tokens than the one before: 3, 7 and 16 of 32."""
    found: list[int] = []
    for after in AFTER:
        least = found[-1] + 1 if found else 1
        found.append(max(least, round((after + 1) * depth / DEPTH)))
    return [layer for layer in found if layer < depth]


def left_of(keep: int | float, stage: int, before: Tensor) -> Tensor:
    """[B, I] how many of each image's tokens [B, I] a stage leaves, without merged rows."""
    whole = before.clamp(min=1)
    if isinstance(keep, int):
        asked = TOKENS * (whole.clamp(max=keep) / whole)
    else:
        asked = torch.full_like(before, TOKENS * keep, dtype=torch.float32)
    knots = asked.new_tensor(list(LEFT))
    left = asked.new_tensor([counts[stage] for counts in LEFT.values()])
    above = torch.bucketize(asked, knots).clamp(min=1)
    low, high = knots[above - 1], knots[above]
    part = (asked - low) / (high - low)
    return row_rules.share((left[above - 1] * (1 - part) + left[above] * part) / TOKENS, before)
