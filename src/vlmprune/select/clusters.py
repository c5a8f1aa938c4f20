"""Rules that merge: which tokens are kept, and which others each of them takes in.

Pure tensor functions over a batch of crops, B, each with N visual tokens. They import torch alone
and break ties by index. Similarities are computed block by block (`select.rows_a_block`), never
N × N at once. Results are places and weights; `merging.py` adds the features up.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vlmprune.select import first_max, rows_a_block, top_k
from vlmprune.select.precision import exact


class Entries(NamedTuple):
    """Weighted sums: entry m adds weight[m] · token source[m] to the new value of token into[m].

    Attributes:
        into: [M] int64; tokens are numbered over all crops, b · N + place.
        source: [M] int64.
        weight: [M] float32.
    """

    into: Tensor
    source: Tensor
    weight: Tensor


class VisionZipPlan(NamedTuple):
    """What `visionzip` chose.

    Attributes:
        dominant: [B, keep - contextual] int64 places, ascending.
        contextual: [B, contextual] int64 places, ascending.
        owner: [B, N] int64; the place that each token went into, a kept one into itself; -1 where
            it is lost.
        entries: how contextual tokens are made.
    """

    dominant: Tensor
    contextual: Tensor
    owner: Tensor
    entries: Entries


@exact
def visionzip(attention: Tensor, keys: Tensor, keep: int, contextual: int) -> VisionZipPlan:
    """VisionZip's choice: the most attended tokens, and a few that the others are merged into.

    What is not dominant forms a list in raster order. Every ⌊R / contextual⌋-th of its R tokens is
    a target; each of the others goes to the target whose key is nearest by cosine. A contextual
    token is its target plus the mean of what went there.

    Source: arXiv 2412.04467, section 3, and the authors' code.

    Extra memory: the unit keys, B · N · D numbers, and one block of similarities of
    `select.rows_a_block` rows × contextual.

    Args:
        attention: [B, N] attention of the CLS token.
        keys: [B, N, D] keys, averaged over heads.
        keep: 1 to N.
        contextual: how many of them are contextual, 0 to keep. With 0, what is not kept is lost.

    Raises:
        ValueError: a number is out of range.
    """
    B, N = attention.shape
    device = attention.device
    if not 0 <= contextual <= keep:
        raise ValueError(f"contextual={contextual} is outside 0 to {keep}.")
    dominant = top_k(attention, keep - contextual)
    left = torch.ones(B, N, dtype=torch.bool, device=device).scatter(1, dominant, False)
    owner = torch.full((B, N), -1, device=device).scatter_(1, dominant, dominant)
    rest = _listed(left, N - keep + contextual)
    if not contextual:
        nothing = dominant.new_zeros(0)
        return VisionZipPlan(dominant, rest[:, :0], owner, Entries(nothing, nothing, nothing / 1))
    step = rest.shape[1] // contextual
    at = torch.arange(rest.shape[1], device=device)
    target = (at % step == 0) & (at < contextual * step)
    # Both parts have lengths that shapes give, so that the device need not be asked.
    order = _listed(target[None], len(at))[0]
    targets, others = rest[:, order[:contextual]], rest[:, order[contextual:]]
    unit = torch.nn.functional.normalize(keys.float(), dim=-1)
    near = _rows(unit, targets).transpose(1, 2)
    parts = others.split(rows_a_block(B, contextual), dim=1)
    best = torch.cat([first_max(_rows(unit, part) @ near)[..., 0] for part in parts], dim=1)
    into = targets.gather(1, best)
    owner.scatter_(1, targets, targets).scatter_(1, others, into)
    ones = torch.ones_like(into, dtype=torch.float32)
    members = torch.zeros(B, N, device=device).scatter_add_(1, into, ones).gather(1, into)
    start = torch.arange(B, device=device)[:, None] * N
    entries = Entries(
        torch.cat((targets + start, into + start), dim=1).flatten(),
        torch.cat((targets + start, others + start), dim=1).flatten(),
        torch.cat((torch.ones_like(targets, dtype=torch.float32), 1 / members), dim=1).flatten(),
    )
    return VisionZipPlan(dominant, targets, owner, entries)


class PruMergePlan(NamedTuple):
    """What `prumerge` chose.

    Attributes:
        kept: [B, N] bool; the residual token's place included.
        sampled: [B, N] bool; those of them that were sampled, not attended.
        residual: [B, N] bool; the place of the residual token, if there is one.
        owner: [B, N] int64; the place of the kept token that takes a token in: of several the one
            whose key is nearest, of none the residual one, else -1. A kept token goes into itself.
        entries: how kept tokens are made.
    """

    kept: Tensor
    sampled: Tensor
    residual: Tensor
    owner: Tensor
    entries: Entries


@exact
def prumerge(
    attention: Tensor,
    keys: Tensor,
    keep: int | None = None,
    plus: bool = False,
    neighbours: int = 32,
) -> PruMergePlan:
    """PruMerge's choice: attention's outliers, each with its neighbours, and one for the rest.

    Without `keep`, outliers are the tokens whose attention is above Q3 + 1.5 · (Q3 - Q1), the
    quartiles interpolated; the most attended token is one in any case. With `plus`, where T are
    outliers, tokens at the places 0, s, 2s… below N - 1 are added, s = ⌊⌊N / T⌋ / 3⌋, 1 at least.
    A kept token is itself plus the attention-weighted sum of the `neighbours` others of nearest
    key, kept or not. The residual token is the attention-weighted sum of all that is not kept; it
    takes the place of the most attended of these.

    With `keep`, the most attended keep - 1 tokens take the part of outliers; with `plus` a quarter
    of them (one at least), and the others lie at equal distances among the rest. One token is the
    residual, but for keep = 1, and keep = N, where all tokens stay as they are.

    Source: arXiv 2403.15388, section 3, and the authors' code; `keep` is ours.

    Extra memory: the unit keys, B · N · D numbers, six times one block of similarities of
    `select.rows_a_block` rows × N, and kept · neighbours + N entries a crop.

    Args:
        attention: [B, N] attention of the CLS token.
        keys: [B, N, D].
        keep: 1 to N tokens, the residual one included; None for as many as the rule gives.
        plus: whether tokens are sampled as well (PruMerge+).
        neighbours: tokens that a kept one takes in, fewer where there are fewer.

    Raises:
        ValueError: `keep` is outside 1 to N.
    """
    B, N = attention.shape
    attention = attention.float()
    place = torch.arange(N, device=attention.device)
    nothing = torch.zeros(B, N, dtype=torch.bool, device=attention.device)
    if keep is not None and not 1 <= keep <= N:
        raise ValueError(f"keep={keep} is outside 1 to {N}.")
    if keep == N:
        none = Entries(place[:0], place[:0], place[:0] / 1)
        return PruMergePlan(~nothing, nothing, nothing, place.repeat(B, 1), none)
    if keep is None:
        chosen = outliers(attention)
        step = (N // chosen.sum(dim=1, keepdim=True) // 3).clamp(min=1)
        sampled = (place % step == 0) & (place < N - 1) & ~chosen & plus
    else:
        count = max(1, keep - 1)
        first = max(1, count // 4) if plus else count
        chosen = nothing.scatter(1, top_k(attention, first), True)
        rest = _listed(~chosen, N - first)
        spread = torch.arange(count - first, device=place.device) * 2 + 1
        spread = spread * (N - first) // (2 * max(1, count - first))
        sampled = nothing.scatter(1, rest[:, spread], True)
    chosen = chosen | sampled
    rest = attention.masked_fill(chosen, -torch.inf)
    residual = nothing.scatter(1, first_max(rest), True) & ~chosen & (keep != 1)
    owner, entries = _neighbours(attention, keys, chosen, residual, neighbours)
    return PruMergePlan(chosen | residual, sampled, residual, owner, entries)


def outliers(attention: Tensor) -> Tensor:
    """[B, N] bool; scores above Q3 + 1.5 · (Q3 - Q1), and each row's largest in any case."""
    values = attention.sort(dim=1).values
    last = values.shape[1] - 1
    quartiles = []
    for q in (0.25, 0.75):
        below = int(q * last)
        low, high = values[:, below, None], values[:, min(below + 1, last), None]
        quartiles.append(low + (high - low) * (q * last - below))
    low, high = quartiles
    return (attention > high + 1.5 * (high - low)).scatter(1, first_max(attention), True)


