"""Pictures, opened as people see them.

There is one way from a file, or from a picture that somebody else opened, to the RGB pixels that a
model's processor gets: turned as its EXIF says, transparency laid on white, of several frames the
first. The processors of Transformers do the same to a picture from 5.21 on. Earlier ones drop
transparency, as `transformers.image_utils.load_image` does in all releases, which shows whatever
colour lies under it, mostly black. Numbers of more than 8 bits are scaled to 8, where Pillow, and
Transformers with it, clips them, so that 16-bit grey is white throughout.
"""

from __future__ import annotations

import stat
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

from vlmprune.errors import VlmpruneError, reason

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
"""By which a name is taken for a picture's."""

Floats = NDArray[np.floating[Any]]

# Which warnings are shown is the whole process's to say, so one picture at a time says it.
_filters = threading.RLock()
_WHITE = (255, 255, 255, 255)
# Pillow's modes of 16-bit grey, and those of numbers whose range nothing tells.
_SIXTEEN = ("I;16", "I;16L", "I;16B", "I;16N")
_OPEN = ("I", "F")
# Formats of which Pillow gives 16-bit grey as 32-bit numbers, of PNG before its release 11.
_SCALED = ("PPM", "PNG")
_BITS_PER_SAMPLE = 258
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes a picture upright, by the orientation that its EXIF gives."""
_SIDEWAYS = (5, 6, 7, 8)
"""Orientations in which rows are columns."""


def open_images(paths: Sequence[str]) -> list[Image.Image]:
    """Open pictures as people see them, in RGB.

    Raises:
        VlmpruneError: a path does not exist, cannot be read, or is no whole picture.
    """
    return [open_image(path) for path in paths]


def open_image(path: str | Path) -> Image.Image:
    """Open one picture so.

    Raises:
        VlmpruneError: as `open_images`.
    """
    with _opened(path) as image:
        return _seen(image)


def size_of(path: str | Path) -> tuple[int, int]:
    """(width, height) of a picture as people see it, mostly without reading its pixels.

    Raises:
        VlmpruneError: as `open_images`, but for what reading the pixels would find.
    """
    with _opened(path) as image:
        # Of TIFF, Pillow itself turns pixels as it reads them, and some of its releases the size
        # before that.
        if image.format == "TIFF":
            image.load()
        width, height = image.size
        return (height, width) if _orientation(image) in _SIDEWAYS else (width, height)


def as_seen(image: Image.Image, name: str = "the picture") -> Image.Image:
    """A picture that somebody else opened, as people see it: turned as its EXIF says, in RGB.

    Args:
        image: of any mode; it is not changed.
        name: what an error calls it.

    Raises:
        VlmpruneError: its file, of which Pillow reads the pixels only now, is broken.
    """
    with _told(name):
        return _seen(image)


def to_rgb(image: Image.Image, white: int | None = None) -> Image.Image:
    """A picture in RGB, transparency laid on white; not turned.

    16-bit grey becomes its upper 8 bits, as Pillow makes 16-bit colour. Of whole or fractional
    numbers nothing says which is white. Fractions in 0 to 1 are taken for shares of white, numbers
    in 0 to 255 are taken as they are, in 0 to 65535 for 16-bit grey; any others are spread from the
    lowest, black, to the highest, white. What is no number is black.

    Args:
        image: of any mode; it is not changed.
        white: the number that is white where it is known, in modes of more than 8 bits; by default
            65535 for 16-bit grey.
    """
    if image.mode in _SIXTEEN or image.mode in _OPEN:
        return _from_numbers(image, white)
    if image.mode in ("RGBA", "LA", "PA", "RGBa") or image.info.get("transparency") is not None:
        seen = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", seen.size, _WHITE), seen).convert("RGB")
    return image.convert("RGB")


@contextmanager
def _opened(path: str | Path) -> Iterator[Image.Image]:
    """A picture's file, opened; what goes wrong with it inside is told in one sentence."""
    check_file(str(path))
    with _told(f"image {str(path)!r}"), Image.open(path) as image:
        yield image


