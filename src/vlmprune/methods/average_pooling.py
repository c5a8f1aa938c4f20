"""Average pooling of the grid: a control that any method has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from vlmprune.methods.bases.budgeted import Budgeted
from vlmprune.methods.uniform import columns_of, per_crop
from vlmprune.select import clusters, scoring
from vlmprune.select.settings import check_choice
from vlmprune.views import EncoderView, Merge, Selection

# What is pooled: what the encoder makes, or what the projector makes of that.
Where = Literal["features", "projected"]


@dataclass(frozen=True)
class AveragePooling(Budgeted):
    """Replace blocks of the grid by their mean: a control that looks at no feature.

    The grid is cut into at most `keep` blocks, as nearly square and as small as can be: the longer
    side of a block is as short as the budget allows, and of such grids the one of most blocks is
    taken. Blocks do not overlap, and their sides differ by one cell at most. The mean stands in
    the place of the block's middle cell.

    Attributes:
        keep: the most visual tokens to keep: an int counts them, a float in (0, 1] is a fraction.
            The report counts what came of it: 121 of 128 on a square grid, but all of 64.
        positions: "compact" renumbers the tokens, "original" keeps gaps, "auto" takes what the
            model's config recommends, else what VisPruner's release does for the family.
        budget: "crop" gives each crop the same number of tokens; "image" shares one number among
            all crops of an image in proportion to their tokens; of a video "frame" and "clip".
        where: "features" pools what the encoder makes, before the projector; "projected" what the
            projector makes.
        newlines: "keep" or "drop", by name only: whether newline tokens are kept, see `WithBudget`.

    Crops that the host unpads have their own, smaller grid. Of a block that holds tokens which
    another method of a chain has dropped, the others are averaged.

    Shapes: kept [crops, N] and a merge plan.

    Raises:
        VlmpruneError: a value is out of range; one sentence names it.
    """

    where: Where = "features"

    needs: ClassVar[str] = "a grid"
    stage: ClassVar[str] = "before the language model"
    paper: ClassVar[str] = "control"
    text_agnostic: ClassVar[bool] = True
    attends: ClassVar[bool] = False
    merges: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("where", self.where, Where)

    def select(self, view: EncoderView) -> Selection:
        """Choose blocks of all crops of a request."""
        columns = columns_of(view)
        boxes = scoring.grid_boxes(view.candidates, columns)
        shapes = []
        found = zip(view.counts("crop"), per_crop(self, view), boxes.tolist(), strict=True)
        for n, keep, (_, _, rows, across) in found:
            if keep == n:
                shapes.append((rows, across))
            else:
                shapes.append(scoring.pooled_grid(rows, across, keep) if keep else (0, 0))
        shape = torch.tensor(shapes, device=columns.device).view(-1, 2)
        block = clusters.blocks(view.candidates, columns, boxes, shape)
        owner, entries = clusters.pooled(block, columns)
        cells = torch.arange(owner.shape[1], device=owner.device)
        kept = owner == cells
        if not len(entries.into):
            return Selection(kept, {})
        start = torch.arange(len(owner), device=owner.device)[:, None] * owner.shape[1]
        members = torch.where(owner >= 0, owner + start, -1)
        merge = Merge(*entries, projected=self.where == "projected")
        return Selection(kept, {"merged": kept}, merge, members)