def _neighbours(
    attention: Tensor, keys: Tensor, chosen: Tensor, residual: Tensor, neighbours: int
) -> tuple[Tensor, Entries]:
    """Owners and entries of `prumerge`."""
    B, N = attention.shape
    place = torch.arange(N, device=attention.device)
    start = torch.arange(B, device=attention.device)[:, None] * N
    unit = torch.nn.functional.normalize(keys.float(), dim=-1)
    near = min(neighbours, N - 1)
    # Crops with fewer kept tokens than others are filled up, and what fills them is left out again.
    listed = _listed(chosen, int(chosen.sum(dim=1).max()))
    real = chosen.gather(1, listed)
    rest = residual.any(dim=1, keepdim=True)
    host = first_max(residual.float())
    owner = torch.where(rest, host, -1).repeat(1, N)
    closest = torch.full((B, N), -torch.inf, device=attention.device)
    rows = rows_a_block(B, N)
    taken = []
    for kept, valid in zip(listed.split(rows, dim=1), real.split(rows, dim=1), strict=True):
        cosine = _rows(unit, kept) @ unit.transpose(1, 2)
        cosine.scatter_(2, kept[:, :, None], -torch.inf)
        found = cosine.sort(dim=2, descending=True, stable=True)
        taken.append(found.indices[:, :, :near].clone())
        likeness = found.values[:, :, :near].masked_fill(~valid[:, :, None], -torch.inf)
        closest, owner = _nearer(closest, owner, kept, taken[-1], likeness)
    owner = torch.where(chosen | residual, place, owner)
    own = chosen.flatten().nonzero()[:, 0]
    into = (listed + start)[real].repeat_interleave(near)
    source = (torch.cat(taken, dim=1) + start[:, :, None])[real].flatten()
    # The residual token is made of all that is not kept, its own place among it.
    left = (~chosen & rest).flatten().nonzero()[:, 0]
    at = (host + start).expand(B, N).flatten()[left]
    weights = attention.flatten()
    return owner, Entries(
        torch.cat((own, into, at)),
        torch.cat((own, source, left)),
        torch.cat((torch.ones_like(weights[own]), weights[source], weights[left])),
    )


