"""Mistral 3 and Mistral Large 4: Pixtral's tower, squares of patches merged."""

from __future__ import annotations

from typing import Any

from vlmprune.hosts.families.pixtral import PixtralImages
from vlmprune.hosts.families.record import Family
from vlmprune.hosts.families.towers import PROJECTOR, SIZES, TOWER
from vlmprune.hosts.parts import Parts


class MistralImages(PixtralImages):
    """Squares of patches merged into one visual token."""

    cellwise = False
    parts = (
        SIZES
        | TOWER
        | PROJECTOR
        | Parts(
            fields=("spatial_merge_size",),
            functions={"model.get_image_features": ("pixel_values", "image_sizes")},
        )
    )

    def check(self, model: Any) -> None:
        """Refuse another tower; whether to drop the first patch is nothing its config says."""
        self.check_tower(model)

    def merge(self, model: Any) -> int:
        """Side of the square."""
        return model.config.spatial_merge_size


FAMILIES: dict[str, Family] = {
    "mistral3": Family(
        score="attention received in the last layer, averaged over the patches that a token merges",
        name="Mistral 3",
        cls="Mistral3ForConditionalGeneration",
        positions="compact",
        media=(MistralImages(),),
        note="images at their own resolution, squares of patches merged; no CLS token",
    ),
    "mistral_large4": Family(
        score="attention received in the last layer, averaged over the patches that a token merges",
        name="Mistral Large 4",
        cls="MistralLarge4ForConditionalGeneration",
        positions="compact",
        media=(MistralImages(),),
        note="as Mistral 3; its decoder caches latents, so methods inside it are refused",
        since="5.22",
    ),
}
