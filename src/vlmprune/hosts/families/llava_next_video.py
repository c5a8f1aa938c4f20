"""LLaVA-NeXT-Video: images as in LLaVA-NeXT, and videos."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from vlmprune.hosts import outputs
from vlmprune.hosts.families.features import SELECTS, drops_cls
from vlmprune.hosts.families.frames import Frames
from vlmprune.hosts.families.llava_next import LlavaNextImages
from vlmprune.hosts.families.record import Family
from vlmprune.hosts.parts import Parts
from vlmprune.views.layout import Layout


class NextVideos(Frames):
    """Frames pooled before the projector."""

    stacked = False
    cellwise = True
    parts = Frames.parts | SELECTS | Parts(fields=("spatial_pool_stride",))

    def check(self, model: Any) -> None:
        """Refuse a model that passes CLS tokens on, which the host's pooling cannot."""
        super().check(model)
        drops_cls(model, self.has_cls(model), "pool")

    def merge(self, model: Any) -> int:
        """The pooling's stride; its scores are averaged, whatever it does to features."""
        return model.config.spatial_pool_stride

    def split(self, output: Any, layouts: Sequence[Layout]) -> list[Tensor]:
        """Visual tokens [n, D], video by video; early releases keep frames apart."""
        return [tokens.reshape(-1, tokens.shape[-1]) for tokens in outputs.tokens_of(output)]


FAMILIES: dict[str, Family] = {
    "llava_next_video": Family(
        name="LLaVA-NeXT-Video",
        cls="LlavaNextVideoForConditionalGeneration",
        positions="compact",
        media=(LlavaNextImages(), NextVideos()),
        note="any resolution, images and videos; with newlines in images",
    ),
}
