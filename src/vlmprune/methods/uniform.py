"""A uniform grid of visual tokens: a control that any method has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from vlmprune.errors import VlmpruneError
from vlmprune.methods.bases.budgeted import Budgeted
from vlmprune.select import scoring
from vlmprune.select.budget import each_crop
from vlmprune.views import EncoderView, Selection


@dataclass(frozen=True)
class UniformGrid(Budgeted):
    """Keep visual tokens at even distances over the image: a control that looks at no feature.

    About √(keep · rows / columns) grid rows are used, at equal distances; the tokens are shared
    evenly among them and lie at equal distances within each. So every number of tokens can be had,
    and a perfect grid comes out where the number allows one.

    Attributes:
        keep: visual tokens to keep: an int counts them, a float in (0, 1] is a fraction.
        positions: "compact" renumbers the tokens, "original" keeps gaps, "auto" takes what the
            model's config recommends, else what VisPruner's release does for the family.
        budget: "crop" gives each crop the same number of tokens; "image" shares one number among
            all crops of an image in proportion to their tokens; of a video "frame" and "clip".
        newlines: "keep" or "drop", by name only: whether newline tokens are kept, see `WithBudget`.

    Crops that the host unpads have their own, smaller grid. Where the tokens that are left make no
    rectangle, as after another method in a chain, those at even distances in raster order are kept.

    Shapes: kept [crops, N].

    Raises:
        VlmpruneError: a value is out of range; one sentence names it.
    """

    needs: ClassVar[str] = "a grid"
    stage: ClassVar[str] = "before the language model"
    paper: ClassVar[str] = "control"
    text_agnostic: ClassVar[bool] = True
    attends: ClassVar[bool] = False

    def select(self, view: EncoderView) -> Selection:
        """Choose cells of all crops of a request."""
        columns = columns_of(view)
        boxes = scoring.grid_boxes(view.candidates, columns).tolist()
        kept = torch.zeros_like(view.candidates)
        # Of each crop its candidates in raster order, then the other cells.
        order = (~view.candidates).to(torch.uint8).sort(dim=1, stable=True).indices
        # Crops of one shape get the same places, worked out once.
        alike: dict[tuple[int, ...], list[int]] = {}
        counts = view.counts("crop")
        for crop, (n, keep) in enumerate(zip(counts, per_crop(self, view), strict=True)):
            alike.setdefault((*boxes[crop], view.grids[crop][1], n, keep), []).append(crop)
        for (top, left, rows, across, width, n, keep), crops in alike.items():
            chosen = torch.tensor(crops, device=kept.device)[:, None]
            if rows * across == n:
                places = scoring.uniform_places(rows, across, keep)
                listed = [(top + p // across) * width + left + p % across for p in places]
                cells = torch.tensor(listed, dtype=torch.long, device=kept.device)
            else:
                listed = [(2 * i + 1) * n // (2 * keep) for i in range(keep)]
                cells = order[crops][:, listed]
            kept[chosen, cells] = True
        return Selection(kept, {})


def columns_of(view: EncoderView) -> torch.Tensor:
    """[crops] int64; columns of each crop's grid.

    Raises:
        VlmpruneError: the grids are not known.
    """
    if len(view.grids) != len(view.images):
        raise VlmpruneError("the grids of the crops are not known; use method 'random'.")
    return torch.tensor([columns for _, columns in view.grids], device=view.candidates.device)


def per_crop(pruner: Budgeted, view: EncoderView) -> list[int]:
    """How many tokens each crop keeps; an image's budget is shared in proportion to its tokens."""
    counts = view.counts("crop")
    if each_crop(pruner.budget):
        return [pruner.kept_of(n) if n else 0 for n in counts]
    shares = [0] * len(counts)
    for image, total in enumerate(view.counts("image")):
        crops = [crop for crop, of in enumerate(view.images) if of == image]
        if total:
            parts = scoring.shared_out(pruner.kept_of(total), [counts[crop] for crop in crops])
            for crop, part in zip(crops, parts, strict=True):
                shares[crop] = part
    return shares
