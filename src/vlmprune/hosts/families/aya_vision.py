"""Aya Vision: SigLIP, and a decoder with sliding windows."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vlmprune.hosts.families.features import LAYER, SELECTS
from vlmprune.hosts.families.record import Family
from vlmprune.hosts.families.tiles import TILE, WINDOWS, Tiles
from vlmprune.hosts.parts import Parts


class AyaImages(Tiles):
    """SigLIP; `pixel_shuffle` of the projector."""

    layer_field = LAYER
    parts = (
        Tiles.parts
        | SELECTS
        | Parts(functions={"model.multi_modal_projector.pixel_shuffle": ("image_features",)})
    )

    def shuffle(self, model: Any, maps: Tensor) -> Tensor:
        """`pixel_shuffle` of the projector."""
        return model.model.multi_modal_projector.pixel_shuffle(image_features=maps)


FAMILIES: dict[str, Family] = {
    "aya_vision": Family(
        score="attention received in the last layer, averaged over the patches that a token merges",
        name="Aya Vision",
        cls="AyaVisionForConditionalGeneration",
        positions="compact",
        media=(AyaImages(),),
        note=f"no CLS token; {TILE}; {WINDOWS.format('sliding windows')}",
    ),
}
