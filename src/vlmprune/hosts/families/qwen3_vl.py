"""Qwen3-VL, and classes made of it: features of earlier blocks go to decoder layers."""

from __future__ import annotations

from vlmprune.hosts.families.qwen import QwenImages, QwenVideos, family
from vlmprune.hosts.families.record import Family
from vlmprune.hosts.parts import Parts

_DEEP = Parts(fields=("vision_config.deepstack_visual_indexes",))


class DeepImages(QwenImages):
    """Images of Qwen3-VL, which hands features of earlier blocks to decoder layers."""

    parts = QwenImages.parts | _DEEP


class DeepVideos(QwenVideos):
    """Videos of Qwen3-VL, likewise."""

    parts = QwenVideos.parts | _DEEP


MEDIA = (DeepImages(), DeepVideos())
_AS_THIRD = "as Qwen3-VL, in all but its language model"


FAMILIES: dict[str, Family] = {
    "qwen3_vl": family(
        "Qwen3-VL",
        "Qwen3VLForConditionalGeneration",
        "as Qwen2-VL; deepstack features pruned alike",
        MEDIA,
    ),
    "qwen3_vl_moe": family("Qwen3-VL-MoE", "Qwen3VLMoeForConditionalGeneration", _AS_THIRD, MEDIA),
    "cosmos3_omni": family("Cosmos3 Omni", "Cosmos3OmniForConditionalGeneration", _AS_THIRD, MEDIA),
    "cohere_compass": family(
        "Cohere Compass",
        "CohereCompassForConditionalGeneration",
        f"{_AS_THIRD}; a sliding window counts the columns that are left",
        MEDIA,
        fails={
            "==5.18.0": "its generate hands a video on together with what it made of it, which its "
            "forward refuses"
        },
    ),
}
