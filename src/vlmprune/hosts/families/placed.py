"""Patches that say where they lie, padded to one number: what all of Gemma 4 is given.

An image, or a frame of a video, keeps its aspect ratio. As each patch brings its place, patches may
come in any order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from vlmprune.errors import VlmpruneError
from vlmprune.hosts.families.media import Inputs, Medium, needs, pooled
from vlmprune.views import layout
from vlmprune.views.layout import Layout


class Placed(Medium):
    """Crops of their own size, squares of whose patches become visual tokens.

    Attributes:
        places: the input with the places of patches, [crops, patches, 2] as (column, row); -1 is
            padding.
    """

    inputs: ClassVar[Any] = ("pixel_values", "image_position_ids")
    places: ClassVar[str] = "image_position_ids"
    overlay: ClassVar[Literal["own", ""]] = "own"
    cellwise = True

    def merge(self, model: Any) -> int:
        """Side of the square of patches that makes one visual token."""
        return 1

    def read(self, model: Any, inputs: Inputs, cells: Tensor) -> Tensor:
        """[n] the cells of the visual tokens of all crops, in the host's order.

        Args:
            model: the host.
            inputs: the request's inputs.
            cells: [crops, patches] the cell of each patch of a crop; -1 for padding.
        """
        raise NotImplementedError

    def placed(self, inputs: Inputs) -> Tensor:
        """[crops, patches, 2] int64 (column, row) of each patch; -1 for padding.

        Raises:
            VlmpruneError: they are missing, or not as many as the patches.
        """
        pixels, places = inputs[self.inputs[0]], needs(inputs, self.places, self.inputs[0])
        if places.shape != (*pixels.shape[:-1], 2):
            raise VlmpruneError(
                f"{self.inputs[0]} of shape {tuple(pixels.shape)} came with {self.places} of shape "
                f"{tuple(places.shape)}; pass what the model's own processor returns."
            )
        return places.flatten(0, -3)

    def frames(self, inputs: Inputs) -> list[int]:
        """Crops of each item."""
        return [1] * len(inputs[self.inputs[0]])

    def grids(self, model: Any, inputs: Inputs) -> list[tuple[int, int]]:
        """(rows, columns) of cells of each crop.

        Raises:
            VlmpruneError: a crop is no rectangle of whole squares.
        """
        places, side = self.placed(inputs), self.merge(model)
        sizes = (places.amax(dim=1) + 1).tolist()
        counts = (places != -1).all(dim=-1).sum(dim=1).tolist()
        for (columns, rows), count in zip(sizes, counts, strict=True):
            if rows % side or columns % side or rows * columns != count or not count:
                raise VlmpruneError(
                    f"{self.places} place {count} patches on a grid of {rows} x {columns}, which "
                    f"is not one of whole squares of {side} x {side}; pass what the model's own "
                    "processor returns."
                )
        return [(rows // side, columns // side) for columns, rows in sizes]

    def numbered(self, model: Any, inputs: Inputs) -> Tensor:
        """[crops, patches] int64; the cell of each patch, row by row, -1 for padding."""
        places, side = self.placed(inputs), self.merge(model)
        width = torch.tensor([columns for _, columns in self.grids(model, inputs)])
        column, row = torch.div(places, side, rounding_mode="floor").unbind(-1)
        cells = row * width.to(row.device)[:, None] + column
        return cells.masked_fill((places == -1).all(dim=-1), layout.NO_PATCH)

    def members(self, model: Any, inputs: Inputs) -> list[Tensor]:
        """For each crop [cells, side²] int64, the patches behind each cell."""
        grids, square = self.grids(model, inputs), self.merge(model) ** 2
        return [
            # Padding comes first.
            own.argsort(stable=True)[-rows * columns * square :].view(-1, square)
            for own, (rows, columns) in zip(self.numbered(model, inputs), grids, strict=True)
        ]

    def layouts(self, model: Any, inputs: Inputs, visual: Tensor) -> list[Layout]:
        """Cells numbered, sent through the host's own code, and read off the other end.

        Raises:
            VlmpruneError: the host mixes cells, or the frames of a video differ in size.
        """
        grids = self.grids(model, inputs)
        read = self.read(model, inputs, self.numbered(model, inputs))
        sizes = [rows * columns for rows, columns in grids]
        if len(read) != sum(sizes) or not bool((read == read.round()).all()):
            raise VlmpruneError(
                f"{type(model).__name__} does not make a visual token of each square of patches, "
                "so its tokens cannot be followed; pass what the model's own processor returns."
            )
        crops, found, first = read.split(sizes), [], 0
        for count in self.frames(inputs):
            own = set(grids[first : first + count])
            if len(own) != 1:
                raise VlmpruneError(
                    f"the frames of a video make {sorted(own)} tokens each; pass what the model's "
                    "own processor returns."
                )
            cells = [one + i * len(one) for i, one in enumerate(crops[first : first + count])]
            found.append(layout.read_labels(torch.cat(cells), count, grids[first]))
            first += count
        return found

    def patches(self, model: Any, inputs: Inputs, layouts: Sequence[Layout]) -> list[int]:
        """As many in each crop, padding included."""
        crops, patches, _ = self.placed(inputs).shape
        return [patches] * crops

    def cells(
        self,
        model: Any,
        inputs: Inputs,
        layouts: Sequence[Layout],
        attention: list[Tensor],
        features: list[Tensor],
    ) -> tuple[list[Tensor], list[Tensor]]:
        """What patches get averaged by cells; features are the visual tokens' own, in order."""
        members = self.members(model, inputs)
        rows = [row for call in attention for row in call]
        scores = [pooled(row, own.to(row.device)) for row, own in zip(rows, members, strict=True)]
        given = torch.cat([call.flatten(0, -2) for call in features])
        labels = torch.cat([one.labels % one.patches for one in layouts])
        sizes = [len(own) for own in members]
        order = zip(given.split(sizes), labels.to(given.device).split(sizes), strict=True)
        return scores, [own[where.argsort()] for own, where in order]
