"""The size that a processor scales pictures to, changed for a while or for good."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def scale(processor: Any, side: int) -> None:
    """Let a processor scale pictures to squares of another size from now on.

    Args:
        processor: with an image processor of a fixed size.
        side: pixels.
    """
    images = processor.image_processor
    kind = type(images.size)
    images.size = kind(height=side, width=side)
    if getattr(images, "do_center_crop", False):
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
