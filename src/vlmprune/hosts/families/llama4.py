"""Llama 4: a CLS token at the end, and a projector that runs in the forward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vlmprune.hosts import outputs, packing
from vlmprune.hosts.families.record import Family
from vlmprune.hosts.families.tiles import TILE, WINDOWS, Tiles
from vlmprune.hosts.families.towers import SIZES
from vlmprune.hosts.parts import Parts
from vlmprune.views.layout import Layout


class Llama4Images(Tiles):
    """The CLS token comes last; the projector runs in the host's forward."""

    entering = False

    # Its config names no hidden state, and its host takes the last.
    parts = (
        SIZES
        | packing.LLAMA4
        | Parts(
            fields=("vision_config.pixel_shuffle_ratio",),
            attributes=(
                "vision_model.model",
                "vision_model.vision_adapter",
                "multi_modal_projector",
            ),
        )
    )

    def check(self, model: Any) -> None:
        """Always its own tower."""

    def has_cls(self, model: Any) -> bool:
        """It has one, the last of a tile's tokens."""
        return True

    @property
    def takes_own(self) -> bool:
        """Its forward takes no tokens, but states of the encoder."""
        return False

    cls_last = True

    def tower(self, model: Any) -> nn.Module:
        """The vision encoder."""
        return model.vision_model.model

    def projector(self, model: Any) -> nn.Module:
        """The tower's own adapter, which merges."""
        return model.vision_model.vision_adapter

    def shuffle(self, model: Any, maps: Tensor) -> Tensor:
        """`pixel_shuffle` of the tower."""
        return packing.llama4_shuffle(maps, model.config.vision_config.pixel_shuffle_ratio)

    def split(self, output: Any, layouts: Sequence[Layout]) -> list[Tensor]:
        """Visual tokens before the projector."""
        tokens = outputs.last_of(output).flatten(0, -2)
        return list(tokens.split([len(one.labels) for one in layouts]))

    def projected(self, model: Any, output: Any, layouts: Sequence[Layout]) -> list[Tensor]:
        """Through the projector, which the host's forward runs."""
        return [model.multi_modal_projector(one) for one in self.split(output, layouts)]

    def shown(self, output: Any) -> Any:
        """The encoder's states, which the host's forward takes."""
        return outputs.last_of(output)

    def form(self, output: Any) -> Any:
        """The host's forward reads `last_hidden_state`; without a cache, at each step anew."""
        tokens = outputs.tokens_of(output)
        if tokens is not None:
            outputs.set_last(output, torch.cat(list(tokens))[None])
            outputs.set_tokens(output, None)
        return output


FAMILIES: dict[str, Family] = {
    "llama4": Family(
        score="CLS attention in the last layer, averaged over the patches that a token merges",
        name="Llama 4",
        cls="Llama4ForConditionalGeneration",
        positions="compact",
        media=(Llama4Images(),),
        note=f"{TILE}; {WINDOWS.format('attention chunks and temperature')}",
        fails={
            "==5.24.0": "it cannot run at all: its forward asks its language model for "
            "image_outputs, which that never returns"
        },
    ),
}
