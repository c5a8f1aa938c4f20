"""One square an image, all of it seen both ways by the decoder."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vlmprune.errors import VlmpruneError
from vlmprune.hosts.families.media import Inputs, four_dimensional
from vlmprune.hosts.families.towers import Crops
from vlmprune.views import layout
from vlmprune.views.layout import Layout

# Releases that look the block of an image's tokens up by position (`Family.mixes`).
BY_POSITION = {
    ">=5.23": "its sliding windows look an image up by position, as if it were in the first"
}
WINDOWS = (
    "a sliding window counts the columns that are left, so where a request is longer than it, "
    "pruning equals moving the dropped columns into the padding, not masking them"
)


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
