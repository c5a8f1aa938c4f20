"""What pictures of visual tokens share: views of an image side by side, on a card with text."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from vlmprune.draw.style import CARD, CARD_FAINT, CARD_UNSEEN, Colour

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Mask = NDArray[np.bool_]
LegendEntry = tuple[str, Colour | None]

MARGIN = 20
"""Pixels round the panels of a card."""
# Text is drawn larger and shrunk, since the font's spaces collapse when it is hinted at small
# sizes.
SHARP = 4


def checked_boxes(boxes: torch.Tensor) -> Floats:
    """Boxes [n, 4] as numbers.

    Raises:
        ValueError: another shape, or one that is not finite or has x1 < x0 or y1 < y0.
    """
    table = boxes.detach().to("cpu", torch.float64).numpy()
    if table.ndim != 2 or table.shape[1] != 4:
        raise ValueError(f"boxes must be [n, 4], not {list(table.shape)}.")
    if not np.isfinite(table).all() or (table[:, :2] > table[:, 2:]).any():
        raise ValueError("every box must be finite with x0 <= x1 and y0 <= y1.")
    return table


def check_sides(min_side: int, max_side: int) -> None:
    """Refuse sizes of a picture that are not 1 <= min_side <= max_side.

    Raises:
        ValueError: they are not.
    """
    if not 1 <= min_side <= max_side:
        raise ValueError(f"need 1 <= min_side <= max_side, not {min_side} and {max_side}.")


def views_of(
    crops: torch.Tensor | None, whole_crop: int, count: int
) -> list[tuple[str, list[Ints]]]:
    """The panels: a name, and the indices of the tokens of each crop that it shows."""
    if crops is None:
        return [("whole image", [np.arange(count)])]
    numbers = crops.detach().to("cpu", torch.int64).numpy()
    if numbers.shape != (count,) or (numbers < 0).any():
        raise ValueError(f"crops must be {count} numbers of 0 or more, one a box.")
    groups = {int(number): np.flatnonzero(numbers == number) for number in np.unique(numbers)}
    base = [groups.pop(whole_crop)] if whole_crop in groups else []
    views = [("whole image", base), ("high-resolution crops", list(groups.values()))]
    return [view for view in views if view[1]] or [("whole image", [np.arange(count)])]


def scaled(photo: Image.Image, min_side: int, max_side: int) -> Image.Image:
    """A picture whose long side has at least and at most so many pixels."""
    longest = max(photo.size)
    target = min(max(longest, min_side), max_side)
    if target == longest:
        return photo
    width, height = (max(1, round(side * target / longest)) for side in photo.size)
    return photo.resize((width, height), Image.Resampling.LANCZOS)


def pixels_of(box: Floats, size: tuple[int, int]) -> tuple[slice, slice]:
    """Rows and columns whose pixel centres lie in the box, so that neighbours tile without gap."""
    limits = np.array([*size, *size])
    x0, y0, x1, y1 = np.clip(np.ceil(box - 0.5), 0, limits).astype(int)
    return slice(y0, y1), slice(x0, x1)


def crop_frames(size: tuple[int, int], boxes: Floats, groups: list[Ints]) -> Mask:
    """Pixels where one high-resolution crop meets the next."""
    crop = np.zeros(size[::-1], dtype=np.int64)
    for number, group in enumerate(groups, start=1):
        placed = boxes[group][(boxes[group, :2] < boxes[group, 2:]).all(axis=1)]
        if not len(placed):
            continue
        hull = np.concatenate([placed[:, :2].min(axis=0), placed[:, 2:].max(axis=0)])
        crop[pixels_of(hull, size)] = number
    frame = np.zeros(crop.shape, dtype=bool)
    frame[:, 1:] |= crop[:, 1:] != crop[:, :-1]
    frame[1:] |= crop[1:] != crop[:-1]
    return frame


def beside(panels: list[Image.Image], gap: int) -> Image.Image:
    """Panels of one height in a row, `gap` pixels apart."""
    width = sum(panel.width for panel in panels) + gap * (len(panels) - 1)
    row = Image.new("RGB", (width, panels[0].height), CARD)
    left = 0
    for panel in panels:
        row.paste(panel, (left, 0))
        left += panel.width + gap
    return row


def strip_of(entries: list[LegendEntry], width: int, size: int, ink: Colour) -> Image.Image:
    """Lines of text, each entry after its colour swatch where it has one, `width` pixels wide."""
    scale = SHARP
    big, line = size * scale, round(size * 1.75) * scale
    font = ImageFont.load_default(big)
    swatch = round(big * 1.4)
    widths = [round(font.getlength(text)) + (swatch if colour else 0) for text, colour in entries]
    places = flow(widths, width * scale, round(big * 1.5))
    canvas = Image.new("RGB", (width * scale, line * (1 + places[-1][0])), CARD)
    pen = ImageDraw.Draw(canvas)
    for (text, colour), (row, x) in zip(entries, places, strict=True):
        middle, half = row * line + line // 2, round(big * 0.44)
        if colour:
            pen.rounded_rectangle(
                (x, middle - half, x + 2 * half, middle + half),
                radius=3 * scale,
                fill=colour,
                outline=CARD_FAINT if colour == CARD_UNSEEN else colour,
                width=scale,
            )
            x += swatch
        pen.text((x, middle), text, fill=ink, font=font, anchor="lm")
    return canvas.resize((width, canvas.height // scale), Image.Resampling.LANCZOS)


def flow(widths: list[int], available: int, gap: int) -> list[tuple[int, int]]:
    """Line number and left edge of each entry, broken into lines like words."""
    places, row, left = [], 0, 0
    for width in widths:
        if left and left + width > available:
            row, left = row + 1, 0
        places.append((row, left))
        left += width + gap
    return places


def text_size(width: int) -> int:
    """Pixels of a card's text, for panels of such a width."""
    return int(np.clip(width // 44, 15, 24))


def card(
    panels: list[Image.Image], titles: list[list[LegendEntry]], below: Image.Image
) -> Image.Image:
    """The panels on a dark card, a title above each where there are any, and a strip below."""
    row = beside(panels, gap=MARGIN)
    size = text_size(row.width)
    above = [
        strip_of(title, panel.width, size, CARD_FAINT)
        for panel, title in zip(panels, titles, strict=False)
    ]
    top = MARGIN // 2 + max(strip.height for strip in above) if above else MARGIN
    bottom = top + row.height + MARGIN // 2
    page = Image.new("RGB", (row.width + 2 * MARGIN, bottom + below.height + MARGIN // 2), CARD)
    page.paste(row, (MARGIN, top))
    page.paste(below, (MARGIN, bottom))
    left = MARGIN
    for strip in above:
        page.paste(strip, (left, top - strip.height))
        left += strip.width + MARGIN
    return page
