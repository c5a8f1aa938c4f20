"""What a call kept layer by layer, and a map of it: layers across, KV heads down.

Reads reports, and knows nothing of models.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

from PIL import Image

from vlmprune.report import LEFT, LayerReport, Report, RowsReport

# From nothing to all: dark to light in even steps, told apart by the colour-blind too.
RAMP = ((42, 16, 82), (52, 84, 140), (32, 145, 140), (104, 200, 96), (253, 228, 60))
"""Colours of the shares 0, 1/4, 1/2, 3/4 and 1."""
_NONE = (128, 128, 128)


def shares(report: Report, caching: Sequence[bool]) -> list[list[float]]:
    """Of a request with one sample, what every KV head's cache keeps of the visual tokens.

    Args:
        report: of the call.
        caching: for each decoder layer whether it caches keys and values.

    Returns:
        For each layer and head the share of all visual tokens that there were before any pruning;
        a layer that caches nothing has no heads. Empty where no cache was cut.
    """
    cut = {one.index: one for one in report.layers if isinstance(one, LayerReport)}
    if not cut or not report.visual_tokens_before:
        return []
    heads = max(one.mask.shape[1] for one in cut.values())
    whole = report.visual_tokens_after / report.visual_tokens_before
    found: list[list[float]] = []
    for index, caches in enumerate(caching):
        if index in cut:
            counts = cut[index].mask[0].sum(dim=1).tolist()
            found.append([count / report.visual_tokens_before for count in counts])
        else:
            found.append([whole] * heads if caches else [])
    return found


def reached(report: Report, layers: int) -> list[int]:
    """The visual tokens that reach each decoder layer; empty where all reach the last.

    Args:
        report: of the call.
        layers: of the language model.
    """
    rows = {one.index: one for one in report.layers if isinstance(one, RowsReport)}
    if not rows:
        return []
    first = min(rows)
    counts = {index: sum(len(kept) for kept in one.kept) for index, one in rows.items()}
    name = f"{LEFT}{first}"
    left = sum(int(roles[name].sum()) for roles in report.roles if name in roles)
    found = [counts[first] + left] * first
    for index in range(first, layers):
        found.append(counts.get(index, found[-1] if found else 0))
    return found


def colour(share: float) -> tuple[int, int, int]:
    """The colour of a share, 0 to 1."""
    place = min(max(share, 0.0), 1.0) * (len(RAMP) - 1)
    low = min(int(place), len(RAMP) - 2)
    a, b = RAMP[low], RAMP[low + 1]
    red, green, blue = (round(x + (place - low) * (y - x)) for x, y in zip(a, b, strict=True))
    return red, green, blue


def picture(table: Sequence[Sequence[float]]) -> bytes:
    """The map as a PNG with one pixel a layer and KV head, to be enlarged by who shows it.

    Args:
        table: from `shares`; a layer that lacks a head is grey there.
    """
    heads = max(map(len, table))
    image = Image.new("RGB", (len(table), heads), _NONE)
    for layer, row in enumerate(table):
        for head, share in enumerate(row):
            image.putpixel((layer, head), colour(share))
    target = io.BytesIO()
    image.save(target, format="PNG", optimize=True)
    return target.getvalue()
