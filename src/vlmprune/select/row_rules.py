"""Which rows go on inside the language model: pure tensor functions, as `select` is.

They take all samples of a batch at once, each with its images one after the other and -1 as the
image of padding. They import torch alone, never wait for the device and break ties by index, so
that CPU and GPU agree.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlmprune.select import retention
from vlmprune.select.precision import exact

# Recycled tokens of one merged row, before one is added (SparseVLM's released code).
CLUSTER = 10


def share(rate: float | Tensor, before: Tensor) -> Tensor:
    """How many of each image's tokens a rate keeps: max(1, round(rate · before)).

    Args:
        rate: 0 to 1; one for all, or [B, I].
        before: [B, I] int64; visual tokens of each image, 0 for none.

    Returns:
        [B, I] int64; half is rounded up.
    """
    # Room for float32's error in rates such as 0.1.
    wanted = (before * rate + (0.5 + 1e-4)).floor().long()
    return wanted.clamp(min=1).minimum(before)


def most_attended(scores: Tensor, images: Tensor, keep: Tensor) -> Tensor:
    """The best tokens of each image.

    Args:
        scores: [B, V].
        images: [B, V] int64; image of each token, -1 for none.
        keep: [B, I] int64; how many of each image.

    Returns:
        [B, V] bool. Ties go to the lower index.
    """
    return retention.per_image(scores[:, None], images, keep)[:, 0]


@exact
def text_raters(visual: Tensor, images: Tensor, text: Tensor, allowed: Tensor) -> Tensor:
    """SparseVLM's raters: the text tokens that the image is most like.

    Each visual token spreads a weight of one over the text tokens, by a softmax of its dot
    products with them. Raters are the text tokens whose mean weight is above the average.

    Source: arXiv 2410.04417, section 3, and the authors' code.

    Args:
        visual: [B, V, D] embedded visual tokens.
        images: [B, V] int64; -1 for none.
        text: [B, X, D] embedded text tokens.
        allowed: [B, X] bool; text tokens that may be raters.

    Returns:
        [B, X] bool; where no weight is above the average, all that are allowed. Memory V · X.
    """
    weight = visual.float() @ text.float().transpose(1, 2)
    # Where nothing is allowed the softmax is undefined, and so is the rest of that sample.
    weight = weight.masked_fill(~allowed[:, None], -torch.inf).softmax(dim=2).nan_to_num()
    mean = weight.masked_fill((images < 0)[:, :, None], 0).sum(dim=1)
    average = mean.sum(dim=1, keepdim=True) / allowed.sum(dim=1, keepdim=True).clamp(min=1)
    raters = allowed & (mean > average)
    return torch.where(raters.any(dim=1, keepdim=True), raters, allowed)


@exact
def recycle(
    states: Tensor, images: Tensor, scores: Tensor, dropped: Tensor, part: float, count: int
) -> tuple[Tensor, Tensor, Tensor]:
    """SparseVLM's recycling: the best of the dropped tokens, clustered and averaged.

    Of d dropped tokens of an image the floor(part · d) + 1 with the largest scores are recycled;
    n of them make floor(n / 10) + 1 clusters by density peaks: a token's density falls with the
    mean squared distance to its nearest ones, as many as there are clusters; centres are those
    with the largest product of density and distance to the nearest denser token (the largest
    distance of all, where there is none); every token joins its nearest centre. A cluster's mean
    goes on as one row.

    Source: arXiv 2410.04417, section 3, and the authors' code. Their random noise on densities
    is left out: of equal ones the lower index counts as denser. Densities are compared as
    logarithms, which cannot underflow. Memory: some matrices of (part · V)².

    Args:
        states: [B, V, D].
        images: [B, V] int64; -1 for none.
        scores: [B, V].
        dropped: [B, V] bool.
        part: share of the dropped, above 0 to 1.
        count: number of images I.

    Returns:
        States [B, V, D] in which some rows of dropped tokens hold the merged ones, those of an
        image by falling worth of their centres; [B, V] bool, these rows; and [B, V] int64, the
        row that each recycled token went into, -1 for all others.
    """
    rows, width = states.shape[1:]
    numbers = torch.arange(count, device=images.device)
    own_drop = dropped[:, None] & (images[:, None] == numbers[:, None])
    left = own_drop.sum(dim=2)
    # Room for float32's error, as in `share`.
    recycled = (left * part + 1e-4).floor().long() + 1
    recycled = recycled.minimum(left)
    clusters = (recycled // CLUSTER + 1).minimum(recycled)

    chosen = most_attended(scores.masked_fill(~dropped, -torch.inf), images, recycled)
    # At most one more an image than the share, and one for the room above.
    most = min(rows, int(part * rows) + 1 + count)
    places = chosen.int().argsort(dim=1, descending=True, stable=True)[:, :most]
    own = images.masked_fill(~chosen, -1).gather(1, places)
    at = places[:, :, None].expand(-1, -1, width)
    vectors = states.gather(1, at).float()
    centres, worth, member = _clusters(vectors, own, clusters)

    weight = member.transpose(1, 2).float()
    merged = weight @ vectors / weight.sum(dim=2, keepdim=True).clamp(min=1)
    # Rows of centres, by index and by falling worth; both have each image's together.
    group = own.masked_fill(~centres, count)
    slots = group.argsort(dim=1, stable=True)
    falling = worth.argsort(dim=1, descending=True, stable=True)
    falling = falling.gather(1, group.gather(1, falling).argsort(dim=1, stable=True))
    merged = merged.gather(1, falling[:, :, None].expand_as(merged))
    placed = torch.empty_like(merged).scatter(1, slots[:, :, None].expand_as(merged), merged)
    placed = torch.where(centres[:, :, None], placed, vectors).to(states.dtype)
    # Of each centre the row that its cluster's mean was put into, and of each token that of its
    # centre's; what was not recycled has none.
    row = torch.empty_like(places).scatter(1, falling, places.gather(1, slots))
    row = row.gather(1, member.int().argmax(dim=2)).masked_fill(own < 0, -1)
    into = torch.full_like(images, -1).scatter(1, places, row)
    merged_rows = torch.zeros_like(dropped).scatter(1, places, centres)
    return states.scatter(1, at, placed), merged_rows, into


def _clusters(vectors: Tensor, own: Tensor, clusters: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Density peaks within each image.

    Args:
        vectors: [B, C, D] float32.
        own: [B, C] image of each, -1 for none.
        clusters: [B, I] int64.

    Returns:
        [B, C] bool, the centres; [B, C] their worth; [B, C, C] bool, whether a vector (second
        dimension) belongs to a centre (third).
    """
    size = own.shape[1]
    place = torch.arange(size, device=own.device)
    apart = (own[:, :, None] != own[:, None]) | (own < 0)[:, None]
    # Products would lose what tells near ones apart, and differ between devices.
    exact = "donot_use_mm_for_euclid_dist"
    distance = torch.cdist(vectors, vectors, compute_mode=exact) / vectors.shape[2] ** 0.5
    among = clusters.gather(1, own.clamp(min=0)).clamp(min=1)[:, :, None]
    nearest = distance.masked_fill(apart, torch.inf).sort(dim=2).values.square().cumsum(dim=2)
    density = -(nearest.gather(2, among - 1) / among)[:, :, 0]

    higher = density[:, None] > density[:, :, None]
    equal = (density[:, None] == density[:, :, None]) & (place < place[:, None])
    farthest = distance.masked_fill(apart, 0).amax(dim=2)
    farthest = torch.where(apart, 0, farthest[:, None]).amax(dim=2, keepdim=True)
    height = torch.where((higher | equal) & ~apart, distance, farthest).amin(dim=2)
    worth = (height.log() + density).masked_fill(own < 0, -torch.inf)
    centres = most_attended(worth, own, clusters)

    reach = distance.masked_fill(apart | ~centres[:, None], torch.inf)
    # A centre is its own, whichever other lies on top of it.
    reach = reach.masked_fill(centres[:, :, None], torch.inf)
    reach = reach.masked_fill(torch.diag_embed(centres), -1)
    best = (reach == reach.amin(dim=2, keepdim=True)) & ~reach.isposinf()
    first = torch.where(best, place, size).amin(dim=2, keepdim=True)
    return centres, worth, place == first


