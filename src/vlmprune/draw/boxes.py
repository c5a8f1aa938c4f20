"""Where each visual token of an image lies on the original picture, in its own pixels.

An image processor resizes, pads, crops and tiles; each of these steps moves an axis by
`original = scale * pixel + shift`, so a step is two such maps, and steps compose.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlmprune.errors import VlmpruneError, meant
from vlmprune.hosts.families import FAMILIES
from vlmprune.hosts.families.media import Medium
from vlmprune.io import processors
from vlmprune.io.processors import Size, Steps
from vlmprune.views.layout import Layout


@dataclass(frozen=True)
class _Axis:
    """Pixels along one axis of a view: how many, and where on the picture before it they lie."""

    length: int
    scale: float = 1.0
    shift: float = 0.0

    def then(self, after: _Axis) -> _Axis:
        """The view that `after` takes of this one."""
        return _Axis(after.length, self.scale * after.scale, self.scale * after.shift + self.shift)


# A view is (rows, columns); transformers, too, puts the height first.
_View = tuple[_Axis, _Axis]


def token_boxes(
    layout: Layout,
    image_size: Size,
    image_processor: Any,
    family: str,
    image_sizes_entry: Any = None,
    patch_size: int | None = None,
) -> Tensor:
    """Boxes of one image's visual tokens on the original image.

    Args:
        layout: the image's visual tokens.
        image_size: (width, height) of the original image.
        image_processor: the one that made the image's pixels; its settings are read.
        family: model type or name of the family (`families.FAMILIES`).
        image_sizes_entry: the (height, width) that the processor returned for the image, where
            it returns `image_sizes`; by default that of the original.
        patch_size: side of a patch in pixels. By default the grid fills the crop, which is right
            wherever the crop is a whole number of patches. Looked at for the families of LLaVA
            alone; with the others the grid always fills the crop.

    Returns:
        [n, 4] float32 of (x0, y0, x1, y1), clipped to the image. A token that belongs to no
        patch, or whose patch holds padding alone, has a box without area; one that blends several
        patches has that of the heaviest.

    Raises:
        VlmpruneError: an unknown family or one without such boxes, a video, a way of resizing
            that is not known, or a layout with other crops than the processor makes.
    """
    if layout.kind == "video":
        raise VlmpruneError("boxes on a picture are not known for a video; pass an image's layout.")
    width, height = image_size
    seen = (height, width) if image_sizes_entry is None else tuple(map(int, image_sizes_entry))
    medium = _medium(family)
    if medium.overlay in ("own", "square", "canvas"):
        patch_size = None
    views = _views(Steps(image_processor), (seen[0], seen[1]), medium, layout.crops)
    if len(views) != layout.crops:
        raise VlmpruneError(
            f"the image has {layout.crops} crops but its processor's settings make {len(views)}; "
            "pass the processor that made its pixels."
        )
    boxes = torch.zeros(len(layout.labels), 4)
    crop, row, column = layout.crop.cpu(), layout.row.cpu(), layout.column.cpu()
    for number, view in enumerate(views):
        here = crop == number
        cells = (row[here], column[here])
        for axis in (0, 1):
            side = patch_size or view[axis].length / layout.grid[axis]
            # The picture may have been given to the processor at another size than its own.
            stretch = (height, width)[axis] / seen[axis]
            scale, shift = view[axis].scale * stretch, view[axis].shift * stretch
            limit = (height, width)[axis]
            for edge in (0, 1):
                place = scale * side * (cells[axis] + edge).float() + shift
                boxes[here, 2 * edge + 1 - axis] = place.clamp(0, limit)
    return boxes


def check_family(family: str) -> None:
    """Refuse a family whose visual tokens cannot be placed on a picture, as `token_boxes` does.

    Raises:
        VlmpruneError: it is one, or unknown.
    """
    _medium(family)


def _medium(family: str) -> Medium:
    """A family's images; its `overlay` and `whole_crop` say how one is cut."""
    for kind, record in FAMILIES.items():
        if family in (kind, record.name):
            found = next((m for m in record.media if m.kind == "image" and m.overlay), None)
            if found is None:
                raise VlmpruneError(f"where visual tokens lie is not known for {record.name} yet.")
            return found
    near = meant(family, FAMILIES)
    raise VlmpruneError(f"family {family!r} is not known{near}; use one of {', '.join(FAMILIES)}.")


