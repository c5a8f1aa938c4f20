"""LLaVA-1.5 and LLaVA-NeXT."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vlmprune.errors import VlmpruneError
from vlmprune.hosts import packing
from vlmprune.hosts.config import required
from vlmprune.hosts.families.media import Inputs, four_dimensional, needs
from vlmprune.hosts.families.record import Family
from vlmprune.hosts.families.towers import Crops
from vlmprune.hosts.parts import Parts
from vlmprune.views import layout
from vlmprune.views.layout import NO_PATCH, Layout

# The config's entry that says which hidden state of the tower becomes features, and the one that
# says whether its first token is dropped.
LAYER = "vision_feature_layer"
_SELECTS = "vision_feature_select_strategy"
# The config's entry that names what is between the projector's two linear layers.
ACTIVATION = "projector_hidden_act"
SELECTS = Parts(fields=(_SELECTS,))


def strategy_of(model: Any, inputs: Inputs) -> str:
    """Which tokens of the tower are features: "default" drops the first, "full" drops none."""
    return str(inputs.get(_SELECTS) or required(model.config, _SELECTS))


def keeps_cls(model: Any, inputs: Inputs, has_cls: bool) -> bool:
    """Whether the CLS token itself is passed on as a visual token ("full" selection)."""
    strategy = strategy_of(model, inputs)
    if strategy == "default" and not has_cls:
        raise VlmpruneError(
            "vision_feature_select_strategy='default' drops the first patch of a tower without a "
            "CLS token; set it to 'full' in the model's config."
        )
    return strategy == "full" and has_cls


# An image is cut by the host's own rule, and encoded with its size.
TILES = packing.CROPS | Parts(
    fields=("image_grid_pinpoints", "vision_config.image_size"),
    functions={"model.get_image_features": ("pixel_values", "image_sizes")},
)


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
        note="any resolution: unpadded, with newlines",
    ),
}
