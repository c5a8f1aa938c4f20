"""Qwen2-VL: every block of the tower sees whole images."""

from __future__ import annotations

from vlmprune.hosts.families.qwen import family
from vlmprune.hosts.families.record import Family

FAMILIES: dict[str, Family] = {
    "qwen2_vl": family(
        "Qwen2-VL",
        "Qwen2VLForConditionalGeneration",
        "images and videos; patches merged 2 x 2, positions in 3-D; each temporal patch of a "
        "video is a frame",
    ),
}
