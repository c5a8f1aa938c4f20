"""Functions of Transformers that say how a host cuts and orders an image's patches.

Each is called by the names of its arguments, and a record that needs one names it in its `parts`,
so that a release which has another is refused at attach.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import cache
from typing import Any

import transformers
from torch import Tensor

from vlmprune.hosts.parts import Parts, function

_CROPS = "models.llava_next.modeling_llava_next:image_size_to_num_patches"
CROPS = Parts(functions={_CROPS: ("image_size", "grid_pinpoints", "patch_size")})

_WINDOWS = "vision_utils:get_vision_window_index"
WINDOWS = Parts(
    functions={_WINDOWS: ("grid_thw", "spatial_merge_size", "window_size", "patch_size")}
)

_LLAMA4 = "models.llama4.modeling_llama4:pixel_shuffle"
LLAMA4 = Parts(functions={_LLAMA4: ("input_tensor", "shuffle_ratio")})


def crops_of(size: Any, pinpoints: Any, side: int) -> int:
    """Crops that the processor of LLaVA-NeXT makes of an image, the view of the whole included.

    Args:
        size: the image's (height, width).
        pinpoints: the config's `image_grid_pinpoints`.
        side: of a crop, in pixels.
    """
    return int(function(_CROPS)(image_size=size, grid_pinpoints=pinpoints, patch_size=side))


def windows_of(grid: Tensor, merge: int, window: int, patch: int) -> Tensor:
    """[n] int64; the groups of patches in the order in which the tower of Qwen2.5-VL has them.

    Args:
        grid: [items, 3] patches in time, height and width.
        merge: side of a group.
        window: side of a window, in pixels.
        patch: side of a patch, in pixels.
    """
    order: Tensor = function(_WINDOWS)(
        grid_thw=grid, spatial_merge_size=merge, window_size=window, patch_size=patch
    )[0]
    return order


def llama4_shuffle(maps: Tensor, ratio: float) -> Tensor:
    """Llama 4's merging of patches [tiles, patches, C] into [tiles, cells, g * C]."""
    shuffled: Tensor = function(_LLAMA4)(input_tensor=maps, shuffle_ratio=ratio)
    return shuffled


@cache
def takes(cls: str, name: str) -> bool:
    """Whether this release's forward of a class takes an argument.

    Args:
        cls: a class of Transformers, by its name.
        name: of the argument.
    """
    return name in inspect.signature(getattr(transformers, cls).forward).parameters


def first_argument(method: Any) -> str:
    """What a bound method calls its first argument; "" if it takes none."""
    names: Sequence[str] = list(inspect.signature(method).parameters)
    return names[0] if names else ""
