"""Gemma 4: a tower of padded patches, averaged in squares by their places."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vlmprune.hosts.families.media import Encoder, Inputs, Scored
from vlmprune.hosts.families.placed import Placed
from vlmprune.hosts.families.placed_frames import PlacedFrames
from vlmprune.hosts.families.record import Family
from vlmprune.hosts.families.squares import BY_POSITION, WINDOWS
from vlmprune.hosts.parts import Parts

_CLASS = "Gemma4ForConditionalGeneration"


class Gemma4Images(Placed):
    """Images, whose tower strips the padding off as it averages."""

    parts = Parts(
        fields=("vision_config.pooling_kernel_size", "vision_config.num_hidden_layers"),
        attributes=(
            "model.vision_tower.encoder.layers",
            "model.vision_tower.pooler.root_hidden_size",
            "model.embed_vision",
        ),
        functions={
            "model.get_image_features": ("pixel_values", "image_position_ids"),
            "model.vision_tower.pooler.forward": (
                "hidden_states",
                "pixel_position_ids",
                "padding_positions",
                "output_length",
            ),
        },
    )

    def merge(self, model: Any) -> int:
        """Side of the square of patches that is averaged."""
        return int(model.config.vision_config.pooling_kernel_size)

    def read(self, model: Any, inputs: Inputs, cells: Tensor) -> Tensor:
        """Averages of the numbers by the host's own pooling; no whole ones where it mixes cells."""
        pooler = model.model.vision_tower.pooler
        made, real = pooler(
            hidden_states=cells[..., None].float(),
            pixel_position_ids=self.placed(inputs),
            padding_positions=cells < 0,
            output_length=cells.shape[1] // self.merge(model) ** 2,
        )
        means = made[real][:, 0] / pooler.root_hidden_size
        # Sums of a few equal numbers, rounded.
        return torch.where((means - means.round()).abs() < 0.01, means.round(), means)

    def scored(self, model: Any, inputs: Inputs) -> Scored:
        """What patches receive in the last layer."""
        layers = model.model.vision_tower.encoder.layers
        words = "attention received (the tower has no CLS token), encoder layer"
        return Scored(layers[-1], "received", f"{words} {len(layers) - 1}")

    def encoder(self, model: Any, inputs: Inputs) -> Encoder:
        """In each layer a patch sees its whole crop."""
        layers = tuple(model.model.vision_tower.encoder.layers)
        return Encoder(layers, len(layers) - 1, None, frozenset(range(len(layers))))

    def projector(self, model: Any) -> nn.Module:
        """The module that takes averaged patches to the language model's width."""
        return model.model.embed_vision


class Gemma4Videos(PlacedFrames, Gemma4Images):
    """Videos, each frame as an image."""

    cls = _CLASS
    parts = Gemma4Images.parts | Parts(
        functions={"model.get_video_features": ("pixel_values_videos", "video_position_ids")}
    )


FAMILIES: dict[str, Family] = {
    "gemma4": Family(
        score="attention received in the last layer, averaged over the patches that a token merges",
        name="Gemma 4",
        cls=_CLASS,
        positions="compact",
        mixes=BY_POSITION,
        media=(Gemma4Images(), Gemma4Videos()),
        note=f"no CLS token; scores averaged as its patches are; {WINDOWS}",
    ),
}