def _views(steps: Steps, size: Size, medium: Medium, crops: int) -> list[_View]:
    """The crops of an image of (height, width) `size`, in order."""
    whole = (_Axis(size[0]), _Axis(size[1]))
    if medium.overlay == "own":
        return [whole]
    if medium.overlay == "square" and steps.pans:
        raise VlmpruneError(
            "with do_pan_and_scan a picture goes in as several, whose places on it are not told; "
            "switch that off."
        )
    # LLaVA-OneVision does not tile an image that shares its prompt with others.
    cut = {"canvas": _canvas, "tiles": _tiles}.get(medium.overlay)
    if cut is not None and crops > 1:
        tiles, view = cut(steps, size)
        return [view, *tiles] if medium.whole_crop == "first" else [*tiles, view]
    if steps.pads_to_square:
        side = max(size)
        whole = (_padded(size[0], side), _padded(size[1], side))
    return [_then(whole, _fit(steps, _lengths(whole)))]


def _tiles(steps: Steps, size: Size) -> tuple[list[_View], _View]:
    """What an any-resolution processor cuts an image into, and its view of the whole."""
    target = processors.best_resolution(size, steps.pinpoints)
    fitted = processors.fitted_size(size, target)
    padded = [
        _resized(size[axis], fitted[axis]).then(_padded(fitted[axis], target[axis]))
        for axis in (0, 1)
    ]
    edge = steps.size_entry("shortest_edge")
    base = (steps.size_entry("height") or edge, steps.size_entry("width") or edge)
    tile = steps.crop_entry("height") or base[0]
    tiles = []
    for top in range(0, target[0], tile):
        for left in range(0, target[1], tile):
            rows = _Axis(min(tile, target[0] - top), shift=top)
            columns = _Axis(min(tile, target[1] - left), shift=left)
            tiles.append((padded[0].then(rows), padded[1].then(columns)))
    view = (_resized(size[0], base[0]), _resized(size[1], base[1]))
    fitted_tiles = [_then(one, _fit(steps, _lengths(one))) for one in tiles]
    return fitted_tiles, _then(view, _fit(steps, _lengths(view)))


def _canvas(steps: Steps, size: Size) -> tuple[list[_View], _View]:
    """What InternVL's processor cuts an image into, stretched, and its view of the whole."""
    side = steps.size_entry("height"), steps.size_entry("width")
    columns, rows = steps.canvas(size, side, *steps.patches)
    target = (rows * side[0], columns * side[1])
    whole = (_resized(size[0], target[0]), _resized(size[1], target[1]))
    tiles = [
        _then(whole, (_Axis(side[0], shift=top), _Axis(side[1], shift=left)))
        for top in range(0, target[0], side[0])
        for left in range(0, target[1], side[1])
    ]
    return tiles, (_resized(size[0], side[0]), _resized(size[1], side[1]))


def _fit(steps: Steps, size: Size) -> _View:
    """Resize and centre crop, as every processor here does with a picture or a tile."""
    target = _resize_target(steps, size) if steps.resizes else size
    resized = (_resized(size[0], target[0]), _resized(size[1], target[1]))
    crop = steps.crop
    if crop is None:
        return resized
    return _then(resized, (_cropped(target[0], crop[0]), _cropped(target[1], crop[1])))


def _resize_target(steps: Steps, size: Size) -> Size:
    height, width = steps.size_entry("height"), steps.size_entry("width")
    if height and width:
        return height, width
    edge = steps.size_entry("shortest_edge")
    if not edge or steps.size_entry("longest_edge"):
        raise VlmpruneError(
            f"an image processor that resizes to {steps.size} is not supported; use one with "
            "height and width, or with shortest_edge."
        )
    # Rounded down, as transformers does for every side but the shortest.
    long = int(edge * max(size) / min(size))
    return (long, edge) if size[1] <= size[0] else (edge, long)


def _resized(before: int, after: int) -> _Axis:
    return _Axis(after, scale=before / after)


def _padded(inner: int, outer: int) -> _Axis:
    return _Axis(outer, shift=-((outer - inner) // 2))


def _cropped(inner: int, outer: int) -> _Axis:
    # Where the picture is the smaller one this pads, and then an odd pixel goes before it.
    return _Axis(outer, shift=(inner - outer) // 2)


def _then(view: _View, after: _View) -> _View:
    return view[0].then(after[0]), view[1].then(after[1])


def _lengths(view: _View) -> Size:
    return view[0].length, view[1].length
