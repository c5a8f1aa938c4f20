"""A picture of what was kept: dropped patches dimmed, important and diverse ones outlined.

Patches that went into a kept one are tinted.

Draws on the original image, with boxes in its own pixels, so it knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from vlmprune.draw.panels import (
    MARGIN,
    Floats,
    Ints,
    LegendEntry,
    Mask,
    beside,
    card,
    check_sides,
    checked_boxes,
    crop_frames,
    pixels_of,
    scaled,
    strip_of,
    text_size,
    views_of,
)
from vlmprune.draw.style import (
    CARD,
    CARD_INK,
    CARD_UNSEEN,
    LIGHT_BLUE,
    LIGHT_GREEN,
    LIGHT_GREY,
    LIGHT_ORANGE,
    LIGHT_WHITE,
    Colour,
)
from vlmprune.io.pictures import to_rgb

COLOURS: dict[str, Colour] = {
    "important": LIGHT_ORANGE,
    "diverse": LIGHT_BLUE,
    "kept": LIGHT_WHITE,
    "member": LIGHT_GREEN,
    "dropped": LIGHT_GREY,
}
ROLES = tuple(COLOURS)
# How the legend calls a role, where not by its name.
WORDS = {"member": "merged into a kept one"}
UNSEEN = "not seen"

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
    table = checked_boxes(boxes)
    _check_roles(roles, len(table))
    views = views_of(crops, whole_crop, len(table))
    check_sides(min_side, max_side)
    photo = scaled(to_rgb(image), min_side, max_side)
    table = table * np.tile(np.divide(photo.size, image.size), 2)
    labels = np.array([_LABELS.index(role) for role in roles], dtype=np.int64)
    maps = [_label_map(photo.size, table, labels, groups) for _, groups in views]
    panels = [
        _panel(photo, table, groups, *found) for (_, groups), found in zip(views, maps, strict=True)
    ]
    if not legend:
        return beside(panels, gap=0)
    titles = [_title(name, labels[np.concatenate(groups)]) for name, groups in views]
    unseen = any((by_pixel == 0).any() for by_pixel, _ in maps)
    return _page(panels, titles if len(views) > 1 else [], labels, unseen)


def _check_roles(roles: Sequence[str], boxes: int) -> None:
    if len(roles) != boxes:
        raise ValueError(f"{boxes} boxes have {len(roles)} roles; give one role a box.")
    unknown = set(roles) - set(ROLES)
    if unknown:
        raise ValueError(f"unknown roles {sorted(unknown)}; use {', '.join(ROLES)}.")


def _label_map(
    size: tuple[int, int], boxes: Floats, labels: Ints, groups: list[Ints]
) -> tuple[Ints, Ints]:
    """Label and token number (from 1; 0 where no box lies) of every pixel, both [height, width]."""
    shown = np.concatenate(groups)
    by_pixel = np.zeros(size[::-1], dtype=np.int64)
    owner = np.zeros(size[::-1], dtype=np.int64)
    # Ascending labels, so that a kept patch shows where a dropped one overlaps it.
    for token in shown[np.argsort(labels[shown], kind="stable")]:
        where = pixels_of(boxes[token], size)
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
    colours = np.array([COLOURS.get(name, CARD) for name in _LABELS], dtype=np.float64)[by_pixel]
    for mask, strength in ((between, 0.35), (around, 1.0)):
        shaded[mask] += strength * (colours[mask] - shaded[mask])
    if len(groups) > 1:
        frame = crop_frames(photo.size, boxes, groups) & ~around
        shaded[frame] += 0.55 * (np.array(CARD_INK) - shaded[frame])
    return Image.fromarray(np.rint(shaded).astype(np.uint8))


def _title(name: str, labels: Ints) -> list[LegendEntry]:
    return [(name, None), (f"{int((labels > _MEMBER).sum())} of {len(labels)} kept", None)]


def _page(
    panels: list[Image.Image], titles: list[list[LegendEntry]], labels: Ints, some_unseen: bool
) -> Image.Image:
    """The panels on a dark card, titles above, headline and legend below."""
    width = beside(panels, gap=MARGIN).width
    kept = int((labels > _MEMBER).sum())
    share = f" ({100 * kept / len(labels):.0f} %)" if len(labels) else ""
    entries: list[LegendEntry] = [(f"{kept} of {len(labels)} tokens kept{share}", None)]
    for role in ROLES:
        count = int((labels == _LABELS.index(role)).sum())
        if count:
            entries.append((f"{WORDS.get(role, role)} {count}", COLOURS[role]))
    if some_unseen:
        entries.append((UNSEEN, CARD_UNSEEN))
    return card(panels, titles, strip_of(entries, width, text_size(width), CARD_INK))
