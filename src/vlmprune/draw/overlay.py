"""A picture of what was kept: dropped patches dimmed, important and diverse ones outlined.

Patches that went into a kept one are tinted.

Draws on the original image, with boxes in its own pixels, so it knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from vlmprune.io.pictures import to_rgb

Colour = tuple[int, int, int]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Mask = NDArray[np.bool_]
LegendEntry = tuple[str, Colour | None]

# Brightened orange and sky blue of Okabe and Ito's palette, told apart by the colour-blind too.
COLOURS: dict[str, Colour] = {
    "important": (255, 159, 28),
    "diverse": (86, 196, 255),
    "kept": (245, 245, 245),
    "member": (0, 200, 140),
    "dropped": (92, 96, 104),
}
ROLES = tuple(COLOURS)
# How the legend calls a role, where not by its name.
WORDS = {"member": "merged into a kept one"}
UNSEEN = "not seen"

_PAPER: Colour = (17, 19, 23)
_INK: Colour = (232, 234, 237)
_FAINT: Colour = (154, 160, 168)
_UNSEEN_COLOUR: Colour = (38, 40, 45)

# Label of a pixel: its place in _LABELS. Later ones win where boxes overlap.
_LABELS = (UNSEEN, "dropped", "member", "kept", "diverse", "important")
_DROPPED, _MEMBER = 1, 2
_DIM, _GREY = 0.38, 0.85
# Brightness of what went into a kept patch, and how much of its colour is laid over it.
_HALF, _TINT = 0.6, 0.34
_UNSEEN_DIM = 0.12


def draw(
    image: Image.Image,
    boxes: torch.Tensor,
    roles: Sequence[str],
    *,
    crops: torch.Tensor | None = None,
    whole_crop: int = 0,
    legend: bool = True,
    min_side: int = 672,
    max_side: int = 1344,
) -> Image.Image:
    """Draw which visual tokens of an image were kept.

    Dropped patches are darkened and lose their colour; kept ones stay as they are inside a thin
    outline (orange for important, blue for diverse, white for kept without a reason). Members,
    which went into a kept one, are dimmed less and tinted green, without an outline. What no box
    covers, the model never saw, and is darkest. Where boxes overlap, the kept one shows.

    With tokens of a view of the whole and of high-resolution crops, the result has two panels side
    by side: the view of the whole left, all high-resolution crops right, each on the whole image.

    Args:
        image: the original image, any mode and size; it is not changed.
        boxes: float [n, 4], (x0, y0, x1, y1) of every visual token in pixels of `image`. Parts
            outside the image are clipped. A token without a place, such as a newline, has an
            empty box: it is counted and not drawn.
        roles: n of "important", "diverse", "kept", "member", "dropped".
        crops: int [n], the crop of every token. None is one view of all.
        whole_crop: which of the crops is the view of the whole image (`Layout.whole_crop`).
        legend: whether to put a strip with the counts below (and titles above two panels).
        min_side: the picture is enlarged until its long side has this many pixels.
        max_side: a picture with a longer side is shrunk to this many pixels.

    Returns:
        An RGB picture. Without a legend and with one panel it has just the (scaled) image's size.

    Raises:
        ValueError: lengths that differ, boxes or crops of a wrong shape, a box that is not finite
            or has x1 < x0 or y1 < y0, an unknown role, or sizes that are not
            1 <= min_side <= max_side.
    """
    table = _checked_boxes(boxes, roles)
    views = _views(crops, whole_crop, len(table))
    if not 1 <= min_side <= max_side:
        raise ValueError(f"need 1 <= min_side <= max_side, not {min_side} and {max_side}.")
    photo = _scaled(to_rgb(image), min_side, max_side)
    table = table * np.tile(np.divide(photo.size, image.size), 2)
    labels = np.array([_LABELS.index(role) for role in roles], dtype=np.int64)
    maps = [_label_map(photo.size, table, labels, groups) for _, groups in views]
    panels = [
        _panel(photo, table, groups, *found) for (_, groups), found in zip(views, maps, strict=True)
    ]
    if not legend:
        return _beside(panels, gap=0)
    titles = [_title(name, labels[np.concatenate(groups)]) for name, groups in views]
    unseen = any((by_pixel == 0).any() for by_pixel, _ in maps)
    return _page(panels, titles if len(views) > 1 else [], labels, unseen)


def _checked_boxes(boxes: torch.Tensor, roles: Sequence[str]) -> Floats:
    table = boxes.detach().to("cpu", torch.float64).numpy()
    if table.ndim != 2 or table.shape[1] != 4:
        raise ValueError(f"boxes must be [n, 4], not {list(table.shape)}.")
    if len(roles) != len(table):
        raise ValueError(f"{len(table)} boxes have {len(roles)} roles; give one role a box.")
    unknown = set(roles) - set(ROLES)
    if unknown:
        raise ValueError(f"unknown roles {sorted(unknown)}; use {', '.join(ROLES)}.")
    if not np.isfinite(table).all() or (table[:, :2] > table[:, 2:]).any():
        raise ValueError("every box must be finite with x0 <= x1 and y0 <= y1.")
    return table


def _views(crops: torch.Tensor | None, whole_crop: int, count: int) -> list[tuple[str, list[Ints]]]:
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


def _scaled(photo: Image.Image, min_side: int, max_side: int) -> Image.Image:
    longest = max(photo.size)
    target = min(max(longest, min_side), max_side)
    if target == longest:
        return photo
    width, height = (max(1, round(side * target / longest)) for side in photo.size)
    return photo.resize((width, height), Image.Resampling.LANCZOS)


def _pixels(box: Floats, size: tuple[int, int]) -> tuple[slice, slice]:
    """Rows and columns whose pixel centres lie in the box, so that neighbours tile without gap."""
    limits = np.array([*size, *size])
    x0, y0, x1, y1 = np.clip(np.ceil(box - 0.5), 0, limits).astype(int)
    return slice(y0, y1), slice(x0, x1)


def _label_map(
    size: tuple[int, int], boxes: Floats, labels: Ints, groups: list[Ints]
) -> tuple[Ints, Ints]:
    """Label and token number (from 1; 0 where no box lies) of every pixel, both [height, width]."""
    shown = np.concatenate(groups)
    by_pixel = np.zeros(size[::-1], dtype=np.int64)
    owner = np.zeros(size[::-1], dtype=np.int64)
    # Ascending labels, so that a kept patch shows where a dropped one overlaps it.
    for token in shown[np.argsort(labels[shown], kind="stable")]:
        where = _pixels(boxes[token], size)
        by_pixel[where] = labels[token]
        owner[where] = token + 1
    return by_pixel, owner


def _borders(regions: Ints, thickness: int) -> Mask:
    """Pixels of a region within `thickness` pixels of another region or of the picture's edge."""
    padded = np.pad(regions, thickness, constant_values=-1)
    height, width = regions.shape
    steps = range(0, 2 * thickness + 1)
    border = np.zeros(regions.shape, dtype=bool)
    for down in steps:
        for right in steps:
            border |= padded[down : down + height, right : right + width] != regions
    return border


