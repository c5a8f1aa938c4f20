"""Where the visual tokens lie, and how choices made on crops travel to the language model.

An image is encoded as one or more crops, each a grid of patches. A host packs the patches into
the sequence of visual tokens that its language model sees: it may cut padding away and add
newline tokens. The packing is never derived again here. A map that numbers the patches is sent
through the host's own packing, and the numbers are read off the other end.

Imports torch and `select.budget` alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vlmprune.select.budget import Newlines

# What `label_map` marks tokens with that belong to no patch: newlines, or a kept CLS token.
NO_PATCH = -1


@dataclass(frozen=True)
class Layout:
    """The visual tokens of one image or video, in prompt order.

    Attributes:
        labels: [n] int64; the patch behind each visual token, numbered crop by crop and row by
            row over all crops of the image, or -1 for a newline or CLS token.
            Where the host scales joined crops down, so that a token blends neighbouring patches,
            it is the heaviest of them; the token is kept if that one is.
        crops: number of crops. Of a video, its frames.
        grid: (rows, columns) of patches in a crop.
        blended: whether tokens blend patches.
        kind: what it is the layout of.
        whole_crop: the crop that is the view of the whole image, the first with some hosts, with
            others the last; None where none is, as of a video, or where the host does not tell.
        cls: whether the tokens that belong to no patch are CLS tokens, which are never dropped;
            else they are newlines.
    """

    labels: Tensor
    crops: int
    grid: tuple[int, int]
    blended: bool = False
    kind: Literal["image", "video"] = "image"
    whole_crop: int | None = None
    cls: bool = False

    @property
    def patches(self) -> int:
        """Patches of one crop."""
        return self.grid[0] * self.grid[1]

    @property
    def newlines(self) -> int:
        """How many visual tokens belong to no patch."""
        return int((self.labels == NO_PATCH).sum())

    @property
    def crop(self) -> Tensor:
        """[n] int64 crop of each visual token; -1 for none."""
        return torch.div(self.labels, self.patches, rounding_mode="floor").clamp(min=NO_PATCH)

    @property
    def row(self) -> Tensor:
        """[n] int64 row within the crop; -1 for none."""
        row = torch.div(self.labels % self.patches, self.grid[1], rounding_mode="floor")
        return torch.where(self.labels == NO_PATCH, NO_PATCH, row)

    @property
    def column(self) -> Tensor:
        """[n] int64 column within the crop; -1 for none."""
        return torch.where(self.labels == NO_PATCH, NO_PATCH, self.labels % self.grid[1])

    def candidates(self) -> Tensor:
        """[crops, patches] bool: the patches that reach the language model at all."""
        seen = torch.zeros(self.crops * self.patches, dtype=torch.bool, device=self.labels.device)
        seen[self.labels[self.labels != NO_PATCH]] = True
        return seen.view(self.crops, self.patches)

    def left_newlines(self, newlines: Newlines) -> int:
        """How many tokens that belong to no patch are left under the setting `newlines`."""
        return self.newlines if self.cls or newlines == "keep" else 0

    def to_tokens(self, kept: Tensor, newlines: Newlines = "keep") -> Tensor:
        """Carry a choice of patches over to the visual tokens.

        Args:
            kept: [crops, patches] bool.
            newlines: whether newlines are kept; CLS tokens always are.

        Returns:
            [n] bool.
        """
        # One more cell at the end, which the label -1 finds.
        stays = torch.full((1,), self.cls or newlines == "keep", device=kept.device)
        return torch.cat((kept.flatten(), stays))[self.labels]


def kept_tokens(layouts: Sequence[Layout], cells: Tensor, newlines: Newlines) -> list[Tensor]:
    """A choice of cells as [n] bools over each item's visual tokens.

    Args:
        layouts: one an item.
        cells: [crops, cells] bool over the crops of all items; wider than a crop where others are.
        newlines: what becomes of newline tokens.
    """
    first = layouts[0] if layouts else None
    if first is not None and len(layouts) > 1 and all(one is first for one in layouts):
        # Images that share a layout, all in one step.
        own = cells[:, : first.patches].to(first.labels.device).reshape(len(layouts), -1)
        stays = own.new_full((len(layouts), 1), first.cls or newlines == "keep")
        return list(torch.cat((own, stays), dim=1)[:, first.labels])
    parts = cells.split([one.crops for one in layouts])
    return [
        one.to_tokens(own[:, : one.patches].to(one.labels.device), newlines)
        for one, own in zip(layouts, parts, strict=True)
    ]


def plain(crops: int, grid: tuple[int, int], device: torch.device | None = None) -> Layout:
    """The layout of a host that passes every patch on, in order."""
    return Layout(torch.arange(crops * grid[0] * grid[1], device=device), crops, grid)


def label_map(crops: int, grid: tuple[int, int], device: torch.device | None = None) -> Tensor:
    """[crops, patches, 1] float32 features that number the patches of an image.

    A host's packing moves them as it moves real features; `read_labels` reads them back.
    float32 holds whole numbers up to 2^24 exactly.
    """
    numbers = torch.arange(crops * grid[0] * grid[1], dtype=torch.float32, device=device)
    return numbers.view(crops, -1, 1)


def read_labels(packed: Tensor, crops: int, grid: tuple[int, int]) -> Layout:
    """Turn packed `label_map` features [n, 1] into a layout.

    Raises:
        ValueError: a label is no whole number in range or comes twice, so the host mixes
            patches and its packing cannot be followed.
    """
    values = packed.flatten()
    labels = values.round().long()
    cells = labels[labels != NO_PATCH]
    whole = bool((values == labels).all())
    in_range = cells.numel() == 0 or bool(
        ((cells >= 0) & (cells < crops * grid[0] * grid[1])).all()
    )
    if not whole or not in_range or cells.unique().numel() != cells.numel():
        raise ValueError("the host's packing mixes patches, so its tokens cannot be followed.")
    return Layout(labels, crops, grid)


def place_map(whole: Layout) -> Tensor:
    """[crops, patches, 2] float32; the (row, column) of each patch on the joined detail crops.

    Scaling a plane of places down gives the place of each new point. `read_places` reads them.

    Args:
        whole: the layout without any scaling: crop 0, then the joined crops row by row, each row
            ended by a newline. What it cuts away has place 0.

    Raises:
        ValueError: it has another form.
    """
    plane = _plane(whole)
    places = torch.zeros(whole.crops * whole.patches, 2, device=whole.labels.device)
    if plane.numel():
        rows, columns = plane.shape
        here = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
        places[plane.flatten()] = here.to(places)
    return places.view(whole.crops, whole.patches, 2)


def read_places(packed: Tensor, whole: Layout) -> Layout:
    """Turn a packed `place_map` [n, 2], scaled down on the way, into a layout.

    Raises:
        ValueError: a place lies outside, so the packing cannot be followed.
    """
    plane = _plane(whole)
    labels = torch.full((len(packed),), NO_PATCH, device=whole.labels.device)
    labels[: whole.patches] = whole.labels[: whole.patches]
    rest = packed[whole.patches :]
    real = (rest != NO_PATCH).any(dim=1)
    # The nearest patch is the heaviest; of two that are equally near, the first.
    nearest = (rest[real] - 0.5).ceil().long()
    limit = torch.tensor(plane.shape, device=nearest.device)
    if bool(((nearest < 0) | (nearest >= limit)).any()):
        raise ValueError("the host's packing moves patches, so its tokens cannot be followed.")
    labels[whole.patches :][real] = plane[nearest[:, 0], nearest[:, 1]]
    return Layout(labels, whole.crops, whole.grid, blended=True)


def _plane(whole: Layout) -> Tensor:
    """[rows, columns] labels of the joined detail crops, without newlines."""
    rest = whole.labels[whole.patches :]
    ends = (rest == NO_PATCH).nonzero()[:, 0]
    if whole.crops == 1 or len(ends) == 0:
        return rest[:0].view(0, 0)
    width = int(ends[0]) + 1
    rows = rest.view(-1, width) if len(rest) % width == 0 else rest[:0].view(0, 1)
    if len(rows) != len(ends) or bool((rows[:, -1] != NO_PATCH).any()):
        raise ValueError("the host's packing has rows of unequal length, which cannot be followed.")
    return rows[:, :-1]
