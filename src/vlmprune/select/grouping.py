"""Patches dealt out to groups, hard and yet with gradients. Imports torch alone."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmprune.select import first_max


def gumbel(scores: Tensor) -> Tensor:
    """Standard Gumbel noise of the shape, type and device of some scores."""
    return -torch.empty_like(scores).exponential_().log()


def assigned(scores: Tensor, noise: Tensor | None = None, temperature: float = 1.0) -> Tensor:
    """Each patch's one group: where its score is largest, ties to the lower group.

    Gradients are those of a softmax over the groups (straight-through).

    Args:
        scores: [B, M, N] float32; -inf where a patch cannot go into a group.
        noise: [B, M, N] added to the scores, in training; None for none.
        temperature: of the softmax.

    Returns:
        [B, M, N] float32; 1 where patch n is in group m, else 0.
    """
    scores = scores if noise is None else scores + noise
    soft = (scores / temperature).softmax(dim=1)
    chosen = first_max(scores.detach().transpose(1, 2)).transpose(1, 2)
    hard = torch.zeros_like(soft).scatter(1, chosen, 1.0)
    # The difference is 0 exactly; it brings the gradients.
    return hard + (soft - soft.detach())


def means(shares: Tensor, values: Tensor) -> Tensor:
    """The mean of each group's members; 0 for a group without any.

    Args:
        shares: [B, M, N] as from `assigned`, 0 for patches that do not count.
        values: [B, N, C].

    Returns:
        [B, M, C].
    """
    return shares @ values / shares.sum(dim=2, keepdim=True).clamp(min=1)
