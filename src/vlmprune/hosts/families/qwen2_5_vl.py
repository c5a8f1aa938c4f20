"""Qwen2.5-VL: most blocks of the tower see windows alone."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vlmprune.errors import VlmpruneError
from vlmprune.hosts import packing
from vlmprune.hosts.config import required
from vlmprune.hosts.families.media import Inputs
from vlmprune.hosts.families.qwen import QwenImages, QwenVideos, family
from vlmprune.hosts.families.record import Family
from vlmprune.hosts.parts import Parts


class _Windows(QwenImages):
    """In Qwen2.5-VL's tower, most blocks of which see windows alone."""

    parts = (
        QwenImages.parts
        | packing.WINDOWS
        | Parts(
            fields=(
                "vision_config.fullatt_block_indexes",
                "vision_config.window_size",
                "vision_config.patch_size",
            ),
            functions={
                "model.get_rope_index": (
                    *QwenImages.parts.functions["model.get_rope_index"],
                    "second_per_grid_ts",
                ),
            },
        )
    )

    def check(self, model: Any) -> None:
        """Refuse a tower without a block that sees a whole image."""
        self.whole(model)

    def whole(self, model: Any) -> list[int]:
        """Numbers of the blocks in which a patch sees its whole image.

        Raises:
            VlmpruneError: all blocks see windows alone.
        """
        vision = model.config.vision_config
        whole = required(vision, "fullatt_block_indexes")
        found = [number for number in whole if number < vision.depth]
        if not found:
            raise VlmpruneError(
                "every block of this model's vision tower sees windows alone "
                "(fullatt_block_indexes names none), so no attention tells which parts of an "
                "image matter."
            )
        return found

    def order(self, model: Any, inputs: Inputs) -> Tensor:
        """[n] int64; the place in the tower of each visual token's group.

        The tower brings groups into the order of its windows, and its output back.
        """
        vision = model.config.vision_config
        return packing.windows_of(
            inputs[self.inputs[1]],
            vision.spatial_merge_size,
            required(vision, "window_size"),
            vision.patch_size,
        ).argsort()


class WindowedImages(_Windows):
    """Images in that tower."""


class WindowedVideos(_Windows, QwenVideos):
    """Videos in that tower."""


FAMILIES: dict[str, Family] = {
    "qwen2_5_vl": family(
        "Qwen2.5-VL",
        "Qwen2_5_VLForConditionalGeneration",
        "as Qwen2-VL; windows put back in order",
        (WindowedImages(), WindowedVideos()),
        "full-attention layer",
    ),
}
