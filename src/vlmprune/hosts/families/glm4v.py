"""GLM-4.1V, 4.5V, 4.6V and GLM-OCR: a convolution makes a token of each square of patches."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from vlmprune.hosts.families.qwen import QwenImages, QwenVideos, family
from vlmprune.hosts.families.record import Family
from vlmprune.hosts.parts import Parts

_TOWER = Parts(attributes=("model.visual.post_layernorm", "model.visual.downsample"))


class GlmImages(QwenImages):
    """Images, whose patches lie as in Qwen-VL's: groups of them are the convolution's squares."""

    parts = QwenImages.parts | _TOWER

    def projector(self, model: Any) -> nn.Module:
        """The norm behind the blocks; the convolution is given squares instead of patches."""
        return model.model.visual.post_layernorm


class GlmVideos(QwenVideos, GlmImages):
    """Videos, in whose prompts each frame has placeholders of images and a timestamp behind it."""

    # The classes look for the frames of videos under the placeholder of images.
    token = "image_token_id"
    parts = GlmImages.parts
    inputs: ClassVar[tuple[str, ...]] = ("pixel_values_videos", "video_grid_thw")
    host_only: ClassVar[tuple[str, ...]] = ()


MEDIA = (GlmImages(), GlmVideos())
_NOTE = (
    "a convolution makes a token of each square of patches, positions in 3-D; a call brings images "
    "or videos, for both have one placeholder"
)
_AS_FIRST = "as GLM-4.1V, in all but its language model"


FAMILIES: dict[str, Family] = {
    "glm4v": family("GLM-4.1V", "Glm4vForConditionalGeneration", _NOTE, MEDIA),
    "glm4v_moe": family("GLM-4.5V", "Glm4vMoeForConditionalGeneration", _AS_FIRST, MEDIA),
    "glm46v": family("GLM-4.6V", "Glm46VForConditionalGeneration", "as GLM-4.1V", MEDIA),
    "glm_ocr": family(
        "GLM-OCR", "GlmOcrForConditionalGeneration", "as GLM-4.1V, with a tower of its own", MEDIA
    ),
}
