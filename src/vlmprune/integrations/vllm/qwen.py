"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL in vLLM: any size, merged patches, positions in 3-D."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.model_executor.models import qwen2_5_vl, qwen2_vl, qwen3_vl
from vllm.multimodal import MULTIMODAL_REGISTRY

from vlmprune.hosts.families.media import Inputs
from vlmprune.hosts.families.qwen import QwenImages, QwenVideos
from vlmprune.hosts.families.qwen2_5_vl import WindowedImages, WindowedVideos
from vlmprune.hosts.families.qwen3_vl import DeepImages, DeepVideos
from vlmprune.integrations.vllm.host import Host, Served
from vlmprune.integrations.vllm.model import PrunedModel
from vlmprune.integrations.vllm.positions import OriginalPositions
from vlmprune.integrations.vllm.processing import PrunedProcessor
from vlmprune.integrations.vllm.runs import Apart
from vlmprune.pruner import Pruner
from vlmprune.runtime.encoder.reads import wanted
from vlmprune.views.layout import Layout


class Qwen(Host):
    """With Qwen's name for the tower."""

    @property
    def visual(self) -> Any:
        """The vision encoder, mergers included; without a model as many blocks as it has."""
        if self.served is None:
            return SimpleNamespace(blocks=[None] * self.config.vision_config.depth)
        return self.served.visual


class _Served(Served):
    """Items of their own sizes, whose patches come in one sequence."""

    def items(self, kwargs: Mapping[str, Any]) -> list[Inputs]:
        """Patches and grid of each item, and of a video its pace."""
        pixels, grid, *others = self.inputs
        sizes = kwargs[grid]
        parts = kwargs[pixels].split(sizes.prod(dim=1).tolist())
        more = [name for name in others if kwargs.get(name) is not None]
        return [
            {pixels: one, grid: sizes[i : i + 1], **{name: kwargs[name][i] for name in more}}
            for i, one in enumerate(parts)
        ]

    def absent(self, host: Host, method: Pruner | None) -> list[int]:
        """None; but before a model is loaded, blocks that see windows alone are refused."""
        if method is not None:
            wanted(host, [self], [{}], [True], method.reads, repr(method))  # type: ignore[arg-type]
        return []

    def joined(self, items: Sequence[Inputs]) -> Inputs:
        """The grids of all items; the patches of the first, which nobody reads."""
        pixels, grid, *_ = self.inputs
        return {pixels: items[0][pixels], grid: torch.cat([one[grid] for one in items])}

    def rows(self, host: Host, items: Sequence[Inputs]) -> list[int]:
        """A frame is a sequence of the tower's attention."""
        return [int(one[self.inputs[1]][0, 0]) for one in items]

    def unscored(
        self, host: Host, inputs: Inputs, layouts: Sequence[Layout]
    ) -> list[Tensor] | None:
        """Zeros for every patch."""
        group = host.config.vision_config.spatial_merge_size**2
        return [torch.zeros(one.crops, one.patches * group) for one in layouts]

    def lengths(self, host: Host, items: Sequence[Inputs]) -> list[int]:
        """Patches of each frame; some kernels are told them in another unit."""
        grids = [one[self.inputs[1]][0].tolist() for one in items]
        return [rows * columns for frames, rows, columns in grids for _ in range(frames)]


class Images(_Served, QwenImages):
    """Images."""


class Videos(_Served, QwenVideos):
    """Videos, of which all frames stand together in the prompt."""


class PrunedQwen(PrunedModel):
    """Mixed in before a model of the Qwen line."""

    axes: ClassVar[int] = 3
    host = Qwen
    media: ClassVar[Sequence[Served]] = (Images(), Videos())

    def get_mrope_input_positions(
        self, input_tokens: list[int], mm_features: Sequence[Any]
    ) -> tuple[Tensor, int]:
        """vLLM's own positions of the unpruned prompt; of visual tokens the first of their run."""
        whole = self.unpruned(input_tokens, mm_features)
        positions, delta = self._rule(whole.tokens, whole.features)
        delta += len(whole.tokens) - len(input_tokens)
        return positions[:, whole.places].contiguous(), delta

    def offsets(self, layout: Layout, inputs: Any) -> Tensor:
        """What vLLM gives to the tokens of an item that begins a prompt."""
        (medium,) = (one for one in self.media if one.kind == layout.kind)
        _, grid, *others = medium.inputs
        data = {grid: SimpleNamespace(data=inputs[grid][0])}
        for name in others:
            if inputs.get(name) is not None:
                data[name] = SimpleNamespace(data=torch.as_tensor(inputs[name]))
        place = SimpleNamespace(offset=0)
        feature = SimpleNamespace(modality=layout.kind, data=data, mm_position=place)
        return self._rule([0] * len(layout.labels), [feature])[0].T

    def _rule(self, tokens: list[int], features: Sequence[Any]) -> tuple[Tensor, int]:
        """vLLM's own."""
        return super(OriginalPositions, self).get_mrope_input_positions(tokens, features)  # type: ignore[misc]


