"""Gemma 3n, whose vision tower is convolutional: one square an image, of one size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from vlmprune.errors import VlmpruneError
from vlmprune.hosts.families.media import Encoder, Inputs, Medium, four_dimensional
from vlmprune.hosts.families.record import Family
from vlmprune.hosts.families.squares import WINDOWS
from vlmprune.hosts.parts import Parts
from vlmprune.views import layout
from vlmprune.views.layout import Layout


class Gemma3nImages(Medium):
    """One crop an image, every place of the tower's last map one visual token."""

    stacked = True
    overlay = "square"
    cellwise = True
    unattended = "has a convolutional vision tower, in which nothing attends"
    parts = Parts(
        fields=("vision_soft_tokens_per_image",),
        attributes=("model.vision_tower", "model.embed_vision.soft_embedding_norm"),
        functions={"model.embed_vision.forward": ("inputs_embeds",)},
    )

    def check(self, model: Any) -> None:
        """Refuse a number of tokens that is no square.

        Raises:
            VlmpruneError: it is none.
        """
        self.grid(model)

    def grid(self, model: Any) -> tuple[int, int]:
        """(rows, columns) of an image's visual tokens.

        Raises:
            VlmpruneError: they are no square, which the host takes them for.
        """
        count = int(model.config.vision_soft_tokens_per_image)
        side = math.isqrt(count)
        if side**2 != count:
            raise VlmpruneError(
                f"vision_soft_tokens_per_image={count} is no square, which the host takes the "
                "visual tokens of an image for; use a config with one, such as 256."
            )
        return side, side

    def layouts(self, model: Any, inputs: Inputs, visual: Tensor) -> list[Layout]:
        """Every cell in order."""
        pixels = four_dimensional(inputs, "pixel_values")
        return [layout.plain(1, self.grid(model), pixels.device)] * len(pixels)

    def patches(self, model: Any, inputs: Inputs, layouts: Sequence[Layout]) -> list[int]:
        """None that a tower of layers would see."""
        return []

    def encoder(self, model: Any, inputs: Inputs) -> Encoder:
        """What makes the features: the norm behind the tower's last map."""
        return Encoder((model.model.embed_vision.soft_embedding_norm,), 0, None, frozenset())

    def projector(self, model: Any) -> nn.Module:
        """The module that takes the map to the language model's width."""
        return model.model.embed_vision

    def project(self, model: Any, features: Tensor) -> Tensor | None:
        """By name, as the module's first argument is something else."""
        made: Tensor = self.projector(model)(inputs_embeds=features)
        return made

    def cells(
        self,
        model: Any,
        inputs: Inputs,
        layouts: Sequence[Layout],
        attention: list[Tensor],
        features: list[Tensor],
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Places of the map, row by row."""
        scores = [row for call in attention for row in call]
        return scores, [crop for call in features for crop in call]


FAMILIES: dict[str, Family] = {
    "gemma3n": Family(
        score="none: its vision tower is convolutional",
        name="Gemma 3n",
        cls="Gemma3nForConditionalGeneration",
        positions="compact",
        media=(Gemma3nImages(),),
        note=f"methods that look at no attention of an encoder; its tower needs timm; {WINDOWS}",
    ),
}
