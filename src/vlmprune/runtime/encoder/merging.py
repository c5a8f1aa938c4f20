"""Visual tokens made of several: merge plans applied, to what later methods see and to features."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from vlmprune.views import EncoderView, Merge, Selection
from vlmprune.views.layout import NO_PATCH, Layout


def targets(merge: Merge) -> tuple[Tensor, Tensor]:
    """[T] the kept cells that a plan names, ascending, and for each entry the place of its own."""
    cells, places = merge.into.unique(return_inverse=True)
    return cells, places


def summed(values: Tensor, merge: Merge, places: Tensor, count: int) -> Tensor:
    """Weighted sums of features.

    Entries are added up in their order, on every device; gradients reach `values`.

    Args:
        values: [cells, C].
        merge: the plan.
        places: for each entry the place of its sum.
        count: number of sums T.

    Returns:
        [T, C] float32.
    """
    order = places.argsort(stable=True)
    rows = values.index_select(0, merge.source[order].to(values.device)).float()
    rows = rows * merge.weight[order, None].to(rows)
    lengths = torch.zeros(count, dtype=torch.long, device=places.device)
    lengths = lengths.scatter_add(0, places, torch.ones_like(places)).to(rows.device)
    return torch.segment_reduce(rows, "sum", lengths=lengths, axis=0, unsafe=True)


def seen_after(view: EncoderView, merge: Merge) -> EncoderView:
    """The view of a method that chooses among merged cells.

    The features of merged cells are replaced by the sums, the projected ones by sums of projected
    ones: what a projector would make of summed features, it is not asked here.
    """
    cells, places = targets(merge)

    def replaced(values: Tensor | None) -> Tensor | None:
        if values is None:
            return None
        flat = values.flatten(0, 1)
        new = summed(flat, merge, places, len(cells)).to(flat.dtype)
        return flat.index_put((cells.to(flat.device),), new).view_as(values)

    features = replaced(view.features)
    assert features is not None
    return replace(view, features=features, projected=replaced(view.projected))


def narrowed(selection: Selection, before: Selection) -> Selection:
    """A later choice together with the merge that came before it.

    Of the merge, what went into cells that are no longer kept is forgotten.

    Args:
        selection: the later choice.
        before: the earlier one; only one of the two has a merge.
    """
    kept = selection.kept.flatten()
    merge, members, last = selection.merge, selection.members, selection.last
    if before.merge is not None:
        stays = kept[before.merge.into]
        merge = Merge(
            before.merge.into[stays],
            before.merge.source[stays],
            before.merge.weight[stays],
            before.merge.projected,
        )
    if before.members is not None:
        into = before.members.flatten()
        cells = torch.arange(len(kept), device=kept.device)
        after = torch.where(kept, cells, -1) if members is None else members.flatten()
        after = torch.where(into >= 0, after[into.clamp(min=0)], -1)
        members = after.view_as(before.members)
    if before.last is not None:
        earlier = before.last & selection.kept
        last = earlier if last is None else last | earlier
    tokens = before.tokens if selection.tokens is None else selection.tokens
    return replace(selection, merge=merge, members=members, last=last, tokens=tokens)


def places_of(layout: Layout) -> Tensor:
    """[crops · patches] int64; the visual token of each cell, -1 where it has none."""
    places = torch.full((layout.crops * layout.patches,), -1, device=layout.labels.device)
    real = (layout.labels != NO_PATCH).nonzero()[:, 0]
    return places.index_put((layout.labels[real],), real)


def per_cell(layout: Layout, tokens: Tensor) -> Tensor:
    """[crops · patches, D] features by cell, of visual tokens [n, D]; zeros where there is none."""
    labels = layout.labels.to(tokens.device)
    real = labels != NO_PATCH
    empty = tokens.new_zeros(layout.crops * layout.patches, tokens.shape[1])
    return empty.index_put((labels[real],), tokens[real])


def merged(
    merge: Merge,
    kept: Tensor,
    layouts: Sequence[Layout],
    cells: Tensor,
    tokens: Sequence[Tensor],
    projects: Sequence[Callable[[Tensor], Tensor | None]],
) -> list[Tensor]:
    """Visual tokens with the kept ones that a plan names made anew.

    Args:
        merge: the plan.
        kept: [crops, N] bool over the crops of all items.
        layouts: one an item.
        cells: [crops, N, C] features before the projector.
        tokens: for each item [n, D] projected features.
        projects: for each item the projector, [n, C] → [n, D]; None where it does not work cell
            by cell, and then projected features are added up.

    Returns:
        For each item [n, D].

    Raises:
        ValueError: the plan merges into cells that are not kept.
    """
    if not bool(kept.flatten()[merge.into].all()):
        raise ValueError("a merge plan names cells that are not kept.")
    wide = kept.shape[1]
    crops = torch.tensor([one.crops for one in layouts])
    item = torch.arange(len(layouts)).repeat_interleave(crops).to(merge.into.device)
    own, places = targets(merge)
    before = None if merge.projected else summed(cells.flatten(0, 1), merge, places, len(own))
    after: Tensor | None = None
    out, start = [], 0
    for number, (one, features) in enumerate(zip(layouts, tokens, strict=True)):
        here = item[own // wide] == number
        local = own[here] - start * wide
        start += one.crops
        if not len(local):
            out.append(features)
            continue
        rows = None
        # The host blends what it has projected, so a blended token is no cell's own.
        if before is not None and not one.blended:
            rows = projects[number](before[here.to(before.device)].to(cells.dtype))
        if rows is None:
            if after is None:
                every = [
                    torch.nn.functional.pad(
                        per_cell(layout, given).view(layout.crops, layout.patches, -1),
                        (0, 0, 0, wide - layout.patches),
                    )
                    for layout, given in zip(layouts, tokens, strict=True)
                ]
                flat = torch.cat([grid.to(features.device) for grid in every]).flatten(0, 1)
                after = summed(flat, merge, places, len(own))
            rows = after[here.to(after.device)]
        label = local // wide * one.patches + local % wide
        at = places_of(one)[label.to(one.labels.device)].to(features.device)
        out.append(features.index_put((at,), rows.to(features)))
    return out


def replaced(
    selection: Selection, layouts: Sequence[Layout], tokens: Mapping[int, Tensor]
) -> dict[int, Tensor]:
    """Visual tokens with those of kept cells put in, as the method made them.

    Args:
        selection: with `tokens`.
        layouts: one an item.
        tokens: of each item [n, D] projected features.
    """
    assert selection.tokens is not None
    out, start = {}, 0
    for number, one in enumerate(layouts):
        crops = slice(start, start + one.crops)
        start += one.crops
        kept = selection.kept[crops, : one.patches].flatten()
        labels = one.labels.to(kept.device)
        places = ((labels != NO_PATCH) & kept[labels.clamp(min=0)]).nonzero()[:, 0]
        made = selection.tokens[crops, : one.patches].flatten(0, 1)
        rows = made[labels[places].to(made.device)].to(tokens[number])
        out[number] = tokens[number].index_put((places.to(rows.device),), rows)
    return out


def order(layout: Layout, kept: Tensor, last: Tensor) -> Tensor:
    """[k] int64; kept tokens with those of `last` behind the other ones.

    The crops that an image is cut into come as one: those of `last` stand behind all the others,
    crop by crop. The view of the whole image comes by itself, and so does each crop where the host
    does not tell which that is. Tokens of no crop, such as newlines, stay behind the token that
    they came behind.

    Args:
        layout: of the item.
        kept: [n] bool over its visual tokens.
        last: [n] bool.
    """
    crop = layout.crop
    # A newline belongs to the part of the image that the token before it belongs to.
    place = torch.arange(len(crop), device=crop.device)
    crop = crop[torch.where(crop >= 0, place, 0).cummax(dim=0).values][kept].clamp(min=0)
    part = crop if layout.whole_crop is None else (crop != layout.whole_crop).long()
    if layout.whole_crop:
        # It is the last one.
        part = 1 - part
    behind = torch.where(last[kept], crop + 1, 0)
    slots = part.argsort(stable=True)
    sources = (part * (layout.crops + 1) + behind).argsort(stable=True)
    return torch.empty_like(slots).index_put((slots,), sources)


def to_tokens(layouts: Sequence[Layout], kept: Sequence[Tensor], members: Tensor) -> list[Tensor]:
    """Where each visual token of each item went.

    Args:
        layouts: one an item.
        kept: for each [n] bool.
        members: as in `Selection`.

    Returns:
        For each item [n] int64: the kept token, by its number among the item's, that each went
        into; itself for a kept one, -1 for none.
    """
    wide, out, start = members.shape[1], [], 0
    for one, stays in zip(layouts, kept, strict=True):
        own = members[start : start + one.crops, : one.patches].flatten().to(stays.device)
        local = own - start * wide
        there = (own >= 0) & (local >= 0) & (local < one.crops * wide)
        local = local.clamp(min=0, max=one.crops * wide - 1)
        label = (local // wide * one.patches + local % wide).clamp(max=one.crops * one.patches - 1)
        into = torch.where(there, places_of(one).to(stays.device)[label], -1)
        labels = one.labels.to(stays.device)
        found = torch.where(labels >= 0, into[labels.clamp(min=0)], -1)
        itself = torch.arange(len(stays), device=stays.device)
        out.append(torch.where(stays, itself, found).cpu())
        start += one.crops
    return out
