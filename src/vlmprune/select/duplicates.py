"""VisPruner's removal of duplicates: a list of tokens is thinned in rounds, closest ones first.

In a round the tokens at even places of the list are compared with those at odd places, the closest
are dropped, and the list is made anew: what is left of the even ones by falling similarity, then
the odd ones. On the CPU small steps cost most, and NumPy's cost least.

Source: arXiv 2412.01818, section 3, and the authors' code.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# Tokens dropped in one round (the authors' code).
ROUND = 8
# Strips in which a symmetric matrix is computed; each leaves out what earlier ones hold.
STRIPS = 4
# Numbers that one block of similarities may hold (16 MiB in float32). Of lists with more of them
# each token's nearest are held.
BLOCK = 1 << 22
NEAREST = 32

Array = NDArray[Any]


def thinned(tokens: Tensor, features: Tensor, keep: int) -> Tensor:
    """Lists of tokens without their closest duplicates.

    Of equally close ones the lower index is dropped first. Beside unit vectors, R · C numbers of a
    crop, this holds on the CPU at most `BLOCK` similarities and `NEAREST` of each token; elsewhere
    B · R² of them.

    Args:
        tokens: [B, R] indices of tokens, in the order of the first round.
        features: [B, N, C].
        keep: how many to keep, 1 to R.

    Returns:
        [B, keep] of the indices, in no order.
    """
    # Number the tokens of a list anew, so that a number finds its row of the similarities, and of
    # two tokens the larger number is the lower index.
    numbered = tokens.sort(dim=1, descending=True)
    rest = numbered.indices.argsort(dim=1)
    thin = _on_the_cpu if features.device.type == "cpu" else _on_any_device
    return numbered.values.gather(1, thin(features.detach(), numbered.values, rest, keep))


def unit_rows(features: Tensor, rows: Tensor) -> Tensor:
    """[..., R, C] float32 features of rows [R] of [..., N, C], each of length 1."""
    unit = features.index_select(-2, rows).float()
    return unit.div_(unit.norm(dim=-1, keepdim=True).clamp_min_(1e-12))


def products(vectors: Tensor) -> Tensor:
    """Dot product of every pair of vectors [..., N, C], each pair computed about once."""
    N = vectors.shape[-2]
    found = vectors.new_empty(*vectors.shape[:-1], N)
    for strip in range(STRIPS):
        start, stop = N * strip // STRIPS, N * (strip + 1) // STRIPS
        part = vectors[..., start:stop, :] @ vectors[..., start:, :].mT
        found[..., start:stop, start:] = part
        found[..., stop:, start:stop] = part[..., stop - start :].mT
    return found


def _on_the_cpu(features: Tensor, own: Tensor, rest: Tensor, keep: int) -> Tensor:
    """Numbers [B, keep] that stay.

    Args:
        features: [B, N, C].
        own: [B, R] the index of each number.
        rest: [B, R] numbers in the order of the first round.
        keep: 1 to R.
    """
    left = rest.new_empty(len(rest), keep)
    for crop, (vectors, rows, order) in enumerate(zip(features, own, rest, strict=True)):
        left[crop] = torch.from_numpy(_in_rounds(unit_rows(vectors, rows), order.numpy(), keep))
    return left


def _in_rounds(unit: Tensor, rest: Array, keep: int) -> Array:
    """Numbers [keep] of one list's unit vectors [R, C] that stay, from their first order [R]."""
    near: _Whole | _Nearest = _Whole(unit) if len(unit) ** 2 <= BLOCK else _Nearest(unit)
    while len(rest) > keep:
        even, odd = rest[0::2], rest[1::2]
        # Of a short list that may be all of them.
        drop = min(ROUND, len(rest) - keep)
        bits = (near.closest(even, odd) + 0.0).view(np.int32)
        bits ^= (bits >> 31) & 0x7FFFFFFF
        # One integer holds the similarity above and the number below: a single sort orders by
        # similarity, breaks ties by index, and brings the numbers along.
        key = (bits.astype(np.int64) << 32) + even
        key.sort()
        even = key[::-1][drop:] & 0xFFFFFFFF
        rest = np.concatenate((even, odd))
    return rest


