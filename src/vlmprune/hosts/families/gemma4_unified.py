"""Gemma 4 unified, which has no vision encoder: each square of pixels becomes a visual token alone.

Nothing attends before the language model, so that no attention can score visual tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from vlmprune.hosts.families.media import Encoder, Inputs
from vlmprune.hosts.families.placed import Placed
from vlmprune.hosts.families.placed_frames import PlacedFrames
from vlmprune.hosts.families.record import Family
from vlmprune.hosts.families.squares import BY_POSITION, WINDOWS
from vlmprune.hosts.parts import Parts
from vlmprune.views.layout import NO_PATCH, Layout

_CLASS = "Gemma4UnifiedForConditionalGeneration"


class UnifiedImages(Placed):
    """Images whose processor has merged patches already; the padding is embedded, too."""

    unattended = "has no vision encoder"
    parts = Parts(
        fields=("vision_config.mm_embed_dim",),
        attributes=("model.embed_vision.pos_norm", "model.embed_vision.multimodal_embedder"),
        functions={"model.get_image_features": ("pixel_values", "image_position_ids")},
    )

    def read(self, model: Any, inputs: Inputs, cells: Tensor) -> Tensor:
        """The host takes what is no padding, as it comes."""
        return cells[cells != NO_PATCH]

    def encoder(self, model: Any, inputs: Inputs) -> Encoder:
        """What makes the features: the norm behind the embedded places."""
        return Encoder((model.model.embed_vision.pos_norm,), 0, None, frozenset())

    def projector(self, model: Any) -> nn.Module:
        """The module that takes the features to the language model's width."""
        return model.model.embed_vision.multimodal_embedder

    def cells(
        self,
        model: Any,
        inputs: Inputs,
        layouts: Sequence[Layout],
        attention: list[Tensor],
        features: list[Tensor],
    ) -> tuple[list[Tensor], list[Tensor]]:
        """As with a tower, without the padding, which the projector is given, too."""
        real = (self.placed(inputs) != NO_PATCH).all(dim=-1)
        kept = [crop[real[i].to(crop.device)] for i, crop in enumerate(_each(features))]
        return super().cells(model, inputs, layouts, attention, kept)


class UnifiedVideos(PlacedFrames, UnifiedImages):
    """Videos, each frame as an image."""

    cls = _CLASS
    parts = UnifiedImages.parts | Parts(
        functions={"model.get_video_features": ("pixel_values_videos", "video_position_ids")}
    )


def _each(calls: Sequence[Tensor]) -> list[Tensor]:
    """[patches, C] of each crop, call by call."""
    return [crop for call in calls for crop in call.flatten(0, -3)]


FAMILIES: dict[str, Family] = {
    "gemma4_unified": Family(
        score="none: it has no vision encoder",
        name="Gemma 4 unified",
        cls=_CLASS,
        positions="compact",
        mixes=BY_POSITION,
        media=(UnifiedImages(), UnifiedVideos()),
        note=f"methods that look at no attention of an encoder; {WINDOWS}",
    ),
}
