"""Idefics3 and SmolVLM: tiles by row of the batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vlmprune.errors import VlmpruneError
from vlmprune.hosts import outputs
from vlmprune.hosts.families.media import Inputs
from vlmprune.hosts.families.record import Family
from vlmprune.hosts.families.tiles import TILE, Tiles
from vlmprune.hosts.families.towers import SIZES
from vlmprune.hosts.parts import Parts


class Idefics3Images(Tiles):
    """Tiles by row of the batch, padded with empty ones."""

    inputs = ("pixel_values", "pixel_attention_mask")
    # Its config names no hidden state, and its host takes the last.
    parts = SIZES | Parts(
        attributes=("model.vision_model", "model.connector.scale_factor"),
        functions={
            "model.connector.pixel_shuffle": ("x", "scale_factor"),
            "model.get_image_features": ("pixel_values", "pixel_attention_mask"),
        },
    )

    def check(self, model: Any) -> None:
        """Always its own tower."""

    def has_cls(self, model: Any) -> bool:
        """It has none."""
        return False

    def tower(self, model: Any) -> nn.Module:
        """The vision encoder."""
        return model.model.vision_model

    def projector(self, model: Any) -> nn.Module:
        """The module that merges and projects."""
        return model.model.connector

    def shuffle(self, model: Any, maps: Tensor) -> Tensor:
        """`pixel_shuffle` of the connector."""
        connector = model.model.connector
        return connector.pixel_shuffle(x=maps, scale_factor=connector.scale_factor)

    def real(self, inputs: Inputs) -> Tensor:
        """[rows, tiles] bool; a tile of zeros is padding, as the host has it.

        Raises:
            VlmpruneError: the pixels have another shape.
        """
        pixels = inputs["pixel_values"]
        if pixels.ndim != 5:
            raise VlmpruneError(
                f"pixel_values of shape {tuple(pixels.shape)} are not [rows, tiles, channels, "
                "height, width]; pass what the model's own processor returns."
            )
        return (pixels != 0).flatten(2).any(dim=2)

    def tiles(self, model: Any, inputs: Inputs) -> int:
        """Tiles that are no padding."""
        return int(self.real(inputs).sum())

    def last(self, model: Any, inputs: Inputs, count: int) -> dict[str, Any]:
        """The inputs with the last `count` tiles of the one row alone."""
        own = self.real(inputs)[0].nonzero()[:, 0]
        chosen = own[len(own) - count :]
        given = {name: inputs.get(name) for name in self.inputs}
        return {name: t[:, chosen] for name, t in given.items() if isinstance(t, Tensor)}

    def form(self, output: Any) -> Any:
        """One tensor; SmolVLM of early releases counts blocks along dimension 0."""
        tokens = outputs.tokens_of(output)
        if isinstance(tokens, list | tuple):
            outputs.set_tokens(output, torch.cat(list(tokens))[:, None])
        return output


FAMILIES: dict[str, Family] = {
    "idefics3": Family(
        score="attention received in the last layer, averaged over the patches that a token merges",
        name="Idefics3",
        cls="Idefics3ForConditionalGeneration",
        positions="compact",
        media=(Idefics3Images(),),
        note=f"no CLS token; {TILE}",
    ),
    "smolvlm": Family(
        score="attention received in the last layer, averaged over the patches that a token merges",
        name="SmolVLM",
        cls="SmolVLMForConditionalGeneration",
        positions="compact",
        media=(Idefics3Images(),),
        note=f"no CLS token; {TILE}, and so does a frame of a video",
        fails={
            ">=5.20.1,<5.21": "it takes visual tokens in whole blocks of vision_config.patch_size "
            "alone, however many are left"
        },
    ),
}