class Qwen2VLProcessor(PrunedProcessor, qwen2_vl.Qwen2VLMultiModalProcessor):
    """Qwen2-VL's."""

    media = PrunedQwen.media
    host = Qwen


@MULTIMODAL_REGISTRY.register_processor(
    Qwen2VLProcessor,
    info=qwen2_vl.Qwen2VLProcessingInfo,
    dummy_inputs=qwen2_vl.Qwen2VLDummyInputsBuilder,
)
class PrunedQwen2VL(PrunedQwen, qwen2_vl.Qwen2VLForConditionalGeneration):
    """Qwen2-VL."""


class _Windows(_Served):
    """Qwen2.5-VL's; the library puts the windows of its tower back in order."""

    def projector(self, model: Any) -> Any:
        """The norm that begins the merger, which vLLM has made a function that runs no hooks."""
        return model.visual.merger.ln_q


class _WindowedImages(_Windows, WindowedImages):
    """Images."""


class _WindowedVideos(_Windows, WindowedVideos):
    """Videos."""


class Qwen25VLProcessor(PrunedProcessor, qwen2_5_vl.Qwen2_5_VLMultiModalProcessor):
    """Qwen2.5-VL's."""

    media: ClassVar[Sequence[Served]] = (_WindowedImages(), _WindowedVideos())
    host = Qwen


@MULTIMODAL_REGISTRY.register_processor(
    Qwen25VLProcessor,
    info=qwen2_5_vl.Qwen2_5_VLProcessingInfo,
    dummy_inputs=qwen2_5_vl.Qwen2_5_VLDummyInputsBuilder,
)
class PrunedQwen25VL(PrunedQwen, qwen2_5_vl.Qwen2_5_VLForConditionalGeneration):
    """Qwen2.5-VL."""

    media: ClassVar[Sequence[Served]] = (_WindowedImages(), _WindowedVideos())


@dataclass(frozen=True)
class Deep:
    """What Qwen3-VL's encoder gives.

    Attributes:
        items: for each item [n, (1 + levels) · D], a token's features for the first layer and,
            side by side, those that are added behind later ones.
        width: D.
    """

    items: Sequence[Tensor]
    width: int


class _Deep(_Served):
    """Tokens with features for later layers, which go where the token goes."""

    def split(self, output: Deep, layouts: Sequence[Layout]) -> list[Tensor]:
        """What goes in at the first layer."""
        return [one[:, : output.width] for one in output.items]

    def extra(self, output: Deep, layouts: Sequence[Layout]) -> list[list[Tensor]]:
        """All the rest as one."""
        return [[one[:, output.width :] for one in output.items]]


class _DeepImages(_Deep, DeepImages):
    """Images."""


class _DeepVideos(Apart, _Deep, DeepVideos):
    """Videos, whose frames stand apart, each behind its time."""


class Qwen3VLProcessor(PrunedProcessor, qwen3_vl.Qwen3VLMultiModalProcessor):
    """Qwen3-VL's."""

    media: ClassVar[Sequence[Served]] = (_DeepImages(), _DeepVideos())
    host = Qwen


class _Qwen3VL(qwen3_vl.Qwen3VLForConditionalGeneration):
    """Tells which features are for later layers."""

    def embed_multimodal(self, **kwargs: Any) -> Any:
        found = super().embed_multimodal(**kwargs)
        return None if found is None else Deep(found, self.visual_dim)


@MULTIMODAL_REGISTRY.register_processor(
    Qwen3VLProcessor,
    info=qwen3_vl.Qwen3VLProcessingInfo,
    dummy_inputs=qwen3_vl.Qwen3VLDummyInputsBuilder,
)
class PrunedQwen3VL(PrunedQwen, _Qwen3VL):
    """Qwen3-VL."""

    media: ClassVar[Sequence[Served]] = (_DeepImages(), _DeepVideos())

    def offsets(self, layout: Layout, inputs: Any) -> Tensor:
        """Row and column of a token within its frame; frames are placed by the text between."""
        return torch.stack((torch.zeros_like(layout.row), layout.row, layout.column), dim=1)
