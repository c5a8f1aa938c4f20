"""Images cut into square tiles, whose squares of patches are merged by pixel shuffle.

Pixels hold all tiles in one stack, and nothing in them says where an image begins; only the
placeholders do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from vlmprune.errors import VlmpruneError
from vlmprune.hosts import outputs
from vlmprune.hosts.families.features import strategy_of
from vlmprune.hosts.families.media import Inputs, four_dimensional
from vlmprune.hosts.families.towers import Crops
from vlmprune.views import layout
from vlmprune.views.layout import Layout

# What notes of families say.
TILE = "a tile counts as an image"
WINDOWS = (
    "{0} count the columns that are left, so where a request is longer than one, pruning equals "
    "moving the dropped columns into the padding, not masking them"
)


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
