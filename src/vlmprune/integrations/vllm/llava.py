"""LLaVA-1.5, LLaVA-NeXT and LLaVA-OneVision in vLLM."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, ClassVar

from torch import Tensor
from vllm.model_executor.models import llava, llava_next, llava_onevision
from vllm.model_executor.models.vision import VisionEncoderInfo
from vllm.multimodal import MULTIMODAL_REGISTRY

from vlmprune.hosts.families.frames import OneVisionVideos
from vlmprune.hosts.families.llava import LlavaImages
from vlmprune.hosts.families.llava_next import LlavaNextImages
from vlmprune.hosts.families.llava_onevision import OneVisionImages
from vlmprune.hosts.families.media import Inputs
from vlmprune.integrations.vllm import towers
from vlmprune.integrations.vllm.host import Host, ServedCrops
from vlmprune.integrations.vllm.model import PrunedModel
from vlmprune.integrations.vllm.processing import PrunedProcessor


class _Crops(ServedCrops):
    """Towers of LLaVA's kind, which vLLM builds up to the features' layer."""

    def loaded(self, config: Any) -> int:
        """Up to the last layer that the model takes features from; all of Transformers' own."""
        if config.vision_config.model_type in towers.OWN:
            return int(config.vision_config.num_hidden_layers)
        return llava._get_num_hidden_layers(config)


class Images(_Crops, LlavaImages):
    """One crop an image."""


class NextHost(Host):
    """With LLaVA-NeXT's packing."""

    def pack_image_features(
        self,
        image_features: Sequence[Tensor],
        image_sizes: Tensor,
        vision_feature_select_strategy: str | None = None,
        **others: Any,
    ) -> tuple[list[Tensor], None]:
        """Maps [crops, patches, C] packed by vLLM's own code; newlines as told."""
        return [
            self._packed(one, size, **others)
            for one, size in zip(image_features, image_sizes, strict=True)
        ], None

    def _packed(self, one: Tensor, size: Tensor, image_newline: Tensor) -> Tensor:
        own = SimpleNamespace(config=self.config, image_newline=image_newline)
        own_code: Any = llava_next.LlavaNextForConditionalGeneration
        return own_code._merge_image_patch_embeddings(own, size, one, strategy="spatial_unpad")


class NextImages(_Crops, LlavaNextImages):
    """Any resolution."""


class OneVisionHost(NextHost):
    """With LLaVA-OneVision's packing and pooling."""

    def _packed(
        self, one: Tensor, size: Tensor, image_newline: Tensor, vision_aspect_ratio: str = ""
    ) -> Tensor:
        own = SimpleNamespace(config=self.config, image_newline=image_newline)
        own_code: Any = llava_onevision.LlavaOnevisionForConditionalGeneration
        return own_code._merge_image_patch_embeddings(
            own,
            size,
            one,
            image_newline=image_newline,
            vision_aspect_ratio=vision_aspect_ratio,
            strategy="spatial_unpad",
        )

    def apply_pooling(self, image_features: Tensor) -> Tensor:
        """vLLM's own pooling of frames."""
        own_code: Any = llava_onevision.LlavaOnevisionForConditionalGeneration
        return own_code.apply_pooling(SimpleNamespace(config=self.config), image_features)


class OvImages(_Crops, OneVisionImages):
    """Any resolution, scaled down where large; vLLM cuts every image by itself."""

    inputs: ClassVar[tuple[str, ...]] = ("pixel_values", "image_sizes")  # type: ignore[assignment]

    def pack(self, model: Any, inputs: Inputs, maps: list[Tensor]) -> list[Tensor]:
        """vLLM's limit is the same whatever the config says."""
        ratio = inputs.get("vision_aspect_ratio") or "anyres_max_9"
        return super().pack(model, {**inputs, "vision_aspect_ratio": ratio}, maps)


class OvVideos(_Crops, OneVisionVideos):
    """Frames, pooled."""


class TowerInfo(VisionEncoderInfo[Any]):
    """What vLLM asks of a tower that it does not build, of images as the processor makes them."""

    def __init__(self, hf_config: Any, side: int) -> None:
        super().__init__(hf_config)
        self.side = side

    def get_num_image_tokens(self, *, image_width: int, image_height: int) -> int:
        """Patches and a CLS token."""
        return self.get_patch_grid_length() ** 2 + 1

    def get_image_size(self) -> int:
        """Side of the pixels."""
        return self.side

    def get_patch_size(self) -> int:
        """Side of a patch."""
        return int(self.vision_config.patch_size)

    def get_patch_grid_length(self) -> int:
        """Patches along a side."""
        return self.side // self.get_patch_size()


class LlavaInfo(llava.LlavaProcessingInfo):
    """With towers of ours."""

    def get_vision_encoder_info(self) -> Any:
        """Of a tower of ours, as large as the processor's pictures."""
        config = self.get_hf_config()
        if config.vision_config.model_type not in towers.OWN:
            return super().get_vision_encoder_info()
        picture = self.ctx.get_hf_processor().image_processor
        size = getattr(picture, "crop_size", None) or picture.size
        return TowerInfo(config, int(size["height"]))


class LlavaProcessor(PrunedProcessor, llava.LlavaMultiModalProcessor):
    """LLaVA-1.5's."""

    media = (Images(),)


@MULTIMODAL_REGISTRY.register_processor(
    LlavaProcessor, info=LlavaInfo, dummy_inputs=llava.LlavaDummyInputsBuilder
)
class PrunedLlava(PrunedModel, llava.LlavaForConditionalGeneration):
    """LLaVA-1.5, also with a DINOv2 tower."""

    media = (Images(),)

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        with towers.building(llava, vllm_config.model_config.hf_config):
            super().__init__(vllm_config=vllm_config, prefix=prefix)

    def _parse_and_validate_image_input(self, **kwargs: Any) -> Any:
        pixels = kwargs.get("pixel_values")
        if pixels is None or self.config.vision_config.model_type not in towers.OWN:
            return super()._parse_and_validate_image_input(**kwargs)
        # The config's size is that of the pre-training; the processor's may be another.
        return llava.LlavaImagePixelInputs(type="pixel_values", pixel_values=pixels)


class LlavaNextProcessor(
    PrunedProcessor, llava_next.LlavaNextMultiModalProcessor[llava_next.LlavaNextProcessingInfo]
):
    """LLaVA-NeXT's."""

    media = (NextImages(),)
    host = NextHost


@MULTIMODAL_REGISTRY.register_processor(
    LlavaNextProcessor,
    info=llava_next.LlavaNextProcessingInfo,
    dummy_inputs=llava.LlavaDummyInputsBuilder,
)
class PrunedLlavaNext(PrunedModel, llava_next.LlavaNextForConditionalGeneration):
    """LLaVA-NeXT."""

    media = (NextImages(),)
    host = NextHost


class LlavaOnevisionProcessor(PrunedProcessor, llava_onevision.LlavaOnevisionMultiModalProcessor):
    """LLaVA-OneVision's."""

    media: ClassVar = (OvImages(), OvVideos())
    host = OneVisionHost


@MULTIMODAL_REGISTRY.register_processor(
    LlavaOnevisionProcessor,
    info=llava_onevision.LlavaOnevisionProcessingInfo,
    dummy_inputs=llava_onevision.LlavaOnevisionDummyInputsBuilder,
)
class PrunedLlavaOnevision(PrunedModel, llava_onevision.LlavaOnevisionForConditionalGeneration):
    """LLaVA-OneVision."""

    media: ClassVar = (OvImages(), OvVideos())
    host = OneVisionHost