@contextmanager
def _told(name: str) -> Iterator[None]:
    """Tell in one sentence what goes wrong with a picture, and nothing of what does not matter."""
    with _filters, warnings.catch_warnings():
        # Pillow warns of large pictures, odd metadata and palettes, none of which is an error here.
        warnings.simplefilter("ignore")
        try:
            yield
        except Image.DecompressionBombError as error:
            # Pillow warns beyond its limit, and refuses beyond twice that.
            limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
            raise VlmpruneError(
                f"{name} cannot be opened as a picture, for it has more than the {limit} pixels "
                "that Pillow takes; give a smaller one."
            ) from error
        except MemoryError as error:
            raise VlmpruneError(
                f"{name} is too large for the memory; give a smaller one."
            ) from error
        except PermissionError as error:
            raise VlmpruneError(f"{name} may not be read; give one that may.") from error
        except UnidentifiedImageError as error:
            raise VlmpruneError(
                f"{name} cannot be opened as a picture; give a PNG, JPEG or other file that "
                "Pillow reads."
            ) from error
        # Broken files make Pillow's decoders fail in many ways.
        except Exception as error:
            raise VlmpruneError(
                f"{name} cannot be opened as a picture ({reason(error) or type(error).__name__}); "
                "give a whole PNG, JPEG or other file that Pillow reads."
            ) from error


def check_file(name: str) -> None:
    """Refuse what is no file that could hold a picture.

    Raises:
        VlmpruneError: it is none; caused by FileNotFoundError where nothing has that name.
    """
    try:
        about = Path(name).stat()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise VlmpruneError(
            f"image {name!r} does not exist; give the path of a picture."
        ) from error
    # A name that no file can have, or a folder that may not be looked into.
    except (OSError, ValueError) as error:
        raise VlmpruneError(
            f"image {name!r} cannot be looked at ({reason(error)}); give the path of a picture."
        ) from error
    if stat.S_ISDIR(about.st_mode):
        raise VlmpruneError(
            f"image {name!r} is a folder and cannot be opened as a picture; give a picture in it."
        )
    # A pipe would be waited for without end.
    if not stat.S_ISREG(about.st_mode):
        raise VlmpruneError(
            f"image {name!r} is no file and cannot be opened as a picture; give the path of one."
        )
    if not about.st_size:
        raise VlmpruneError(
            f"image {name!r} is empty and cannot be opened as a picture; give a whole one."
        )


def _seen(image: Image.Image) -> Image.Image:
    # First of all, so that a broken file is found out before something else looks at it.
    image.load()
    upright = _TURNS.get(_orientation(image))
    seen = to_rgb(image, _white(image))
    return seen if upright is None else seen.transpose(upright)


def _orientation(image: Image.Image) -> int:
    """How a picture is to be turned, as EXIF numbers it; 1, not at all, where nothing says."""
    try:
        found = image.getexif().get(ExifTags.Base.Orientation, 1)
        return found if isinstance(found, int) else 1
    # Broken metadata make Pillow fail in many ways, and say nothing of the pixels.
    except Exception:
        return 1


def _white(image: Image.Image) -> int | None:
    """The number that is white in a file of more than 8 bits, where the file says so."""
    if image.mode in _SIXTEEN:
        # 12-bit TIFF comes unscaled.
        bits = getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE)
        return None if bits is None else 2 ** int(bits[0]) - 1
    return 65535 if image.mode == "I" and image.format in _SCALED else None


def _from_numbers(image: Image.Image, white: int | None) -> Image.Image:
    """A picture of one number of more than 8 bits a pixel."""
    numbers = np.asarray(image)
    sixteen = image.mode in _SIXTEEN
    kind: type[np.floating[Any]] = np.float32 if sixteen else np.float64
    values: Floats = numbers.astype(kind)
    if sixteen and white is None:
        white = 65535
    black, step = _scale(values, image.mode) if white is None else (0.0, 256 / (white + 1))
    grey = np.nan_to_num(np.clip((values - black) * step, 0, 255)).astype(np.uint8)
    clear: Any = image.info.get("transparency")
    if isinstance(clear, int):
        grey[numbers == clear] = 255
    return Image.fromarray(grey).convert("RGB")


def _scale(values: Floats, mode: str) -> tuple[float, float]:
    """The number that is black, and by what the others above it are multiplied."""
    real = values[np.isfinite(values)]
    low, high = (float(real.min()), float(real.max())) if real.size else (0.0, 0.0)
    if mode == "F" and low >= 0 and high <= 1:
        return 0.0, 255.0
    if low >= 0 and high <= 65535:
        return 0.0, 1.0 if high <= 255 else 1 / 256
    return low, 255 / (high - low) if high > low else 0.0