class _Whole:
    """All similarities of a list."""

    def __init__(self, unit: Tensor) -> None:
        self._similarity = products(unit).numpy()

    def closest(self, even: Array, odd: Array) -> Array:
        """[E] similarity to the nearest of the odd ones."""
        # The matrix is symmetric: whole rows are read in order, which is several times faster than
        # picking out the pairs.
        found: Array = np.maximum.reduce(self._similarity.take(odd, axis=0), axis=0).take(even)
        return found


class _Nearest:
    """Of each token the nearest others, found anew among what is left when none of them is odd."""

    def __init__(self, unit: Tensor) -> None:
        R = len(unit)
        # Those that were left when last it was half of them, their numbers, and where each is.
        self._unit, self._numbers, self._place = unit, np.arange(R), np.arange(R)
        self._places = np.zeros((R, NEAREST), dtype=np.int64)
        self._similarity = np.zeros((R, NEAREST), dtype=np.float32)
        self._odd = np.zeros(R, dtype=bool)
        for _ in self._found(self._numbers, self._numbers):
            pass

    def closest(self, even: Array, odd: Array) -> Array:
        """[E] similarity to the nearest of the odd ones."""
        self._odd[:] = False
        self._odd[odd] = True
        near = self._odd[self._places[even]]
        first = near.argmax(axis=1)
        closest: Array = self._similarity[even, first]
        gone = (~near[np.arange(len(even)), first]).nonzero()[0]
        if len(gone):
            left = np.concatenate((even, odd))
            found = self._found(even[gone], left)
            closest[gone] = np.concatenate([one[:, len(even) :].max(axis=1) for one in found])
        return closest

    def _found(self, rows: Array, left: Array) -> Iterator[Array]:
        """Find what is nearest to some rows; gives similarities [?, L], a block at a time."""
        if 2 * len(left) <= len(self._numbers):
            self._unit = self._unit[torch.from_numpy(self._place[left])]
            self._numbers = left
            self._place[left] = np.arange(len(left))
        columns = torch.from_numpy(self._place[left])
        count = min(NEAREST, len(left))
        step = max(1, BLOCK // len(self._numbers))
        for start in range(0, len(rows), step):
            some = rows[start : start + step]
            similarity = self._unit[torch.from_numpy(self._place[some])] @ self._unit.T
            similarity = similarity.index_select(1, columns)
            nearest = similarity.topk(count, dim=1)
            # A list that is not filled holds all that is left, so that its end is never reached.
            self._places[some, :count] = left[nearest.indices.numpy()]
            self._similarity[some, :count] = nearest.values.numpy()
            yield similarity.numpy()


def _on_any_device(features: Tensor, own: Tensor, rest: Tensor, keep: int) -> Tensor:
    """The same, without waiting for the device."""
    B, R = own.shape
    crop = torch.arange(B, device=own.device)[:, None]
    unit = unit_rows(features.flatten(0, 1), (own + crop * features.shape[1]).flatten())
    # Numbers of all lists, 0 to B · R.
    closeness = _ordered_bits_(products(unit.view(B, R, -1))).flatten(0, 1)
    rest = rest + crop * R
    while rest.shape[1] > keep:
        even, odd = rest[:, 0::2], rest[:, 1::2]
        drop = min(ROUND, rest.shape[1] - keep, even.shape[1])
        rows = closeness.index_select(0, odd.flatten())
        closest = rows.view(B, odd.shape[1], R).amax(dim=1)
        key = torch.add(even, closest.take(even), alpha=1 << 32)
        even = key.sort(dim=1, descending=True).values[:, drop:] & 0xFFFFFFFF
        rest = torch.cat((even, odd), dim=1)
    return rest - crop * R


def _ordered_bits_(values: Tensor) -> Tensor:
    """int32 numbers in the order of float32 `values`, in their place; -0.0 counts as 0.0."""
    bits = values.add_(0.0).view(torch.int32)
    return bits.bitwise_xor_((bits >> 31).bitwise_and_(0x7FFFFFFF))
