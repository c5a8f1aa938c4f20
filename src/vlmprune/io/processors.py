"""Image processors of Transformers: what they do to a picture, and the size they scale it to."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from vlmprune.errors import VlmpruneError

Size = tuple[int, int]

# Settings that not every processor has; one without it does not do what it switches on.
_SQUARES, _PANS, _CROPS = "do_pad", "do_pan_and_scan", "do_center_crop"
_TO_SQUARE, _CANVAS = "pad_to_square", "get_optimal_tiled_canvas"


class Steps:
    """What an image processor does to a picture, read from its settings."""

    def __init__(self, processor: Any) -> None:
        self._processor = processor

    @property
    def name(self) -> str:
        """The processor's class."""
        return type(self._processor).__name__

    @property
    def pans(self) -> bool:
        """Whether it cuts further pictures out of a picture (`do_pan_and_scan`)."""
        return bool(getattr(self._processor, _PANS, False))

    @property
    def pads_to_square(self) -> bool:
        """Whether it first pads a picture to a square."""
        pads = getattr(self._processor, _SQUARES, False)
        return bool(pads) and hasattr(self._processor, _TO_SQUARE)

    @property
    def resizes(self) -> bool:
        """Whether it scales a picture."""
        return bool(self._processor.do_resize)

    @property
    def size(self) -> Any:
        """What it scales to, as its settings have it."""
        return self._processor.size

    @property
    def crop(self) -> Size | None:
        """(height, width) that it crops from the middle; None where it does not."""
        if not getattr(self._processor, _CROPS, False):
            return None
        return self.crop_entry("height"), self.crop_entry("width")

    @property
    def pinpoints(self) -> list[list[int]]:
        """The resolutions that a picture of any resolution is fitted to."""
        return [list(pair) for pair in self._processor.image_grid_pinpoints]

    @property
    def patches(self) -> tuple[int, int]:
        """The fewest and the most tiles of a canvas."""
        return self._processor.min_patches, self._processor.max_patches

    @property
    def canvas(self) -> Callable[..., Any]:
        """The host's own rule for (columns, rows) of tiles.

        Raises:
            VlmpruneError: there is none where it has stood so far.
        """
        for kind in type(self._processor).__mro__:
            chosen = getattr(sys.modules[kind.__module__], _CANVAS, None)
            if chosen is not None:
                found: Callable[..., Any] = chosen
                return found
        raise VlmpruneError(f"how {self.name} cuts an image is not known.")

    def size_entry(self, name: str) -> Any:
        """An entry of the size, "height", "width", "shortest_edge" or "longest_edge", or None."""
        return _entry(self._processor.size, name)

    def crop_entry(self, name: str) -> Any:
        """An entry of the size of crops, or None."""
        return _entry(self._processor.crop_size, name)


def _entry(setting: Any, name: str) -> Any:
    value = setting.get(name) if isinstance(setting, dict) else getattr(setting, name, None)
    return None if value is None else int(value)


def best_resolution(size: Size, pinpoints: list[list[int]]) -> Size:
    """The (height, width) that a picture of any resolution is fitted to, by the host's own rule."""
    from transformers.image_processing_utils import select_best_resolution

    height, width = select_best_resolution(size, pinpoints)
    return height, width


def fitted_size(size: Size, target: Size) -> Size:
    """(height, width) of a picture scaled to fit, before it is padded, by the host's own rule."""
    import numpy as np
    from transformers.image_processing_utils import get_patch_output_size
    from transformers.image_utils import ChannelDimension

    # Only the shape of this picture is looked at; it takes no memory.
    shape_only = np.broadcast_to(np.zeros((), dtype=np.uint8), (3, *size))
    height, width = get_patch_output_size(shape_only, target, ChannelDimension.FIRST)
    return height, width


def has_images(processor: Any) -> bool:
    """Whether a processor has a part for images."""
    return getattr(processor, "image_processor", None) is not None


def has_template(processor: Any) -> bool:
    """Whether a processor brings the model's chat form."""
    return bool(getattr(processor, "chat_template", None))


def image_mark(processor: Any) -> str:
    """What stands for an image in a prompt's text; LLaVA's mark where a processor names none."""
    return getattr(processor, "image_token", None) or "<image>"


def scale(processor: Any, side: int) -> None:
    """Let a processor scale pictures to squares of another size from now on.

    Args:
        processor: with an image processor of a fixed size.
        side: pixels.
    """
    images = processor.image_processor
    kind = type(images.size)
    images.size = kind(height=side, width=side)
    if getattr(images, _CROPS, False):
        images.crop_size = kind(height=side, width=side)


@contextmanager
def scaled(processor: Any, side: int | None) -> Iterator[None]:
    """The same inside a `with` block alone.

    Args:
        processor: as in `scale`.
        side: pixels; None leaves the processor's own size.
    """
    if side is None:
        yield
        return
    images = processor.image_processor
    before = images.size, getattr(images, "crop_size", None)
    scale(processor, side)
    try:
        yield
    finally:
        images.size = before[0]
        if before[1] is not None:
            images.crop_size = before[1]
