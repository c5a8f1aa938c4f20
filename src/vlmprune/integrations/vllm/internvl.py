"""InternVL in vLLM, in the layout of Transformers (InternVLForConditionalGeneration)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.model_executor.models import interns1
from vllm.multimodal import MULTIMODAL_REGISTRY

from vlmprune.hosts.families.internvl import InternVLImages
from vlmprune.hosts.families.media import Inputs
from vlmprune.integrations.vllm.host import Host, Served, ServedCrops
from vlmprune.integrations.vllm.model import PrunedModel
from vlmprune.integrations.vllm.processing import PrunedProcessor
from vlmprune.integrations.vllm.runs import Apart
from vlmprune.views.layout import Layout


class InternVLHost(Host):
    """With InternVL's merging of patches."""

    def pixel_shuffle(self, vision_features: Tensor, scale_factor: float) -> Tensor:
        """vLLM's own code, which looks at no weights."""
        own_code: Any = interns1.InternS1ForConditionalGeneration
        return own_code.pixel_shuffle(self, vision_features, scale_factor=scale_factor)


class Images(ServedCrops, InternVLImages):
    """Tiles of an image, the view of the whole last."""

    counted: ClassVar[str] = "image_num_patches"

    def items(self, kwargs: Mapping[str, Any]) -> list[Inputs]:
        """Tiles of each item."""
        name = self.inputs[0]
        sizes = kwargs[self.counted].flatten().tolist()
        return [{"pixel_values": one, name: one} for one in kwargs[name].split(sizes)]

    def rows(self, host: Host, items: Sequence[Inputs]) -> list[int]:
        """All tiles are of one size, none is padding."""
        return [len(one["pixel_values"]) for one in items]

    def joined(self, items: Sequence[Inputs]) -> Inputs:
        """Of one item, as only the size of a tile is read."""
        return items[0]

    def layouts_of(self, host: Host, items: Sequence[Inputs]) -> list[Layout]:
        """Every cell in order."""
        found = []
        for one in items:
            cells = len(self.members(host, one)) * self.tiles(host, one)
            found += self.layouts(host, one, torch.ones(1, cells, dtype=torch.bool))
        return found


class Videos(Apart, Images):
    """Frames, each a tile and one image of its own to a budget; they stand apart in the prompt."""

    kind = "video"
    inputs: ClassVar[tuple[str, ...]] = ("pixel_values_videos",)
    counted: ClassVar[str] = "video_num_patches"


class InternVLProcessor(PrunedProcessor, interns1.InternS1MultiModalProcessor):
    """InternVL's."""

    media: ClassVar[Sequence[Served]] = (Images(), Videos())
    host = InternVLHost


@MULTIMODAL_REGISTRY.register_processor(
    InternVLProcessor,
    info=interns1.InternS1ProcessingInfo,
    dummy_inputs=interns1.InternS1DummyInputsBuilder,
)
class PrunedInternVL(PrunedModel, interns1.InternS1ForConditionalGeneration):
    """InternVL."""

    media: ClassVar[Sequence[Served]] = (Images(), Videos())
    host = InternVLHost

    def offsets(self, layout: Layout, inputs: Any) -> Tensor:
        """Within a frame of a video, else within the image."""
        numbers = super().offsets(layout, inputs)
        return numbers % layout.patches if layout.kind == "video" else numbers
