"""VisionZip: dominant visual tokens, and contextual ones that the rest is merged into."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from vlmprune.methods.bases.budgeted import Budgeted
from vlmprune.select import clusters
from vlmprune.select.settings import check_share
from vlmprune.views import EncoderView, Merge, Reads, Selection


@dataclass(frozen=True)
class VisionZip(Budgeted):
    """Keep what the CLS token attends to most, and merge the rest into a few contextual tokens.

    Contextual tokens start from tokens at even distances among the rest; each of the others goes
    to the one whose key is nearest. A contextual token is its start plus the mean of what went
    there, and comes behind the dominant ones; where an image is cut into crops, behind those of all
    crops, as in the release, the view of the whole image coming first and by itself.

    Paper: "VisionZip: Longer is Better but Not Necessary in Vision Language Models",
    arXiv 2412.04467, section 3; the rule is that of the authors' code, in float32.

    Attributes:
        keep: visual tokens to keep, both kinds together: an int counts them, a float in (0, 1] is
            a fraction.
        positions: "compact" renumbers the tokens (as the release does), "original" keeps gaps,
            "auto" takes what the model's config recommends, else the family's release.
        budget: "crop" gives each crop the same number of tokens (as the release does), "image"
            shares one number among all crops of an image; of a video "frame" and "clip".
        contextual_ratio: share of `keep` that is contextual, rounded down; 10 of 64 is the
            authors' setting. At 0 what is not dominant is lost.
        newlines: "keep" or "drop" (as the release does), by name only: whether newline tokens are
            kept, see `WithBudget`.

    Where it deviates from the release: its CLS token, one of its 54 dominant ones, is not a visual
    token of the host, so that 54 patches stand there; newline tokens are by default kept, among the
    dominant tokens, and not counted, where the release has none; with keep=1.0 nothing is merged
    or moved; ties go to the lower index; sums are float32; an encoder without a CLS token is scored
    by the attention that patches receive.

    Shapes: attention [crops, N], keys [crops, N, D] → kept [crops, N] and a merge plan.

    Raises:
        VlmpruneError: a value is out of range; one sentence names it.
    """

    contextual_ratio: float = 10 / 64

    needs: ClassVar[str] = "CLS attention (else attention received), keys of the feature layer"
    stage: ClassVar[str] = "before the language model"
    paper: ClassVar[str] = "arXiv 2412.04467"
    text_agnostic: ClassVar[bool] = True
    merges: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        advice = f"{10 / 64}, the authors' 10 of 64"
        check_share("contextual_ratio", self.contextual_ratio, advice)

    def reads(self, depth: int, feature: int) -> Reads:
        """Keys of the feature layer."""
        return Reads(keys=feature)

    def select(self, view: EncoderView) -> Selection:
        """Choose cells of all crops of a request, and what they are made of."""
        assert view.keys is not None
        dominant = torch.zeros_like(view.candidates).flatten()
        contextual = torch.zeros_like(dominant)
        members = torch.full_like(dominant, -1, dtype=torch.long)
        into, source, weight = [], [], []
        for cells in view.groups(self.budget):
            n = cells.shape[1]
            keep = self.kept_of(n)
            # Rounded down, with room for the error of ratios such as 0.29.
            merged = 0 if keep == n else int(keep * self.contextual_ratio + 1e-9)
            attention, keys = view.attention.flatten()[cells], view.keys.flatten(0, 1)[cells]
            plan = clusters.visionzip(attention, keys, keep, merged)
            dominant[cells.gather(1, plan.dominant)] = True
            contextual[cells.gather(1, plan.contextual)] = True
            owned = cells.gather(1, plan.owner.clamp(min=0))
            members[cells] = torch.where(plan.owner >= 0, owned, -1)
            flat = cells.flatten()
            into.append(flat[plan.entries.into])
            source.append(flat[plan.entries.source])
            weight.append(plan.entries.weight)
        shape = view.candidates.shape
        kept = (dominant | contextual).view(shape)
        roles = {"important": dominant.view(shape), "merged": contextual.view(shape)}
        merge = Merge(torch.cat(into), torch.cat(source), torch.cat(weight)) if into else None
        if merge is None or not len(merge.into):
            return Selection(kept, roles)
        return Selection(kept, roles, merge, members.view(shape), roles["merged"])
