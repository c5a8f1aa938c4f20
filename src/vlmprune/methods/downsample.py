"""Downsampling: the control that shows the vision encoder a smaller picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from vlmprune.errors import VlmpruneError
from vlmprune.methods.bases.budgeted import Budgeted
from vlmprune.select import bipartite, coarse_grid
from vlmprune.select.budget import each_crop
from vlmprune.views import EncoderView, Inside, Selection


@dataclass(frozen=True)
class Downsample(Budgeted):
    """Scale the picture down before the vision encoder: a control that looks at nothing.

    A crop of g × g patches is scaled down to g' × g' patches, g' the square root of `keep` rounded
    down, and the tower scales its positions to it. Each of the g'² tokens stands where the patch
    at its centre did. A method that loses to this is better replaced by a smaller picture.

    Paper: none; a control.

    Attributes:
        keep: tokens of a crop that are left at most: an int counts them, a float in (0, 1] is a
            fraction of its patches. Rounded down to a whole square.
        positions: "compact" renumbers the tokens, "original" keeps gaps, "auto" takes what the
            model's config recommends, else what VisPruner's release does for the family.
        budget: "crop" (of a video "frame") alone, for every crop is scaled by itself.
        newlines: "keep" or "drop", by name only: whether newline tokens are kept, see `WithBudget`.

    Where it deviates from what a processor would do: pixels are scaled after they were normalised,
    by antialiased bilinear interpolation in float32. Of any-resolution images each crop is scaled,
    and where the host cuts padding away, tokens all of whose patches it cuts are gone. Towers that
    scale their positions (CLIP, SigLIP, DINOv2); models that encode images at their own
    resolution, and those that make one visual token of several patches, are refused.

    Shapes: pixels [crops, channels, H, W] → kept [crops, N].

    Raises:
        VlmpruneError: a value is out of range; one sentence names it.
    """

    needs: ClassVar[str] = "a tower that scales its positions"
    stage: ClassVar[str] = "before the vision encoder"
    paper: ClassVar[str] = "control"
    text_agnostic: ClassVar[bool] = True

    acts = "scaling"
    instead = "give the model's processor a smaller picture (for some, by max_pixels)"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not each_crop(self.budget):
            raise VlmpruneError(
                f"budget={self.budget!r} is not for Downsample, which scales every crop by itself; "
                "use budget='crop', or 'frame' for videos."
            )

    def inside(self, grid: tuple[int, int], layers: int) -> Inside:
        """The size that the picture is scaled down to."""
        small = self.smaller(grid)
        if small == grid:
            return Inside(words="picture not scaled")
        return Inside(grid=small, words=f"picture scaled to {small[0]} x {small[1]} patches")

    def smaller(self, grid: tuple[int, int]) -> tuple[int, int]:
        """What is left of a grid of (rows, columns)."""
        return coarse_grid.smaller(grid, self.kept_of(grid[0] * grid[1]))

    def select(self, view: EncoderView) -> Selection:
        """Of each token's cells the one that is nearest to its centre."""
        if view.shared is None:
            return Selection(view.candidates, {})
        by_grid = {one: coarse_grid.ranks(one, self.smaller(one)) for one in set(view.grids)}
        # Crops with fewer cells are filled up with cells that are no candidates.
        rank = nn.utils.rnn.pad_sequence([by_grid[one] for one in view.grids], batch_first=True)
        rank = rank.to(view.shared.device)
        kept, members = bipartite.representatives(view.shared, view.candidates, rank)
        return Selection(kept, {"scaled": kept}, members=members)
