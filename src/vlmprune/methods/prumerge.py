"""PruMerge: attention's outliers, each with its nearest neighbours merged in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from vlmprune.errors import VlmpruneError
from vlmprune.methods.bases.budgeted import WithBudget
from vlmprune.select import clusters
from vlmprune.select.settings import check_choice, check_whole
from vlmprune.views import EncoderView, Merge, Reads, Selection
from vlmprune.views.settings import Positions

Heads = Literal["joined", "mean"]


@dataclass(frozen=True)
class PruMerge(WithBudget):
    """Keep tokens of outlying CLS attention, as many as there are, and merge others into them.

    A kept token is itself plus the attention-weighted sum of the tokens of nearest key. One more
    token, behind the others, is the attention-weighted sum of all that is not kept. Attention is
    one softmax over the queries and keys of all heads, put end to end, and keys are as long.

    Paper: "LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models",
    arXiv 2403.15388 (ICCV 2025), section 3; of an image it chooses and merges the same tokens as
    the authors' code, in float32.

    Attributes:
        keep: None, the authors' rule, keeps as many tokens as a crop has outliers. A number fixes
            the count instead, for comparisons at equal budget: an int counts tokens of each crop,
            the last one included, a float in (0, 1] is a fraction of them.
        plus: also keep tokens at even distances (PruMerge+, what the release runs), about three an
            outlier, so nearly all where a sixth or more are outliers. With False, PruMerge of the
            paper's first version.
        positions: "compact" renumbers the tokens (as the release does), "original" keeps gaps,
            "auto" takes what the model's config recommends, else the family's release.
        neighbours: how many tokens are merged into a kept one; 32 in the authors' code.
        heads: "joined" takes the queries and keys of all heads as one long vector, as the release
            does; "mean" averages attention and keys over the heads, which finds other outliers,
            and was the rule of vlmprune 0.1.
        newlines: "keep" or "drop", by name only: whether newline tokens are kept, see `WithBudget`.

    Where it deviates from the release: outliers are counted in each crop, not over a batch (with
    `plus` the release takes one image at a time); a crop without outliers keeps its most attended
    token, and one of so many that nothing lies between samples keeps all, instead of failing; kept
    tokens stay in raster order, where the release puts outliers first, the most attended before
    the others, and then the samples; `keep` is ours, and with `plus` gives a quarter to outliers
    and the rest to even distances; ties go to the lower index; an encoder without a CLS token is
    scored by the attention that patches receive.

    Shapes: attention [crops, N], keys [crops, N, H · D] → kept [crops, N] and a merge plan.

    Raises:
        VlmpruneError: a value is out of range; one sentence names it.
    """

    keep: int | float | None = None
    plus: bool = True
    positions: Positions = "auto"
    neighbours: int = 32
    heads: Heads = "joined"

    needs: ClassVar[str] = "CLS attention (else attention received) and keys of the last layer"
    stage: ClassVar[str] = "before the language model"
    paper: ClassVar[str] = "arXiv 2403.15388"
    text_agnostic: ClassVar[bool] = True
    attends: ClassVar[bool] = False
    merges: ClassVar[bool] = True
    finds_number: ClassVar[bool] = True
    former: ClassVar[Mapping[str, Any]] = {"plus": False, "heads": "mean"}
    added: ClassVar[Mapping[str, Any]] = {"newlines": "keep", "heads": "mean"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.plus, bool):
            raise VlmpruneError(f"plus={self.plus!r} is neither true nor false.")
        check_whole("neighbours", self.neighbours, 0)
        check_choice("heads", self.heads, Heads)

    def reads(self, depth: int, feature: int) -> Reads:
        """Attention and keys of the last layer."""
        if self.heads == "joined":
            return Reads(joined=depth - 1)
        return Reads(layers=(depth - 1,), keys=depth - 1)

    def select(self, view: EncoderView) -> Selection:
        """Choose cells of all crops of a request, and what they are made of."""
        if self.heads == "joined":
            attention, all_keys = view.joined, view.joined_keys
        else:
            # No stage of a chain can ask for a later layer than this one does.
            attention, all_keys = view.layers[max(view.layers)], view.keys
        assert attention is not None and all_keys is not None
        scores = attention.flatten()
        parts = {name: torch.zeros_like(view.candidates).flatten() for name in ("kept", "sampled")}
        last = torch.zeros_like(parts["kept"])
        members = torch.full_like(last, -1, dtype=torch.long)
        into, source, weight = [], [], []
        for cells in view.groups("crop"):
            n = cells.shape[1]
            keep = None if self.keep is None else self.kept_of(n)
            keys = all_keys.flatten(0, 1)[cells]
            plan = clusters.prumerge(scores[cells], keys, keep, self.plus, self.neighbours)
            for into_part, chosen in (
                (parts["kept"], plan.kept),
                (parts["sampled"], plan.sampled),
                (last, plan.residual),
            ):
                into_part[cells] = chosen
            owned = cells.gather(1, plan.owner.clamp(min=0))
            members[cells] = torch.where(plan.owner >= 0, owned, -1)
            flat = cells.flatten()
            into.append(flat[plan.entries.into])
            source.append(flat[plan.entries.source])
            weight.append(plan.entries.weight)
        shape = view.candidates.shape
        kept, sampled, last = (x.view(shape) for x in (parts["kept"], parts["sampled"], last))
        roles = {"important": kept & ~sampled & ~last, "diverse": sampled, "merged": last}
        merge = Merge(torch.cat(into), torch.cat(source), torch.cat(weight)) if into else None
        if merge is None or not len(merge.into):
            return Selection(kept, roles)
        return Selection(kept, roles, merge, members.view(shape), last)
