"""Where each visual token of an image lies on the original picture, in its own pixels.

An image processor resizes, pads, crops and tiles; each of these steps moves an axis by
`original = scale * pixel + shift`, so a step is two such maps, and steps compose.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlmprune.errors import VlmpruneError
from vlmprune.families import FAMILIES
from vlmprune.layout import Layout

Size = tuple[int, int]


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
    overlay = _overlay(family)
    if overlay in ("own", "square", "canvas"):
        patch_size = None
    views = _views(image_processor, (seen[0], seen[1]), overlay, layout.crops)
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


def _overlay(family: str) -> str:
    """How a family's images are cut, as `Medium.overlay` says it."""
    for kind, record in FAMILIES.items():
        if family in (kind, record.name):
            found = next((m.overlay for m in record.media if m.kind == "image"), "")
            if not found:
                raise VlmpruneError(f"where visual tokens lie is not known for {record.name} yet.")
            return found
    raise VlmpruneError(f"family {family!r} is not known; use one of {', '.join(FAMILIES)}.")


def _views(processor: Any, size: Size, overlay: str, crops: int) -> list[_View]:
    """The crops of an image of (height, width) `size`, in order."""
    whole = (_Axis(size[0]), _Axis(size[1]))
    if overlay == "own":
        return [whole]
    if overlay == "square" and getattr(processor, "do_pan_and_scan", False):
        raise VlmpruneError(
            "with do_pan_and_scan a picture goes in as several, whose places on it are not told; "
            "switch that off."
        )
    if overlay == "canvas" and crops > 1:
        return _canvas(processor, size)
    # LLaVA-OneVision does not tile an image that shares its prompt with others.
    if overlay == "tiles" and crops > 1:
        return [_then(view, _fit(processor, _lengths(view))) for view in _tiles(processor, size)]
    if getattr(processor, "do_pad", False) and hasattr(processor, "pad_to_square"):
        side = max(size)
        whole = (_padded(size[0], side), _padded(size[1], side))
    return [_then(whole, _fit(processor, _lengths(whole)))]


def _tiles(processor: Any, size: Size) -> list[_View]:
    """What an any-resolution processor cuts an image into, the view of the whole first."""
    import numpy as np
    from transformers.image_processing_utils import get_patch_output_size, select_best_resolution
    from transformers.image_utils import ChannelDimension

    pinpoints = [list(pair) for pair in processor.image_grid_pinpoints]
    target = select_best_resolution(size, pinpoints)
    # Only the shape of this picture is looked at; it takes no memory.
    shape_only = np.broadcast_to(np.zeros((), dtype=np.uint8), (3, *size))
    fitted = get_patch_output_size(shape_only, target, ChannelDimension.FIRST)
    padded = [
        _resized(size[axis], fitted[axis]).then(_padded(fitted[axis], target[axis]))
        for axis in (0, 1)
    ]
    edge = _entry(processor.size, "shortest_edge")
    base = (_entry(processor.size, "height") or edge, _entry(processor.size, "width") or edge)
    tile = _entry(processor.crop_size, "height") or base[0]
    views = [(_resized(size[0], base[0]), _resized(size[1], base[1]))]
    for top in range(0, target[0], tile):
        for left in range(0, target[1], tile):
            rows = _Axis(min(tile, target[0] - top), shift=top)
            columns = _Axis(min(tile, target[1] - left), shift=left)
            views.append((padded[0].then(rows), padded[1].then(columns)))
    return views


def _canvas(processor: Any, size: Size) -> list[_View]:
    """What InternVL's processor cuts an image into: stretched tiles, the view of the whole last."""
    side = _entry(processor.size, "height"), _entry(processor.size, "width")
    for kind in type(processor).__mro__:
        chosen = getattr(sys.modules[kind.__module__], "get_optimal_tiled_canvas", None)
        if chosen is not None:
            break
    else:
        raise VlmpruneError(f"how {type(processor).__name__} cuts an image is not known.")
    columns, rows = chosen(size, side, processor.min_patches, processor.max_patches)
    target = (rows * side[0], columns * side[1])
    whole = (_resized(size[0], target[0]), _resized(size[1], target[1]))
    views = [
        _then(whole, (_Axis(side[0], shift=top), _Axis(side[1], shift=left)))
        for top in range(0, target[0], side[0])
        for left in range(0, target[1], side[1])
    ]
    return [*views, (_resized(size[0], side[0]), _resized(size[1], side[1]))]


def _fit(processor: Any, size: Size) -> _View:
    """Resize and centre crop, as every processor here does with a picture or a tile."""
    target = _resize_target(processor.size, size) if processor.do_resize else size
    resized = (_resized(size[0], target[0]), _resized(size[1], target[1]))
    if not getattr(processor, "do_center_crop", False):
        return resized
    crop = (_entry(processor.crop_size, "height"), _entry(processor.crop_size, "width"))
    return _then(resized, (_cropped(target[0], crop[0]), _cropped(target[1], crop[1])))


def _resize_target(setting: Any, size: Size) -> Size:
    height, width = _entry(setting, "height"), _entry(setting, "width")
    if height and width:
        return height, width
    edge = _entry(setting, "shortest_edge")
    if not edge or _entry(setting, "longest_edge"):
        raise VlmpruneError(
            f"an image processor that resizes to {setting} is not supported; use one with "
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


def _entry(setting: Any, name: str) -> Any:
    value = setting.get(name) if isinstance(setting, dict) else getattr(setting, name, None)
    return None if value is None else int(value)
