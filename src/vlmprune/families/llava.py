"""LLaVA-1.5 and LLaVA-NeXT."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vlmprune import layout
from vlmprune.errors import VlmpruneError
from vlmprune.families.media import Inputs, four_dimensional, needs
from vlmprune.families.record import Family
from vlmprune.families.towers import Crops
from vlmprune.layout import NO_PATCH, Layout


def keeps_cls(model: Any, inputs: Inputs, has_cls: bool) -> bool:
    """Whether the CLS token itself is passed on as a visual token ("full" selection)."""
    strategy = inputs.get("vision_feature_select_strategy")
    strategy = strategy or model.config.vision_feature_select_strategy
    if strategy == "default" and not has_cls:
        raise VlmpruneError(
            "vision_feature_select_strategy='default' drops the first patch of a tower without a "
            "CLS token; set it to 'full' in the model's config."
        )
    return strategy == "full" and has_cls


class LlavaImages(Crops):
    """One crop an image."""

    overlay = "whole"
    cellwise = True

    def layouts(self, model: Any, inputs: Inputs, visual: Tensor) -> list[Layout]:
        """Every patch in order; before them the CLS token, if the model passes it on."""
        pixels = four_dimensional(inputs, self.inputs[0])
        grid = self.patch_grid(model, inputs)
        plain = layout.plain(1, grid, pixels.device)
        if keeps_cls(model, inputs, self.has_cls(model)):
            first = torch.full((1,), NO_PATCH, device=pixels.device)
            plain = Layout(torch.cat((first, plain.labels)), 1, grid)
        return [plain] * len(pixels)


class LlavaNextImages(Crops):
    """Any resolution: crops unpadded and joined, with newline tokens, by the host's own code."""

    inputs: ClassVar[tuple[str, ...]] = ("pixel_values", "image_sizes")
    overlay = "tiles"
    cellwise = True

    def crops(self, model: Any, inputs: Inputs) -> list[int]:
        """Crops of each image."""
        from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

        sizes = needs(inputs, "image_sizes", "pixel_values")
        config = model.config
        side = config.vision_config.image_size
        return [image_size_to_num_patches(s, config.image_grid_pinpoints, side) for s in sizes]

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
        strategy = inputs.get("vision_feature_select_strategy")
        strategy = strategy or model.config.vision_feature_select_strategy
        packed, _ = model.model.pack_image_features(
            maps, inputs["image_sizes"], strategy, image_newline=newline
        )
        return list(packed)


FAMILIES: dict[str, Family] = {
    "llava": Family(
        name="LLaVA-1.5",
        cls="LlavaForConditionalGeneration",
        positions="compact",
        media=(LlavaImages(),),
        note="one crop an image; the embedded model is of this family",
    ),
    "llava_next": Family(
        name="LLaVA-NeXT",
        cls="LlavaNextForConditionalGeneration",
        positions="compact",
        media=(LlavaNextImages(),),
        note="any resolution: unpadded, newlines always kept",
    ),
}
