"""Pixtral's tower in LLaVA's class: images at their own resolution.

The tower packs all images of a call into one sequence, in which each sees itself alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vlmprune.errors import VlmpruneError
from vlmprune.hosts.families.features import LAYER, SELECTS, keeps_cls
from vlmprune.hosts.families.media import (
    Encoder,
    Inputs,
    Medium,
    Scored,
    blocks,
    four_dimensional,
    needs,
    pooled,
)
from vlmprune.hosts.families.record import Family
from vlmprune.hosts.families.towers import PROJECTOR, SIZES, TOWER, feature_layer, layers_of
from vlmprune.views import layout
from vlmprune.views.layout import Layout


class PixtralImages(Medium):
    """Images of their own size, every patch a visual token."""

    inputs = ("pixel_values", "image_sizes")
    overlay = "own"
    cellwise = True
    layer_field = LAYER
    parts = SIZES | TOWER | PROJECTOR | SELECTS

    def check(self, model: Any) -> None:
        """Refuse another tower, and a config that drops the first patch."""
        self.check_tower(model)
        keeps_cls(model, {}, False)

    def check_tower(self, model: Any) -> None:
        """Refuse another tower."""
        kind = model.config.vision_config.model_type
        if kind != "pixtral":
            raise VlmpruneError(
                f"vlmprune does not support the vision tower {kind!r} in {type(model).__name__} "
                "yet; supported there: pixtral."
            )

    def merge(self, model: Any) -> int:
        """Side of the square of patches that makes one visual token."""
        return 1

    def grids(self, model: Any, inputs: Inputs) -> list[tuple[int, int]]:
        """(rows, columns) of patches of each image.

        Raises:
            VlmpruneError: the sizes are missing or not as many as the images.
        """
        pixels = four_dimensional(inputs, "pixel_values")
        sizes = needs(inputs, "image_sizes", "pixel_values")
        if len(sizes) != len(pixels):
            raise VlmpruneError(
                f"{len(pixels)} images came with {len(sizes)} image_sizes; pass what the model's "
                "own processor returns."
            )
        patch = model.config.vision_config.patch_size
        return [(int(height) // patch, int(width) // patch) for height, width in sizes]

    def layouts(self, model: Any, inputs: Inputs, visual: Tensor) -> list[Layout]:
        """Every cell in order; line breaks are words of the prompt."""
        side, device = self.merge(model), inputs["pixel_values"].device
        return [
            layout.plain(1, (rows // side, columns // side), device)
            for rows, columns in self.grids(model, inputs)
        ]

    def patches(self, model: Any, inputs: Inputs, layouts: Sequence[Layout]) -> list[int]:
        """Of each image its own."""
        return [rows * columns for rows, columns in self.grids(model, inputs)]

    def scored(self, model: Any, inputs: Inputs) -> Scored:
        """What patches receive in the last layer."""
        depth = model.config.vision_config.num_hidden_layers
        return Scored(
            layers_of(model.model.vision_tower, depth)[-1],
            "received",
            f"attention received (the tower has no CLS token), encoder layer {depth - 1}",
        )

    def encoder(self, model: Any, inputs: Inputs) -> Encoder:
        """In each layer an image sees itself."""
        depth = model.config.vision_config.num_hidden_layers
        layers = tuple(layers_of(model.model.vision_tower, depth))
        feature = feature_layer(depth, self.chosen_layers(model, inputs))
        return Encoder(layers, feature, None, frozenset(range(depth)))

    def projector(self, model: Any) -> nn.Module:
        """The module that merges patches and takes them to the language model's width."""
        return model.model.multi_modal_projector

    def cells(
        self,
        model: Any,
        inputs: Inputs,
        layouts: Sequence[Layout],
        attention: list[Tensor],
        features: list[Tensor],
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The packed sequence cut into images, their patches pooled as the host merges them."""
        grids = self.grids(model, inputs)
        counts = [rows * columns for rows, columns in grids]
        # One call for all images, or with flash attention one row an image.
        received = torch.cat([call.flatten(0, 1) for call in attention])
        given = torch.cat([call.flatten(0, -2) for call in features])
        scores, cells = [], []
        for grid, row, own in zip(grids, received.split(counts), given.split(counts), strict=True):
            members = blocks(*grid, self.merge(model), row.device)
            # An image's row adds up to its share of the sequence.
            scores.append(pooled(row / row.sum() if row.ndim == 1 else row, members))
            cells.append(pooled(own, members.to(own.device)))
        return scores, cells


FAMILIES: dict[str, Family] = {
    "llava:pixtral": Family(
        score="attention received in the last layer",
        name="Pixtral",
        cls="LlavaForConditionalGeneration",
        positions="compact",
        media=(PixtralImages(),),
        note="images at their own resolution; no CLS token",
    ),
}
