"""Gemma 3: patches averaged in squares."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vlmprune.errors import VlmpruneError
from vlmprune.hosts.families.media import Inputs, blocks
from vlmprune.hosts.families.record import Family
from vlmprune.hosts.families.squares import BY_POSITION, WINDOWS, Squares
from vlmprune.hosts.parts import Parts
from vlmprune.views import layout


class Gemma3Images(Squares):
    """Patches averaged in squares before the projector."""

    cellwise = False
    parts = Squares.parts | Parts(
        attributes=(
            "model.multi_modal_projector.kernel_size",
            "model.multi_modal_projector.avg_pool",
        )
    )

    def merge(self, model: Any) -> int:
        """Side of the square that is averaged."""
        return int(model.model.multi_modal_projector.kernel_size)

    def members(self, model: Any, inputs: Inputs) -> Tensor:
        """The squares that the host's own pooling averages.

        Raises:
            VlmpruneError: its pooling does something else.
        """
        rows, columns = self.patch_grid(model, inputs)
        squares = blocks(rows, columns, self.merge(model))
        numbers = layout.label_map(1, (rows, columns))
        pool = model.model.multi_modal_projector.avg_pool
        pooled = pool(numbers.view(1, 1, rows, columns)).flatten()
        means = numbers[0, squares, 0].mean(dim=1)
        if pooled.shape != means.shape or float((pooled - means).abs().max()) > 0.01:
            raise VlmpruneError(
                f"the pooling of {type(model).__name__} does not average squares of patches, so "
                "its tokens cannot be followed; pass images of the size that the config says."
            )
        return squares


FAMILIES: dict[str, Family] = {
    "gemma3": Family(
        score="attention received in the last layer, averaged over the patches that a token merges",
        name="Gemma 3",
        cls="Gemma3ForConditionalGeneration",
        positions="compact",
        media=(Gemma3Images(),),
        note=f"no CLS token; scores averaged as its patches are; {WINDOWS}",
        mixes=BY_POSITION,
    ),
}