def _panel(
    photo: Image.Image, boxes: Floats, groups: list[Ints], by_pixel: Ints, owner: Ints
) -> Image.Image:
    pixels = np.asarray(photo, dtype=np.float64)
    grey = pixels @ np.array([0.299, 0.587, 0.114])
    dull = pixels + _GREY * (grey[..., None] - pixels)
    bright = np.where(by_pixel == _DROPPED, _DIM, np.where(by_pixel == 0, _UNSEEN_DIM, 1.0))
    bright = np.where(by_pixel == _MEMBER, _HALF, bright)
    shaded = np.where((by_pixel > _MEMBER)[..., None], pixels, dull * bright[..., None])
    members = by_pixel == _MEMBER
    shaded[members] += _TINT * (np.array(COLOURS["member"]) - shaded[members])

    shown = boxes[np.concatenate(groups)]
    side = float(np.median(shown[:, 2:] - shown[:, :2])) if len(shown) else 0.0
    thickness = int(np.clip(round(side * 0.07), 1, 4))
    kept = by_pixel > _MEMBER
    # A line round each region of one role, and a fainter one between the patches inside it.
    between = kept & _borders(owner, 1)
    around = kept & _borders(by_pixel, thickness)
    colours = np.array([COLOURS.get(name, _PAPER) for name in _LABELS], dtype=np.float64)[by_pixel]
    for mask, strength in ((between, 0.35), (around, 1.0)):
        shaded[mask] += strength * (colours[mask] - shaded[mask])
    if len(groups) > 1:
        frame = _crop_frames(photo.size, boxes, groups) & ~around
        shaded[frame] += 0.55 * (np.array(_INK) - shaded[frame])
    return Image.fromarray(np.rint(shaded).astype(np.uint8))


