"""Families that cut an image into square tiles and merge squares of patches by pixel shuffle.

InternVL, Idefics3, SmolVLM, Aya Vision, Llama 4. Their pixels hold all tiles in one stack, and
nothing in them says where an image begins; only the placeholders do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from vlmprune.errors import VlmpruneError
from vlmprune.hosts import outputs, packing
from vlmprune.hosts.families.llava import ACTIVATION, LAYER, SELECTS, strategy_of
from vlmprune.hosts.families.media import Inputs, four_dimensional
from vlmprune.hosts.families.record import Family
from vlmprune.hosts.families.towers import SIZES, Crops
from vlmprune.hosts.parts import Parts
from vlmprune.views import layout
from vlmprune.views.layout import Layout


def runs(visual: Tensor) -> list[int]:
    """Lengths of the runs of neighbouring placeholders [B, L], row by row."""
    found = []
    for row in visual:
        edges = nn.functional.pad(row.int(), (1, 1)).diff().nonzero()[:, 0]
        found += (edges[1::2] - edges[::2]).tolist()
    return found


class Tiles(Crops):
    """Tiles of one size; an item is a tile, unless its family can tell which belong together."""

    stacked = True
    # Nothing says what a tile is cut of, or that it is cut at all.
    whole_crop: ClassVar[Literal["first", "last", ""]] = ""

    def check(self, model: Any) -> None:
        """Refuse another kind of tower, and one whose CLS token would be passed on."""
        chosen = strategy_of(model, {})
        if (chosen == "default") != self.has_cls(model):
            raise VlmpruneError(
                f"vision_feature_select_strategy={chosen!r} does not fit the vision tower "
                f"{model.config.vision_config.model_type!r}; set it to 'default' for a tower "
                "with a CLS token and to 'full' for one without."
            )

    def shuffle(self, model: Any, maps: Tensor) -> Tensor:
        """The host's own merging: [1, patches, 1] to [1, cells, g] (or cells as a grid)."""
        raise NotImplementedError

    def tiles(self, model: Any, inputs: Inputs) -> int:
        """Tiles that the pixels hold."""
        return len(four_dimensional(inputs, "pixel_values"))

    def patch_grid(self, model: Any, inputs: Inputs) -> tuple[int, int]:
        """(rows, columns) of patches in a tile."""
        patch = model.config.vision_config.patch_size
        sides = (patch, patch) if isinstance(patch, int) else patch
        height, width = inputs["pixel_values"].shape[-2:]
        return height // sides[0], width // sides[1]

    def members(self, model: Any, inputs: Inputs) -> Tensor:
        """Patch numbers, sent through the host's own merging.

        Raises:
            VlmpruneError: a patch comes out twice or not at all, so it cannot be followed.
        """
        rows, columns = self.patch_grid(model, inputs)
        merged = self.shuffle(model, layout.label_map(1, (rows, columns)))
        found = merged.reshape(-1, merged.shape[-1]).round().long()
        if not torch.equal(found.flatten().sort().values, torch.arange(rows * columns)):
            raise VlmpruneError(
                f"{type(model).__name__} cannot merge {rows} x {columns} patches of a tile into "
                "whole squares; pass what the model's own processor returns."
            )
        return found

    def grouped(self, lengths: list[int], each: int) -> list[int]:
        """Tiles of each item, from the runs of placeholders."""
        return [1] * (sum(lengths) // each)

    def layouts(self, model: Any, inputs: Inputs, visual: Tensor) -> list[Layout]:
        """Every cell in order; tiles of an item one after the other."""
        rows, columns = self.patch_grid(model, inputs)
        members = self.members(model, inputs)
        each, side = len(members), round(members.shape[1] ** 0.5)
        lengths, tiles = runs(visual), self.tiles(model, inputs)
        if any(n % each for n in lengths) or sum(lengths) != tiles * each:
            raise VlmpruneError(
                f"the prompt holds {sum(lengths)} image placeholders but the images make "
                f"{tiles} tiles of {each} visual tokens; pass ids and pixels from one call of the "
                "model's own processor, untruncated."
            )
        grid, device = (rows // side, columns // side), inputs["pixel_values"].device
        return [layout.plain(n, grid, device) for n in self.grouped(lengths, each)]

    def new(self, model: Any, inputs: Inputs, known: int, visual: Tensor) -> Inputs:
        """The last tiles, as many as there are placeholders for.

        Raises:
            VlmpruneError: a batch brings earlier tiles again, whose rows are not known.
        """
        wanted = int(visual.sum()) // len(self.members(model, inputs))
        if not known or self.tiles(model, inputs) <= wanted:
            return inputs
        if len(visual) > 1:
            raise VlmpruneError(
                "a later turn of a batch brings the tiles of earlier turns again, and nothing "
                "says which belong to which row; pass the new images alone."
            )
        return {**inputs, **self.last(model, inputs, wanted)}

    def last(self, model: Any, inputs: Inputs, count: int) -> dict[str, Any]:
        """The inputs with the last `count` tiles alone."""
        pixels = inputs["pixel_values"]
        return {"pixel_values": pixels[len(pixels) - count :]}

    def split(self, output: Any, layouts: Sequence[Layout]) -> list[Tensor]:
        """Visual tokens [n, D], item by item, whatever the host returns them in."""
        tokens = outputs.tokens_of(output)
        if not isinstance(tokens, Tensor):
            tokens = torch.cat([part.flatten(0, -2) for part in tokens])
        return list(tokens.flatten(0, -2).split([len(one.labels) for one in layouts]))


class InternVLImages(Tiles):
    """A CLS token that scores and is dropped; a run of placeholders is one image."""

    overlay = "canvas"
    whole_crop = "last"
    # It merges before the projector.
    cellwise = True
    layer_field = LAYER
    activation_field = ACTIVATION
    parts = (
        Tiles.parts
        | SELECTS
        | Parts(
            fields=("downsample_ratio",),
            functions={"model.pixel_shuffle": ("vision_features", "scale_factor")},
        )
    )

    def has_cls(self, model: Any) -> bool:
        """InternVL's own tower has one."""
        return model.config.vision_config.model_type == "internvl_vision" or super().has_cls(model)

    def shuffle(self, model: Any, maps: Tensor) -> Tensor:
        """`pixel_shuffle` of the model."""
        side = int(maps.shape[1] ** 0.5)
        return model.model.pixel_shuffle(
            vision_features=maps.view(1, side, side, 1), scale_factor=model.config.downsample_ratio
        )

    def grouped(self, lengths: list[int], each: int) -> list[int]:
        """One image a run."""
        return [n // each for n in lengths]


class AyaImages(Tiles):
    """SigLIP; `pixel_shuffle` of the projector."""

    layer_field = LAYER
    parts = (
        Tiles.parts
        | SELECTS
        | Parts(functions={"model.multi_modal_projector.pixel_shuffle": ("image_features",)})
    )

    def shuffle(self, model: Any, maps: Tensor) -> Tensor:
        """`pixel_shuffle` of the projector."""
        return model.model.multi_modal_projector.pixel_shuffle(image_features=maps)


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


_WINDOWS = (
    "{0} count the columns that are left, so where a request is longer than one, pruning equals "
    "moving the dropped columns into the padding, not masking them"
)
_TILE = "a tile counts as an image"

FAMILIES: dict[str, Family] = {
    "internvl": Family(
        score="CLS attention in the last layer, averaged over the patches that a token merges",
        name="InternVL",
        cls="InternVLForConditionalGeneration",
        positions="compact",
        media=(InternVLImages(),),
        note="all tiles of an image kept together; frames of a video count as images",
    ),
    "idefics3": Family(
        score="attention received in the last layer, averaged over the patches that a token merges",
        name="Idefics3",
        cls="Idefics3ForConditionalGeneration",
        positions="compact",
        media=(Idefics3Images(),),
        note=f"no CLS token; {_TILE}",
    ),
    "smolvlm": Family(
        score="attention received in the last layer, averaged over the patches that a token merges",
        name="SmolVLM",
        cls="SmolVLMForConditionalGeneration",
        positions="compact",
        media=(Idefics3Images(),),
        note=f"no CLS token; {_TILE}, and so does a frame of a video",
        fails={
            ">=5.20.1,<5.21": "it takes visual tokens in whole blocks of vision_config.patch_size "
            "alone, however many are left"
        },
    ),
    "aya_vision": Family(
        score="attention received in the last layer, averaged over the patches that a token merges",
        name="Aya Vision",
        cls="AyaVisionForConditionalGeneration",
        positions="compact",
        media=(AyaImages(),),
        note=f"no CLS token; {_TILE}; {_WINDOWS.format('sliding windows')}",
    ),
    "llama4": Family(
        score="CLS attention in the last layer, averaged over the patches that a token merges",
        name="Llama 4",
        cls="Llama4ForConditionalGeneration",
        positions="compact",
        media=(Llama4Images(),),
        note=f"{_TILE}; {_WINDOWS.format('attention chunks and temperature')}",
        fails={
            "==5.24.0": "it cannot run at all: its forward asks its language model for "
            "image_outputs, which that never returns"
        },
    ),
}
