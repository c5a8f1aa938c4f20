"""Token merging as pure functions: who merges with whom, by how much, and what is left.

Imports torch alone.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vlmprune.select.precision import exact


def schedule(tokens: int, keep: int, layers: int) -> tuple[int, ...] | None:
    """How many tokens merge away in each layer so that `keep` are left after the last.

    As even as can be, the first layers one more where it does not divide; a layer takes more where
    the later ones, which halve the tokens at most, could not catch up.

    Args:
        tokens: tokens that may merge, at least `keep`.
        keep: how many are to be left.
        layers: how many layers merge.

    Returns:
        One number a layer; None where `keep` is below what halving in each layer leaves.
    """
    if keep < least(tokens, layers):
        return None
    taken = []
    for left in range(layers, 0, -1):
        even = -(-(tokens - keep) // left)
        taken.append(max(even, tokens - keep * 2 ** (left - 1)))
        tokens -= taken[-1]
    return tuple(taken)


def least(tokens: int, layers: int) -> int:
    """The fewest tokens that so many layers can leave, each halving them at most."""
    return -(-tokens // 2**layers)


@exact
def match(keys: Tensor, merge: int, cls: bool) -> Tensor:
    """Bipartite soft matching: each token's place after `merge` of them went into another.

    Tokens at even places (A) look for the most similar one at odd places (B), by cosine. The A
    tokens with the closest partners merge into them; B tokens take any number. What is left of A
    comes first, by place where there is a CLS token, else closest first; then B by place. The
    order counts, for the next matching splits by it again.

    Args:
        keys: [B, T, D].
        merge: how many merge, at most half of the tokens beside the CLS token.
        cls: whether the first token is a CLS token, which never merges.

    Returns:
        [B, T] int64 below T − merge. Of equal similarities the lower place counts as higher.
        Builds a T/2 × T/2 matrix for each of B.
    """
    units = nn.functional.normalize(keys.detach().float(), dim=-1)
    even, odd = units[:, ::2], units[:, 1::2]
    similarity = even @ odd.transpose(1, 2)
    if cls:
        similarity[:, 0] = -torch.inf
    best, partner = similarity.max(dim=2)
    order = best.argsort(dim=1, descending=True, stable=True)
    stays = order[:, merge:]
    if cls:
        stays = stays.sort(dim=1).values
    first = stays.shape[1]
    place = torch.arange(first, device=keys.device).expand_as(stays)
    into = torch.empty(keys.shape[:2], dtype=torch.long, device=keys.device)
    into[:, ::2] = (partner + first).scatter(1, stays, place)
    into[:, 1::2] = torch.arange(odd.shape[1], device=keys.device) + first
    return into


def averaging(into: Tensor, size: Tensor, left: int) -> tuple[Tensor, Tensor]:
    """The matrix that merges tokens into means weighted by size, and the new sizes.

    A matrix, as summing by index has no fixed order on a GPU.

    Args:
        into: [B, T] int64; each token's place after the merge.
        size: [B, T] float32; of how many patches each token is made.
        left: tokens after the merge.

    Returns:
        [B, left, T] float32, rows that sum to 1, and [B, left] float32.
    """
    sums = torch.zeros(len(into), left, into.shape[1], device=into.device)
    sums.scatter_(1, into[:, None], size[:, None])
    total = sums.sum(dim=2)
    return sums / total[:, :, None], total


def representatives(shared: Tensor, candidates: Tensor, rank: Tensor) -> tuple[Tensor, Tensor]:
    """One cell for each group of cells that share their features.

    Args:
        shared: [crops, N] int64 in [0, N); cells of a crop with the same number are a group.
        candidates: [crops, N] bool; the others are never chosen.
        rank: [N] or [crops, N] int64, no two candidates of a crop alike; the one with the lowest
            stands for its group.

    Returns:
        [crops, N] bool, the chosen; and [crops, N] int64, for each candidate its group's chosen
        cell as crop · N + cell, for others -1. A group without a candidate is gone.
    """
    none = int(torch.iinfo(torch.long).max)
    ranked = torch.where(candidates, rank.expand_as(shared), none)
    lowest = torch.full_like(shared, none).scatter_reduce(1, shared, ranked, "amin")
    chosen = candidates & (ranked == lowest.gather(1, shared))
    cells = torch.arange(shared.numel(), device=shared.device).view_as(shared)
    cells = torch.where(chosen, cells, -1)
    found = torch.full_like(shared, -1).scatter_reduce(1, shared, cells, "amax")
    return chosen, torch.where(candidates, found.gather(1, shared), -1)
