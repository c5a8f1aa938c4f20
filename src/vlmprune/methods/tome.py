"""ToMe: similar tokens merge inside the vision encoder, a few in each layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from vlmprune.errors import VlmpruneError
from vlmprune.methods.bases.budgeted import Budgeted
from vlmprune.select import bipartite
from vlmprune.select.budget import each_crop
from vlmprune.views import EncoderView, Inside, Selection


@dataclass(frozen=True)
class ToMe(Budgeted):
    """Merge similar tokens inside the vision encoder, without training and without the question.

    Between the attention and the MLP of each encoder layer, every second token looks for the most
    similar of the others by keys averaged over heads, and those with the closest partners merge
    into them, weighted by how many patches each is made of. Attention counts a merged token as
    often (the logarithm of its size is added to its logits). The CLS token never merges.

    Paper: "Token Merging: Your ViT But Faster", arXiv 2210.09461 (ICLR 2023), section 3; matching,
    order and weights as in the authors' code, in float32.

    Attributes:
        keep: tokens of a crop that are left: an int counts them, a float in (0, 1] is a fraction
            of its patches. The authors set the number r of tokens that merge in each layer
            instead; here r follows from `keep`, as even over the layers as can be. A layer halves
            the tokens at most, so with few layers a small `keep` is out of reach.
        positions: "compact" renumbers the tokens, "original" keeps gaps, "auto" takes what the
            model's config recommends, else what VisPruner's release does for the family.
        budget: "crop" (of a video "frame") alone, for crops do not merge with each other.
        newlines: "keep" or "drop", by name only: whether newline tokens are kept, see `WithBudget`.

    Where it deviates from the release: it merges up to the layer whose output the language model
    gets, not in the last one, and spreads r so that exactly `keep` tokens are left. Merging does
    not know what the host cuts away afterwards: padding merges too, and a merged token all of
    whose patches are cut away is gone, so that any-resolution images may keep fewer. A merged
    token stands where the first of its patches did. Where a host makes one visual token of several
    patches, these merge together, each into the one at its own place in the other visual token, by
    their keys put end to end. Sums are float32 in any model, and ties go to the lower index. Towers
    of CLIP, SigLIP, DINOv2 and InternVL with attention by SDPA or eager; other towers, and models
    that blend neighbouring patches, are refused.

    Shapes: keys [crops, tokens, D] of each layer → kept [crops, N]. Builds a square matrix of a
    crop's tokens in each layer.

    Raises:
        VlmpruneError: a value is out of range or out of reach; one sentence names it.
    """

    needs: ClassVar[str] = "encoder keys; layers of CLIP, SigLIP, DINOv2 or InternVL"
    stage: ClassVar[str] = "inside the vision encoder"
    paper: ClassVar[str] = "arXiv 2210.09461"
    text_agnostic: ClassVar[bool] = True

    acts = "merging"
    instead = "choose a method that acts after it, such as VisPruner"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not each_crop(self.budget):
            raise VlmpruneError(
                f"budget={self.budget!r} is not for ToMe, which merges within a crop; use "
                "budget='crop', or 'frame' for videos."
            )

    def inside(self, grid: tuple[int, int], layers: int) -> Inside:
        """Spread what is to merge over the encoder layers."""
        patches = grid[0] * grid[1]
        keep = self.kept_of(patches)
        merges = bipartite.schedule(patches, keep, layers)
        if merges is None:
            fewest = bipartite.least(patches, layers)
            raise VlmpruneError(
                f"keep={self.keep!r} asks for {keep} of {patches} tokens, but {layers} encoder "
                f"layers that merge half of them at most leave {fewest}; use keep={fewest} or more."
            )
        words = f"keys of encoder layers 0 to {layers - 1}"
        return Inside(merges, words=words if any(merges) else "nothing merged")

    def select(self, view: EncoderView) -> Selection:
        """One cell for each merged token."""
        if view.shared is None:
            return Selection(view.candidates, {})
        rank = torch.arange(view.shared.shape[1], device=view.shared.device)
        kept, members = bipartite.representatives(view.shared, view.candidates, rank)
        size = torch.zeros_like(view.shared)
        size.scatter_add_(1, view.shared, view.candidates.long())
        merged = kept & (size.gather(1, view.shared) > 1)
        return Selection(kept, {"merged": merged, "single": kept & ~merged}, members=members)