def _nearer(
    closest: Tensor, owner: Tensor, kept: Tensor, taken: Tensor, likeness: Tensor
) -> tuple[Tensor, Tensor]:
    """Likeness and owners [B, N] after more kept tokens, in ascending order, took others in."""
    N = closest.shape[1]
    flat, values = taken.flatten(1), likeness.flatten(1)
    best = torch.full_like(closest, -torch.inf).scatter_reduce_(1, flat, values, "amax")
    hit = (values == best.gather(1, flat)) & ~values.isneginf()
    owners = torch.where(hit, kept[:, :, None].expand_as(taken).flatten(1), N)
    lowest = torch.full_like(owner, N).scatter_reduce_(1, flat, owners, "amin")
    return torch.maximum(best, closest), torch.where(best > closest, lowest, owner)


def blocks(candidates: Tensor, columns: Tensor, boxes: Tensor, shape: Tensor) -> Tensor:
    """The block of a coarser grid that each cell lies in.

    Of H rows pooled into h, row i belongs to block row ⌊i · h / H⌋, so that blocks do not overlap
    and their sides differ by one cell at most; columns alike.

    Args:
        candidates: [crops, N] bool; what is none lies in no block.
        columns: [crops] int64; columns of each crop's grid.
        boxes: [crops, 4] int64; first row, first column, rows and columns that are pooled.
        shape: [crops, 2] int64; blocks down and across; 0 keeps nothing of a crop.

    Returns:
        [crops, N] int64; -1 for none.
    """
    cell = torch.arange(candidates.shape[1], device=candidates.device)
    row = cell // columns[:, None] - boxes[:, :1]
    column = cell % columns[:, None] - boxes[:, 1:2]
    down = row * shape[:, :1] // boxes[:, 2:3].clamp(min=1)
    across = column * shape[:, 1:] // boxes[:, 3:].clamp(min=1)
    inside = candidates & (shape > 0).all(dim=1, keepdim=True)
    return torch.where(inside, down * shape[:, 1:] + across, -1)


def pooled(block: Tensor, columns: Tensor) -> tuple[Tensor, Entries]:
    """Average pooling: each block becomes the mean of its cells, in the place of the middle one.

    The middle cell is the one nearest to the mean place of the block's cells.

    Args:
        block: [crops, N] int64 from `blocks`.
        columns: [crops] int64.

    Returns:
        [crops, N] int64, the cell that each went into, -1 for none; and how blocks of more than
        one cell are made.
    """
    crops, N = block.shape
    largest = torch.iinfo(torch.int64).max
    cell = torch.arange(N, device=block.device).expand(crops, N)
    row, column = cell // columns[:, None], cell % columns[:, None]
    there, inside = block.clamp(min=0), block >= 0
    count, rows, cols = (
        torch.zeros_like(block).scatter_add_(1, there, part * inside)
        for part in (torch.ones_like(block), row, column)
    )
    n = count.gather(1, there)
    # Distances in whole numbers, so that equals are equal on every device.
    off = (n * row - rows.gather(1, there)) ** 2 + (n * column - cols.gather(1, there)) ** 2
    nearest = torch.where(inside, off * N + cell, largest)
    middle = torch.full_like(block, largest).scatter_reduce_(1, there, nearest, "amin") % N
    owner = torch.where(inside, middle.gather(1, there), -1)
    source = (inside & (n > 1)).flatten().nonzero()[:, 0]
    start = torch.arange(crops, device=block.device)[:, None] * N
    into = (owner + start).flatten()[source]
    return owner, Entries(into, source, 1 / n.flatten()[source].float())


def _listed(mask: Tensor, count: int) -> Tensor:
    """[B, count] places at which `mask` [B, N] holds, ascending; then some at which it does not."""
    return (~mask).to(torch.uint8).sort(dim=1, stable=True).indices[:, :count]


def _rows(values: Tensor, places: Tensor) -> Tensor:
    """[B, n, D] rows of [B, N, D] at [B, n]."""
    return values.gather(1, places[:, :, None].expand(-1, -1, values.shape[2]))
