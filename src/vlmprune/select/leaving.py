"""Tokens that leave an encoder as pure functions: where, how many, and what is made of them.

Imports torch alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmprune.select.precision import unrounded
from vlmprune.select.rules import top_k


def spread(layers: int, times: int = 3) -> tuple[int, ...]:
    """Layers in which tokens leave, after equal parts of the depth: 3, 6 and 9 of 12.

    Args:
        layers: number of layers, 1 or more.
        times: how often tokens leave; less often where there are fewer layers.

    Returns:
        0-based numbers, ascending.
    """
    return tuple(sorted({layers * part // (times + 1) for part in range(1, times + 1)}))


def leaves(tokens: int, keep: int, times: int) -> tuple[int, ...]:
    """How many tokens leave each time so that `keep` are left, the same share every time.

    Args:
        tokens: how many there are, at least `keep`.
        keep: how many are to be left, 1 or more.
        times: how often tokens leave.

    Returns:
        One number each time. What is left is rounded up, as the share is.
    """
    share = keep / tokens
    # A whole number that floats miss by a little is that number.
    left = [math.ceil(tokens * share ** (part / times) - 1e-9) for part in range(times)]
    return tuple(a - b for a, b in zip(left, [*left[1:], keep], strict=True))


def highest(scores: Tensor, cells: Tensor, members: Tensor, keep: int) -> Tensor:
    """The cells that stay, by the mean score of their patches.

    Args:
        scores: [B, patches] of every patch; of those that left it does not matter.
        cells: [B, c] cells that are left, ascending.
        members: [cells, g] the patches of each cell.
        keep: how many stay, at most c.

    Returns:
        [B, keep] ascending; ties go to the lower one.
    """
    each = scores[:, members.flatten()].unflatten(1, members.shape).mean(dim=2)
    return cells.gather(1, top_k(each.gather(1, cells), keep))


@dataclass(frozen=True)
class Leaving:
    """How T tokens of each crop become fewer: some stay, and one may be made of the others.

    Attributes:
        tokens: T.
        stays: [B, s] places of those that stay, ascending.
        share: [B, T] float32; each other token's share in the one that they become, which sums to
            1, and 0 for those that stay. None where the others are gone.
        total: [B, 1, 1] float32; by which that one is scaled, the sum of what the shares are of.
    """

    tokens: int
    stays: Tensor
    share: Tensor | None
    total: Tensor

    @classmethod
    def of(cls, scores: Tensor, stays: Tensor, fuse: bool) -> Leaving:
        """By scores [B, T]; with `fuse` the others become their sum weighted by them."""
        lost = scores.scatter(1, stays, 0.0)
        total = lost.sum(dim=1, keepdim=True)
        share = lost / total.clamp(min=torch.finfo(lost.dtype).tiny) if fuse else None
        return cls(scores.shape[1], stays, share, total[..., None])

    def mean(self, states: Tensor) -> Tensor:
        """[B, 1, C] float32; the others' mean by their shares, none where they are gone."""
        if self.share is None:
            return states[:, :0].float()
        with unrounded(states):
            return self.share[:, None].to(states.device) @ states.float()

    def before(self, states: Tensor) -> Tensor:
        """[B, s (+ 1), C]; states [B, T, C] as they go into what is done to each by itself."""
        return self._joined(states, self.total.to(states.device) * self.mean(states))

    def back(self, added: Tensor) -> Tensor:
        """[B, T, C]; what that adds, [B, s (+ 1), C], handed to the tokens that there were."""
        stays = self.stays.to(added.device)
        index = stays.new_full((len(stays), self.tokens), added.shape[1] - 1)
        place = torch.arange(stays.shape[1], device=stays.device).expand_as(stays)
        return taken(added, index.scatter(1, stays, place))

    def after(self, states: Tensor, mean: Tensor) -> Tensor:
        """[B, s (+ 1), C]; states [B, T, C] behind it, where `mean` is what it was before."""
        added = self.mean(states) - mean
        return self._joined(states, self.total.to(states.device) * mean + added)

    def _joined(self, states: Tensor, one: Tensor) -> Tensor:
        return torch.cat((taken(states, self.stays), one.to(states.dtype)), dim=1)


def taken(states: Tensor, places: Tensor) -> Tensor:
    """[B, t, C] states at places [B, t]."""
    index = places.to(states.device)[..., None]
    return states.gather(1, index.expand(-1, -1, states.shape[2]))


def put(states: Tensor, places: Tensor, tokens: int) -> Tensor:
    """[B, T, C] with states [B, t, C] at places [B, t], zeros elsewhere."""
    index = places.to(states.device)[..., None].expand_as(states)
    empty = states.new_zeros(len(states), tokens, states.shape[2])
    return empty.scatter(1, index, states)
