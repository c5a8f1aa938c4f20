"""Gemma 3 and PaliGemma: one square an image, all of it seen both ways by the decoder."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vlmprune.errors import VlmpruneError
from vlmprune.hosts.families.media import Inputs, blocks, four_dimensional
from vlmprune.hosts.families.record import Family
from vlmprune.hosts.families.towers import Crops
from vlmprune.hosts.parts import Parts
from vlmprune.views import layout
from vlmprune.views.layout import Layout


class Squares(Crops):
    """One crop an image, every patch one visual token."""

    stacked = True
    overlay = "square"
    # Their configs name no hidden state, and their hosts take the last.
    cellwise = True

    def check(self, model: Any) -> None:
        """Refuse a tower with a CLS token, which these hosts would pass on as a patch."""
        if self.has_cls(model):
            raise VlmpruneError(
                f"{type(model).__name__} passes the CLS token of its vision tower "
                f"{model.config.vision_config.model_type!r} on as a patch, which vlmprune cannot "
                "follow; use a tower without one."
            )

    def layouts(self, model: Any, inputs: Inputs, visual: Tensor) -> list[Layout]:
        """Every cell in order."""
        pixels = four_dimensional(inputs, "pixel_values")
        rows, columns = self.patch_grid(model, inputs)
        side = self.merge(model)
        plain = layout.plain(1, (rows // side, columns // side), pixels.device)
        return [plain] * len(pixels)


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


_WINDOWS = (
    "a sliding window counts the columns that are left, so where a request is longer than it, "
    "pruning equals moving the dropped columns into the padding, not masking them"
)

FAMILIES: dict[str, Family] = {
    "gemma3": Family(
        score="attention received in the last layer, averaged over the patches that a token merges",
        name="Gemma 3",
        cls="Gemma3ForConditionalGeneration",
        positions="compact",
        media=(Gemma3Images(),),
        note=f"no CLS token; scores averaged as its patches are; {_WINDOWS}",
        mixes={
            ">=5.23": "its sliding windows look an image up by position, as if it were in the first"
        },
    ),
    "paligemma": Family(
        score="attention received in the last layer",
        name="PaliGemma, PaliGemma 2",
        cls="PaliGemmaForConditionalGeneration",
        positions="compact",
        media=(Squares(),),
        mixes={"<5.24": "their prefixes see each other"},
        note=f"no CLS token; positions begin at 1; PaliGemma 2: no cut caches; {_WINDOWS}",
        first=1,
    ),
}
