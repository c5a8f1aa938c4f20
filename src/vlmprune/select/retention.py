"""What each KV head keeps of each image: pure tensor functions, as `select` is.

They import torch alone and break ties by index, so that CPU and GPU agree.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Share of an equal split that every head is sure of under one budget for all (AdaKV's released
# code calls it the floor and uses the same value).
FLOOR = 0.2

# Parts of a stride that phases are counted in, so that all is whole numbers; and how many of them
# a layer is ahead of the one before: the golden ratio's share, under which no two layers agree.
PARTS = 2**16
AHEAD = 40503


def per_image(scores: Tensor, images: Tensor, keep: Tensor, *, alone: bool = False) -> Tensor:
    """The best tokens of each image in each head, the same number in all heads.

    Source: arXiv 2502.14504, section 3 (images do not compete with each other).

    Args:
        scores: [B, H, V].
        images: [B, V] int64; image of each token, -1 for none.
        keep: [B, I] int64; how many of each image.
        alone: whether every sample is known to have a single image, of V tokens, which saves most
            of the work.

    Returns:
        [B, H, V] bool. Ties go to the lower index.
    """
    if alone:
        return _first(scores, keep[:, None])
    budget = _at(keep, images)
    return _rank(scores, images[:, None].expand_as(scores)) < budget[:, None]


def shared(
    scores: Tensor, images: Tensor, keep: Tensor, floor: float = FLOOR, *, alone: bool = False
) -> Tensor:
    """The best tokens of each image over all heads: one budget for the layer, unequal heads.

    Every head is sure of its own best: the fraction `floor` of an equal split, at least one
    token of each image. What is left goes to the highest scores, whichever head they are in.

    Source: the idea of AdaKV, arXiv 2407.11550, within each image.

    Args:
        scores: [B, H, V].
        images: [B, V] int64; image of each token, -1 for none.
        keep: [B, I] int64; how many of each image in an equal split: the budget is `keep` · H.
        floor: 0 to 1.
        alone: as in `per_image`.

    Returns:
        [B, H, V] bool.
    """
    batch, heads, _ = scores.shape
    least = (keep * floor).floor().long().clamp(min=1).minimum(keep)
    if alone:
        raised = scores.masked_fill(_first(scores, least[:, None]), torch.inf).flatten(1)
        return _first(raised, keep * heads).view(batch, heads, -1)
    everywhere = images[:, None].expand_as(scores)
    sure = _rank(scores, everywhere) < _at(least, images)[:, None]
    # Scores are attention, so nothing that is not sure outranks what is.
    raised = torch.where(sure, torch.inf, scores).flatten(1)
    rank = _rank(raised, everywhere.flatten(1))
    budget = _at(keep * heads, images)[:, None].expand_as(scores)
    return rank.view(batch, heads, -1) < budget


def covering(
    scores: Tensor,
    images: Tensor,
    counts: Tensor,
    keep: Tensor,
    share: float,
    layer: int | Tensor = 0,
) -> Tensor:
    """Scores under which a share of what is kept is spread evenly over each image.

    Token floor((j + p) · n / c) of an image of n tokens comes first, for j from 0 to c - 1, where
    c is `share` of the image's `keep`, half rounded up. The phase p, 0 to 1, is another in each
    head and layer, so that together they see more of the image than any of them. It depends on no
    score.

    Args:
        scores: [B, H, V].
        images: [B, V] int64; image of each token, -1 for none.
        counts: [B, I] int64; tokens of each image.
        keep: [B, I] int64; how many of each image.
        share: 0 to 1; 0 changes nothing.
        layer: number of the decoder layer; one for all, or [B] int64.

    Returns:
        [B, H, V]: infinity at those tokens, else `scores`.
    """
    heads, device = scores.shape[1], scores.device
    # Rounding half up, with room for float32's error.
    spread = (keep.float() * share + 0.5 + 1e-4).floor().long().minimum(keep)
    chosen, tokens = _at(spread, images)[:, None], _at(counts, images)[:, None].clamp(min=1)
    ahead_by = layer * AHEAD if isinstance(layer, int) else layer[:, None] * AHEAD
    phases = (torch.arange(heads, device=device) * PARTS // heads + ahead_by) % PARTS
    place = _rank(torch.zeros_like(images), images)[:, None]

    def before(place: Tensor) -> Tensor:
        """How many of the spread tokens come before a place: ceil(place · c / n - p)."""
        ahead = phases[..., None] * tokens - place * chosen * PARTS
        return -ahead.div(tokens * PARTS, rounding_mode="floor")

    return scores.masked_fill(before(place + 1) > before(place), torch.inf)


def within(keep: Tensor, room: Tensor) -> Tensor:
    """Fewer tokens of each image where all of a sample's would take too much room.

    Every image gives way alike, down to one token.

    Args:
        keep: [B, I] int64; how many of each image are wanted.
        room: [B] int64; how many there is room for.

    Returns:
        [B, I] int64.
    """
    least = (keep > 0).long()
    images, wanted = least.sum(dim=1), keep.sum(dim=1)
    spare = (room - images).clamp(min=0)
    share = (keep - least) * spare[:, None] // (wanted - images).clamp(min=1)[:, None]
    return torch.where((wanted > room)[:, None], least + share, keep)


def important(sums: Tensor, seen: Tensor, share: float) -> Tensor:
    """As many tokens as hold a share of a layer's attention, the best by attention a row.

    Their number p is the fewest columns that together get `share` of what all get; kept are the p
    with the highest attention per row that sees them, for early tokens are seen by more rows.
    The last column always stays.

    Source: arXiv 2410.08584, section 4 (its number of important tokens, and its choice of them).

    Args:
        sums: [B, S] float32; attention that each column gets, added up over rows.
        seen: [B, S] int64; rows that see each column; 0 at padding alone.
        share: 0 to 1; 1 keeps every column.

    Returns:
        [B, S] bool, False at padding. Ties go to the lower index.
    """
    real = seen > 0
    if share >= 1:
        return real
    mass = sums.float().sort(dim=1, descending=True, stable=True).values.cumsum(dim=1)
    fewest = (mass < share * mass[:, -1:]).sum(dim=1, keepdim=True) + 1
    scores = (sums.float() / seen.clamp(min=1)).masked_fill(~real, -1.0)
    order = scores.argsort(dim=1, descending=True, stable=True)
    columns = torch.arange(sums.shape[1], device=sums.device).expand_as(order)
    rank = torch.empty_like(order).scatter(1, order, columns)
    last = torch.where(real, columns, -1).amax(dim=1, keepdim=True)
    return ((rank < fewest) | (columns == last)) & real


def _first(scores: Tensor, keep: Tensor) -> Tensor:
    """The best `keep` [..., 1] of [..., V], as bool; ties go to the lower index."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    better = torch.arange(scores.shape[-1], device=scores.device) < keep
    return torch.empty_like(scores, dtype=torch.bool).scatter_(-1, order, better.expand_as(order))


def _at(values: Tensor, images: Tensor) -> Tensor:
    """Each token's entry of [B, I] `values` by its image; 0 where it has none."""
    return values.gather(1, images.clamp(min=0)).masked_fill(images < 0, 0)


def _rank(scores: Tensor, images: Tensor) -> Tensor:
    """Each token's place within its image along the last dimension, the best being 0."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    order = order.gather(-1, images.gather(-1, order).argsort(dim=-1, stable=True))
    sorted_images = images.gather(-1, order)
    places = torch.arange(scores.shape[-1], device=scores.device).expand_as(order)
    # An image's tokens now stand together; its first one's place is where a new image begins.
    begins = torch.ones_like(sorted_images, dtype=torch.bool)
    begins[..., 1:] = sorted_images[..., 1:] != sorted_images[..., :-1]
    first = places.masked_fill(~begins, 0).cummax(dim=-1).values
    return torch.empty_like(places.contiguous()).scatter(-1, order, places - first)