def _crop_frames(size: tuple[int, int], boxes: Floats, groups: list[Ints]) -> Mask:
    """Pixels where one high-resolution crop meets the next."""
    crop = np.zeros(size[::-1], dtype=np.int64)
    for number, group in enumerate(groups, start=1):
        placed = boxes[group][(boxes[group, :2] < boxes[group, 2:]).all(axis=1)]
        if not len(placed):
            continue
        hull = np.concatenate([placed[:, :2].min(axis=0), placed[:, 2:].max(axis=0)])
        crop[_pixels(hull, size)] = number
    frame = np.zeros(crop.shape, dtype=bool)
    frame[:, 1:] |= crop[:, 1:] != crop[:, :-1]
    frame[1:] |= crop[1:] != crop[:-1]
    return frame


def _beside(panels: list[Image.Image], gap: int) -> Image.Image:
    width = sum(panel.width for panel in panels) + gap * (len(panels) - 1)
    row = Image.new("RGB", (width, panels[0].height), _PAPER)
    left = 0
    for panel in panels:
        row.paste(panel, (left, 0))
        left += panel.width + gap
    return row


def _title(name: str, labels: Ints) -> list[LegendEntry]:
    return [(name, None), (f"{int((labels > _MEMBER).sum())} of {len(labels)} kept", None)]


def _page(
    panels: list[Image.Image], titles: list[list[LegendEntry]], labels: Ints, some_unseen: bool
) -> Image.Image:
    """The panels on a dark card, titles above, headline and legend below."""
    margin = 20
    row = _beside(panels, gap=margin)
    size = int(np.clip(row.width // 44, 15, 24))
    kept = int((labels > _MEMBER).sum())
    share = f" ({100 * kept / len(labels):.0f} %)" if len(labels) else ""
    entries: list[LegendEntry] = [(f"{kept} of {len(labels)} tokens kept{share}", None)]
    for role in ROLES:
        count = int((labels == _LABELS.index(role)).sum())
        if count:
            entries.append((f"{WORDS.get(role, role)} {count}", COLOURS[role]))
    if some_unseen:
        entries.append((UNSEEN, _UNSEEN_COLOUR))
    below = _strip(entries, row.width, size, _INK)
    above = [
        _strip(title, panel.width, size, _FAINT)
        for panel, title in zip(panels, titles, strict=False)
    ]

    top = margin // 2 + max(strip.height for strip in above) if above else margin
    bottom = top + row.height + margin // 2
    page = Image.new("RGB", (row.width + 2 * margin, bottom + below.height + margin // 2), _PAPER)
    page.paste(row, (margin, top))
    page.paste(below, (margin, bottom))
    left = margin
    for strip in above:
        page.paste(strip, (left, top - strip.height))
        left += strip.width + margin
    return page


def _strip(entries: list[LegendEntry], width: int, size: int, ink: Colour) -> Image.Image:
    """Lines of text, each entry after its colour swatch where it has one, `width` pixels wide."""
    # Drawn larger and shrunk, since the font's spaces collapse when it is hinted at small sizes.
    scale = 4
    big, line = size * scale, round(size * 1.75) * scale
    font = ImageFont.load_default(big)
    swatch = round(big * 1.4)
    widths = [round(font.getlength(text)) + (swatch if colour else 0) for text, colour in entries]
    places = _flow(widths, width * scale, round(big * 1.5))
    canvas = Image.new("RGB", (width * scale, line * (1 + places[-1][0])), _PAPER)
    pen = ImageDraw.Draw(canvas)
    for (text, colour), (row, x) in zip(entries, places, strict=True):
        middle, half = row * line + line // 2, round(big * 0.44)
        if colour:
            pen.rounded_rectangle(
                (x, middle - half, x + 2 * half, middle + half),
                radius=3 * scale,
                fill=colour,
                outline=_FAINT if colour == _UNSEEN_COLOUR else colour,
                width=scale,
            )
            x += swatch
        pen.text((x, middle), text, fill=ink, font=font, anchor="lm")
    return canvas.resize((width, canvas.height // scale), Image.Resampling.LANCZOS)


def _flow(widths: list[int], available: int, gap: int) -> list[tuple[int, int]]:
    """Line number and left edge of each entry, broken into lines like words."""
    places, row, left = [], 0, 0
    for width in widths:
        if left and left + width > available:
            row, left = row + 1, 0
        places.append((row, left))
        left += width + gap
    return places
