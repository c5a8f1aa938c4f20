"""LLaVA-NeXT: any resolution."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vlmprune.hosts import packing
from vlmprune.hosts.families.features import ACTIVATION, LAYER, SELECTS, keeps_cls, strategy_of
from vlmprune.hosts.families.media import Inputs, needs
from vlmprune.hosts.families.record import Family
from vlmprune.hosts.families.towers import Crops
from vlmprune.hosts.parts import Parts
from vlmprune.views import layout
from vlmprune.views.layout import NO_PATCH, Layout

# An image is cut by the host's own rule, and encoded with its size.
TILES = packing.CROPS | Parts(
    fields=("image_grid_pinpoints", "vision_config.image_size"),
    functions={"model.get_image_features": ("pixel_values", "image_sizes")},
)


class LlavaNextImages(Crops):
    """Any resolution: crops unpadded and joined, with newline tokens, by the host's own code."""

    inputs: ClassVar[tuple[str, ...]] = ("pixel_values", "image_sizes")
    overlay = "tiles"
    cellwise = True
    layer_field = LAYER
    activation_field = ACTIVATION
    parts = (
        Crops.parts
        | SELECTS
        | TILES
        | Parts(
            functions={
                "model.pack_image_features": (
                    "image_features",
                    "image_sizes",
                    "vision_feature_select_strategy",
                    "image_newline",
                ),
            }
        )
    )

    def crops(self, model: Any, inputs: Inputs) -> list[int]:
        """Crops of each image."""
        sizes = needs(inputs, "image_sizes", "pixel_values")
        config = model.config
        side = config.vision_config.image_size
        return [packing.crops_of(one, config.image_grid_pinpoints, side) for one in sizes]

    def layouts(self, model: Any, inputs: Inputs, visual: Tensor) -> list[Layout]:
        """Label maps through `pack_image_features`."""
        counts, grid = self.crops(model, inputs), self.patch_grid(model, inputs)
        device = inputs["pixel_values"].device
        maps = [layout.label_map(crops, grid, device) for crops in counts]
        if keeps_cls(model, inputs, self.has_cls(model)):
            maps = [nn.functional.pad(m, (0, 0, 1, 0), value=float(NO_PATCH)) for m in maps]
        packed = self.pack(model, inputs, maps)
        return [layout.read_labels(p, n, grid) for p, n in zip(packed, counts, strict=True)]

    def pack(self, model: Any, inputs: Inputs, maps: list[Tensor]) -> list[Tensor]:
        """The host's own packing of maps [crops, patches, 1]."""
        newline = torch.tensor([float(NO_PATCH)], device=maps[0].device)
        packed, _ = model.model.pack_image_features(
            image_features=maps,
            image_sizes=inputs["image_sizes"],
            vision_feature_select_strategy=strategy_of(model, inputs),
            image_newline=newline,
        )
        return list(packed)


FAMILIES: dict[str, Family] = {
    "llava_next": Family(
        name="LLaVA-NeXT",
        cls="LlavaNextForConditionalGeneration",
        positions="compact",
        media=(LlavaNextImages(),),
        note="any resolution: unpadded, with newlines",
    ),
}
