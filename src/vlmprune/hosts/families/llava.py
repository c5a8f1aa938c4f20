"""LLaVA-1.5: one crop an image."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlmprune.hosts.families.features import ACTIVATION, LAYER, SELECTS, keeps_cls
from vlmprune.hosts.families.media import Inputs, four_dimensional
from vlmprune.hosts.families.record import Family
from vlmprune.hosts.families.towers import Crops
from vlmprune.views import layout
from vlmprune.views.layout import NO_PATCH, Layout


class LlavaImages(Crops):
    """One crop an image."""

    overlay = "whole"
    cellwise = True
    layer_field = LAYER
    activation_field = ACTIVATION
    parts = Crops.parts | SELECTS

    def layouts(self, model: Any, inputs: Inputs, visual: Tensor) -> list[Layout]:
        """Every patch in order; before them the CLS token, if the model passes it on."""
        pixels = four_dimensional(inputs, self.inputs[0])
        grid = self.patch_grid(model, inputs)
        plain = layout.plain(1, grid, pixels.device)
        if keeps_cls(model, inputs, self.has_cls(model)):
            first = torch.full((1,), NO_PATCH, device=pixels.device)
            plain = Layout(torch.cat((first, plain.labels)), 1, grid, cls=True)
        return [plain] * len(pixels)


FAMILIES: dict[str, Family] = {
    "llava": Family(
        name="LLaVA-1.5",
        cls="LlavaForConditionalGeneration",
        positions="compact",
        media=(LlavaImages(),),
        note="one crop an image; the embedded model is of this family",
    ),
}
