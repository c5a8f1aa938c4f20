"""InternVL: all tiles of an image in one run of placeholders."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vlmprune.hosts.families.features import ACTIVATION, LAYER, SELECTS
from vlmprune.hosts.families.record import Family
from vlmprune.hosts.families.tiles import Tiles
from vlmprune.hosts.parts import Parts


class InternVLImages(Tiles):
    """A CLS token that scores and is dropped; a run of placeholders is one image."""

    overlay = "canvas"
    whole_crop = "last"
    # It merges before the projector.
    cellwise = True
    layer_field = LAYER
    activation_field = ACTIVATION
    parts = (
        Tiles.parts
        | SELECTS
        | Parts(
            fields=("downsample_ratio",),
            functions={"model.pixel_shuffle": ("vision_features", "scale_factor")},
        )
    )

    def has_cls(self, model: Any) -> bool:
        """InternVL's own tower has one."""
        return model.config.vision_config.model_type == "internvl_vision" or super().has_cls(model)

    def shuffle(self, model: Any, maps: Tensor) -> Tensor:
        """`pixel_shuffle` of the model."""
        side = int(maps.shape[1] ** 0.5)
        return model.model.pixel_shuffle(
            vision_features=maps.view(1, side, side, 1), scale_factor=model.config.downsample_ratio
        )

    def grouped(self, lengths: list[int], each: int) -> list[int]:
        """One image a run."""
        return [n // each for n in lengths]


FAMILIES: dict[str, Family] = {
    "internvl": Family(
        score="CLS attention in the last layer, averaged over the patches that a token merges",
        name="InternVL",
        cls="InternVLForConditionalGeneration",
        positions="compact",
        media=(InternVLImages(),),
        note="all tiles of an image kept together; frames of a video count as images",
    ),
}
