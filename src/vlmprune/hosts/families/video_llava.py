"""Video-LLaVA: one crop an image, and videos, each in a tower of its own."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vlmprune.errors import VlmpruneError
from vlmprune.hosts import packing
from vlmprune.hosts.families.features import SELECTS
from vlmprune.hosts.families.frames import Frames
from vlmprune.hosts.families.llava import LlavaImages
from vlmprune.hosts.families.record import Family
from vlmprune.hosts.families.towers import PROJECTOR, SIZES
from vlmprune.hosts.parts import Parts
from vlmprune.views.layout import NO_PATCH


class VideoLlavaImages(LlavaImages):
    """One crop an image, in a tower of its own."""

    stacked = True
    parts = SIZES | PROJECTOR | SELECTS | Parts(attributes=("model.image_tower",))

    @property
    def inputs(self) -> tuple[str, ...]:  # type: ignore[override]
        """The pixels' name, which was changed."""
        return ("pixel_values",) if self._renamed() else ("pixel_values_images",)

    @property
    def replaced(self) -> tuple[str, ...]:  # type: ignore[override]
        """Their former name."""
        return ("pixel_values_images",) if self._renamed() else ()

    @staticmethod
    def _renamed() -> bool:
        return packing.takes("VideoLlavaForConditionalGeneration", "pixel_values")

    def tower(self, model: Any) -> nn.Module:
        """The encoder of images."""
        return model.model.image_tower


class VideoLlavaVideos(Frames):
    """Frames with their CLS tokens, which belong to no cell."""

    cellwise = True
    marks_cls = True
    parts = (
        SIZES
        | PROJECTOR
        | Parts(attributes=("model.video_tower",), functions={"model.get_video_features": ()})
    )

    def tower(self, model: Any) -> nn.Module:
        """The encoder of frames."""
        return model.model.video_tower

    def check(self, model: Any) -> None:
        """Refuse a tower without CLS tokens."""
        if not self.has_cls(model):
            raise VlmpruneError(
                f"the vision tower {model.config.vision_config.model_type!r} has no CLS token, "
                "which vlmprune expects before each frame of Video-LLaVA; use a CLIP tower."
            )

    def mark(self, labels: Tensor) -> Tensor:
        """A CLS token first in each frame."""
        return nn.functional.pad(labels, (1, 0), value=NO_PATCH).flatten()


FAMILIES: dict[str, Family] = {
    "video_llava": Family(
        name="Video-LLaVA",
        cls="VideoLlavaForConditionalGeneration",
        positions="compact",
        media=(VideoLlavaImages(), VideoLlavaVideos()),
        note="one crop an image, videos; the CLS token of each frame always kept",
    ),
}