@exact
def unlike_pivots(
    states: Tensor,
    images: Tensor,
    norms: Tensor,
    text_states: Tensor,
    text_norms: Tensor,
    text: Tensor,
    keep: Tensor,
    image_pivots: int,
    text_pivots: int,
) -> Tensor:
    """DART's choice: a few pivots, and the tokens that are least like them.

    Pivots are the visual tokens of each image, and the text tokens of its sample, whose keys are
    largest. The rest of an image's budget is dealt out evenly among its pivots, the first ones
    taking one more where it does not divide. One pivot after the other, visual ones first and both
    in prompt order, takes those of the tokens left whose cosine with it is least.

    Source: arXiv 2502.11494, section 3, and the authors' code.

    Args:
        states: [B, V, D].
        images: [B, V] int64; -1 for none.
        norms: [B, V]; size of each visual token's key.
        text_states: [B, X, D].
        text_norms: [B, X].
        text: [B, X] bool; text tokens that may be pivots.
        keep: [B, I] int64; how many of each image, at most what it has.
        image_pivots: visual pivots of an image, 1 or more; no more than `keep`.
        text_pivots: text pivots of a sample, 0 or more.

    Returns:
        [B, V] bool.
    """
    rows, width = states.shape[1:]
    own = images.clamp(min=0)
    first = keep.clamp(max=image_pivots)
    kept = most_attended(norms, images, first)
    waiting = kept.clone()
    asked = text.sum(dim=1, keepdim=True).clamp(max=text_pivots)
    nothing = torch.zeros_like(text, dtype=torch.long).masked_fill(~text, -1)
    asking = most_attended(text_norms, nothing, asked)
    rest, takers = keep - first, (first + asked).clamp(min=1)
    least, more = rest // takers, rest % takers

    unit = torch.nn.functional.normalize(states.float(), dim=-1)
    place = torch.arange(rows, device=images.device).expand_as(images)
    for turn in range(image_pivots):
        # The first of each image that has not had its turn. Images that have fewer pivots than
        # turns keep pivots alone, and take nothing.
        ahead = torch.where(waiting, place, rows)
        at = torch.full_like(keep, rows).scatter_reduce(1, own, ahead, "amin")
        waiting = waiting & (place != at.gather(1, own))
        pivots = unit.gather(1, at.clamp(max=rows - 1)[:, :, None].expand(-1, -1, width))
        cosine = (unit @ pivots.transpose(1, 2)).gather(2, own[:, :, None])[:, :, 0]
        kept = _take(kept, cosine, images, least + (turn < more))

    text_unit = torch.nn.functional.normalize(text_states.float(), dim=-1)
    order = asking.int().argsort(dim=1, descending=True, stable=True)[:, :text_pivots]
    for number in range(order.shape[1]):
        at = order[:, number, None, None].expand(-1, -1, width)
        cosine = (unit @ text_unit.gather(1, at).transpose(1, 2))[:, :, 0]
        turns = first + number
        kept = _take(kept, cosine, images, (least + (turns < more)) * (number < asked))
    return kept


def _take(kept: Tensor, cosine: Tensor, images: Tensor, wanted: Tensor) -> Tensor:
    """`kept` and, of each image, so many more of those with the least cosine."""
    score = (-cosine).masked_fill(kept, -torch.inf)
    return kept | most_attended(score, images, wanted)
