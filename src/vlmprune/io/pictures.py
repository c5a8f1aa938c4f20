"""Pictures: opened as people see them, and written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageOps

from vlmprune.errors import VlmpruneError, reason


def open_images(paths: Sequence[str]) -> list[Image.Image]:
    """Open pictures as people see them: turned as their EXIF says, in RGB.

    Raises:
        VlmpruneError: a path does not exist or is no picture.
    """
    images = []
    for path in paths:
        if not Path(path).exists():
            raise VlmpruneError(f"image {path!r} does not exist; give the path of a picture.")
        try:
            with Image.open(path) as image:
                images.append(ImageOps.exif_transpose(image).convert("RGB"))
        # Broken files make Pillow's decoders fail in many ways.
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise VlmpruneError(
                f"image {path!r} cannot be opened as a picture; give a PNG, JPEG or other file "
                "that Pillow reads."
            ) from error
    return images


def save(pictures: Sequence[Image.Image], paths: Sequence[Path]) -> None:
    """Write pictures.

    Raises:
        VlmpruneError: the disk or the format refuses.
    """
    for picture, path in zip(pictures, paths, strict=True):
        try:
            picture.save(path)
        except (OSError, ValueError) as error:
            raise VlmpruneError(
                f"overlay {str(path)!r} cannot be written ({reason(error)})."
            ) from error
